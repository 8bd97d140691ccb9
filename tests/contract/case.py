"""The members of every family, found through the unions: a new one is tested without a word written here.

Those of `contract.outside` stand for what users write: they are tested as ours are.
"""

from collections.abc import Iterator

from contract.outside import Outside
from dumo.flow.slope import DualSlope, Slope
from dumo.nets import Net
from dumo.objectives import Drift, DuMo, Objective
from dumo.types import Spec
from dumo.types.outside import members as members

# What a net has of these is set so.
SMALL = {"width": 16, "depth": 2, "attention": 2, "patch": 2, "multipliers": (1, 2), "attend": (2,)}
OWN: dict[str, dict[str, object]] = {"unet": {"depth": 1}}  # ten blocks as it is


SOME = {"root": "somewhere", "side": 8, "classes": 2}
GIVEN = {  # what a spec cannot do without
    "images": SOME,
    "diffusers": {"texts": {"kind": "codes"}},
    "memory": {"name": "builtins:list", "shape": (1, 8, 8), "classes": 0, "digest": "none"},
    "module": {"name": "mine:Net", "layout": "none", "weights": "none"},
    "latents": {"root": "elsewhere", "images": {"kind": "images", **SOME}, "codec": {"kind": "taef2"}},
}


def kind(spec: type[Spec] | Spec) -> str:
    """The name by which a spec is told apart."""
    return type(spec).model_fields["kind"].default if isinstance(spec, Spec) else spec.model_fields["kind"].default


def objectives(*, exact: bool = False, **fields: object) -> Iterator[Objective]:
    """Every objective with every slope it may have (exact: but differences), and with `fields` where it has them."""
    for cls in (*members(Objective), Outside):
        own = {name: value for name, value in fields.items() if name in cls.model_fields}
        if cls is Drift:
            own["size"] = 4  # of few rows
        if "slope" not in cls.model_fields or cls.model_fields["slope"].default is None:
            yield cls(**own)
            continue
        for slope in members(Slope):
            if not (exact and "h" in slope.model_fields):
                yield cls(**own, slope=slope())


def one_each(**fields: object) -> list[Objective]:
    """Every kind of objective once, with the slope that rides, and DuMo with the other slopes.

    For laws of a slope and of an objective: every pair of them would show the same again.
    """
    return [o for o in objectives(**fields) if o.needs.slope in (None, DualSlope()) or isinstance(o, DuMo)]


def name(spec: Spec) -> str:
    """An objective's kind and slope."""
    return "-".join(s.kind for s in (spec, getattr(spec, "slope", None)) if s is not None)


def nets() -> list[Net]:
    """Every net that needs no files, small; the first is the quickest."""
    small = {cls: SMALL | OWN.get(kind(cls), {}) for cls in members(Net) if kind(cls) not in GIVEN}
    found = [cls(**{k: v for k, v in small[cls].items() if k in cls.model_fields}) for cls in small]
    return sorted(found, key=lambda net: kind(net) != "mlp")
