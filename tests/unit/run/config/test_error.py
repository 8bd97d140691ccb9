"""A mistake is told by its dotted path, as one would type it after --set, and by the nearest valid name."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from dumo.run.config.error import explain
from dumo.types import Spec


class Leaf(Spec):
    kind: Literal["leaf"] = "leaf"
    size: int = Field(default=1, ge=1)
    leaf: int = 0  # named as a kind is


class Twig(Spec):
    kind: Literal["twig"] = "twig"
    length: float = 1.0

    @field_validator("length")
    @classmethod
    def _short(cls, length: float) -> float:
        if length > 9:
            raise ValueError("too long: take 9")
        return length


Part = Annotated[Leaf | Twig, Field(discriminator="kind")]


class Tree(Spec):
    top: Part
    parts: tuple[Part, ...] = ()
    pair: tuple[float, float] = (0.0, 0.0)
    spare: Leaf | None = None
    ref: Literal["self"] | float = "self"
    note: str = ""


def told(tree: object, root: type[Spec] = Tree) -> list[str]:
    """The lines that explain what is wrong with a tree."""
    with pytest.raises(ValidationError) as found:
        root.model_validate(tree)
    return explain(found.value, root).splitlines()


LEAF = {"kind": "leaf"}

WRONG: list[tuple[dict[str, object], str]] = [
    ({"top": {"kind": "leaf", "sise": 1}}, "top.sise: unknown key; did you mean 'size'?"),
    ({"top": LEAF, "nota": 1}, "nota: unknown key; did you mean 'note'?"),
    ({"top": LEAF, "xyzzy": 1}, "xyzzy: unknown key; valid: note, pair, parts, ref, spare, top"),
    (
        {"top": LEAF, "parts": [LEAF, {"kind": "twig", "lenght": 1}]},
        "parts.1.lenght: unknown key; did you mean 'length'",
    ),
    ({"top": {"kind": "leef"}}, "top.kind: there is no 'leef'; did you mean 'leaf'?"),
    ({"top": {"kind": "stone"}}, "top.kind: there is no 'stone'; valid: leaf, twig"),
    ({"top": {}}, "top.kind: missing"),
    ({}, "top: missing"),
    ({"top": 3}, "top: "),
    ({"top": {"kind": "leaf", "size": 0}}, "top.size: input should be greater than or equal to 1; got 0"),
    ({"top": {"kind": "leaf", "size": "big"}}, "top.size: input should be a valid integer"),
    ({"top": {"kind": "leaf", "leaf": "no"}}, "top.leaf: input should be a valid integer"),
    ({"top": {"kind": "twig", "length": 10}}, "top.length: too long: take 9"),
    ({"top": LEAF, "parts": [LEAF, {"kind": "leaf", "size": 0}]}, "parts.1.size: input should be greater"),
    ({"top": LEAF, "parts": [LEAF, {"kind": "twig", "length": "x"}]}, "parts.1.length: input should be a valid number"),
    ({"top": LEAF, "parts": [{"kind": "stone"}]}, "parts.0.kind: there is no 'stone'"),
    ({"top": LEAF, "pair": [0, "x"]}, "pair.1: input should be a valid number"),
    ({"top": LEAF, "spare": {"size": 0}}, "spare.size: input should be greater"),
    ({"top": LEAF, "spare": {"sizes": 0}}, "spare.sizes: unknown key; did you mean 'size'?"),
    ({"top": LEAF, "ref": "me"}, "ref: "),
    ({"top": LEAF, "": 3}, ": unknown key; valid: note, pair, parts, ref, spare, top"),
    ({"top": LEAF, "note": 3}, "note: input should be a valid string; got 3"),
]


@pytest.mark.parametrize(("tree", "line"), WRONG, ids=[line for _, line in WRONG])
def test_line(tree: dict[str, object], line: str) -> None:
    said = told(tree)
    assert said[0].startswith(line)
    assert len({each.split(":")[0] for each in said}) == 1


def test_every_mistake_is_told_in_order() -> None:
    said = told({"tip": 1, "top": {"kind": "leaf", "size": 0, "leaf": "x"}, "note": 1})
    assert sorted(line.split(":")[0] for line in said) == ["note", "tip", "top.leaf", "top.size"]
