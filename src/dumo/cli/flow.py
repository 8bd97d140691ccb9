"""The front door from a training loop of one's own: `dumo.Flow`.

It is `dumo.flow.loop.LoopFlow`, with an objective that may be given by its name.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dumo.config.load import objective_of
from dumo.flow.loop import LoopFlow
from dumo.types import Objective


class Flow(LoopFlow):
    """A [LoopFlow][dumo.flow.loop.LoopFlow], which has all arguments and methods.

    The objective may be a name, "dumo", or a dict, {"kind": "meanflow", ...}.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: str | Mapping[str, Any] | Objective = "dumo",
        **settings: Any,  # noqa: ANN401, of `dumo.flow.loop.LoopFlow`
    ) -> None:
        super().__init__(net, objective_of(objective), **settings)
