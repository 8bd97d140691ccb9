"""An objective by its name, or by a dict of its fields."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dumo.config.load import parse
from dumo.config.tree import Parts
from dumo.types import Objective, UserError

Given = str | Mapping[str, Any] | Objective


def objective_of(given: Given) -> Objective:
    """The objective of this kind, or with these fields; one that is built stays. Raises UserError for what is none."""
    require_objective(given)
    if not isinstance(given, str | Mapping):
        return given
    fields = {"kind": given} if isinstance(given, str) else dict(given)
    objective = parse(Parts, {"objective": fields}).objective
    assert objective is not None
    return objective


def require_objective(given: object) -> None:
    """Raise UserError for what is no name, no fields and no objective."""
    if isinstance(given, type):
        raise UserError(f"{given.__name__} is a class: give an objective, {given.__name__}()")
    if isinstance(given, nn.Module):
        raise UserError("the objective is a network: the network comes first, dumo.Flow(net, 'dumo')")
    if not isinstance(given, str | Mapping | Objective):
        raise UserError(
            f"the objective is a {type(given).__name__}: give its name, a dict of its fields, or dumo.objectives.DuMo()"
        )
