"""An evaluation that was edited, or is none, is refused by the name of what is wrong in it."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from dumo.run.evaluation.record import checked
from dumo.types import UserError
from fuzz.target import EVALUATION

CHANGES: list[tuple[str, Any]] = [
    ("step", "20"),
    ("step", True),
    ("step", 2.5),
    ("weights", None),
    ("results", []),
    ("results", {}),
    ("results.0.nfe", "1"),
    ("results.0.solver", 3),
    ("results.0.fd", "low"),
    ("results.0.fd", [1]),
    ("results.0.fd", float("nan")),
    ("contrast", None),
    ("baselines.halves", 3),
    ("baselines.halves.mean", None),
    ("baselines.halves.sd", -0.5),
    ("baselines.halves.splits", "20"),
    ("state", {}),
    ("card", []),
    ("card.solver", "restart"),
    ("card.codec", {}),
    ("card.nfe", ["1"]),
]


@pytest.mark.parametrize(("place", "value"), CHANGES)
def test_what_is_wrong_is_named(place: str, value: object) -> None:
    found: Any = deepcopy(EVALUATION)
    holder, *parts = found, *place.split(".")
    for part in parts[:-1]:
        holder = holder[int(part) if isinstance(holder, list) else part]
    holder[parts[-1]] = value
    with pytest.raises(UserError, match=rf"^a\.json is damaged, {place}.*: evaluate again$"):
        checked(found, Path("a.json"), "evaluate again")


def test_a_whole_one_stays_as_it_is() -> None:
    assert checked(EVALUATION, Path("a.json"), "way out") == EVALUATION
    old = {name: EVALUATION[name] for name in ("step", "card", "results", "contrast")}
    assert checked(old, Path("a.json"), "way out") == old | {"weights": "", "protocol": "", "baselines": {}}


def test_a_score_that_was_none_stays_none() -> None:
    found = checked(EVALUATION, Path("a.json"), "way out")
    assert found["contrast"][0] == {"nfe": 1, "solver": "euler", "fd_grey": 5.5, "fd": None, "fd_sd": 0.5}
    assert list(found["results"][0]) == ["nfe", "solver", "fd_grey", "fd", "fd_sd"]
