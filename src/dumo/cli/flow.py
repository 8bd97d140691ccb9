"""The front door from a training loop of one's own: `dumo.Flow`."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dumo.config.objective import objective_of
from dumo.flow.condition import Null
from dumo.flow.loop import LoopFlow
from dumo.flow.null import without_drop
from dumo.types import Objective


class Flow(LoopFlow):
    """As `dumo.flow.loop.LoopFlow`; the objective may be a name, "dumo", or a dict, {"kind": "meanflow", ...}."""

    def __init__(
        self,
        net: nn.Module,
        objective: str | Mapping[str, Any] | Objective = "dumo",
        *,
        classes: int = 0,
        null: Null = None,
        **settings: Any,  # noqa: ANN401, of `dumo.flow.loop.LoopFlow`
    ) -> None:
        spec = objective_of(objective)
        if not classes and null is None:
            spec = without_drop(spec)
        super().__init__(net, spec, classes=classes, null=null, **settings)
