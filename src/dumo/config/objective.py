"""Build an objective from what Python gives: its name, a dict of its fields, or a built one (`objective_of`)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dumo.config.load import parse
from dumo.config.parts import StandaloneParts
from dumo.types import Objective, UserError

ObjectiveLike = str | Mapping[str, Any] | Objective


def objective_of(value: ObjectiveLike) -> Objective:
    """The objective of a kind, or of a dict of fields with its `kind`. One that is built is returned as it is.

    Raises UserError for anything else, and for fields that do not fit.
    """
    _require_objective(value)
    if not isinstance(value, str | Mapping):
        return value
    fields = {"kind": value} if isinstance(value, str) else dict(value)
    objective = parse(StandaloneParts, {"objective": fields}).objective
    assert objective is not None
    return objective


def _require_objective(value: object) -> None:
    """Raise UserError for a value that is neither a name, nor a dict, nor an objective."""
    if isinstance(value, type):
        raise UserError(f"{value.__name__} is a class: give an objective, {value.__name__}()")
    if isinstance(value, nn.Module):
        raise UserError("the objective is a network: the network comes first, dumo.Flow(net, 'dumo')")
    if not isinstance(value, str | Mapping | Objective):
        raise UserError(
            f"the objective is a {type(value).__name__}: give its name, a dict of its fields, or dumo.objectives.DuMo()"
        )
