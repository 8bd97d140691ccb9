"""How a user's network is called: by which names its `forward` takes times and a condition.

`Signature.of` reads these names; None means that the network is dumo's own. `Signature.require` refuses a network that
lacks an argument, and `rename_inputs` gives the inputs of an objective the names of `forward`. A user who wants another
call gives a function instead, a `CustomCall`; `call_example` shows one in messages.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dumo.types import Needs, UserError

# Names of arguments in forwards of the field, in the order in which they are looked for
_TIMES = ("t", "time", "times", "timestep", "timesteps", "sigma", "noise_labels")
_END_TIMES = ("r", "s", "end", "time_end", "target_timestep", "r_timestep")
CONDITIONS = ("c", "y", "cond", "label", "labels", "class_label", "class_labels", "classes", "condition")

CustomCall = Callable[..., Any]  # a user's function (net, x, t, c); with r after t where the objective has it


@dataclass(frozen=True)
class Signature:
    """The names of the arguments of a network's forward."""

    net: str  # the network's class, for messages
    time: str  # of the argument that takes t
    end_time: str | None  # of the one that takes r, where a jump ends; None: there is none
    condition: str | None  # of the one that takes a class or a condition; None: there is none
    names: frozenset[str]  # of all arguments but the first
    takes_any_name: bool  # whether forward has **kwargs

    @classmethod
    def of(cls, net: nn.Module) -> "Signature | None":
        """Read a network's forward; None: it is one of dumo's own, which take x and c by position alone.

        Raises UserError where no argument is a time.
        """
        signature = inspect.signature(net.forward)
        parameters = list(signature.parameters.values())
        # dumo's own networks are forward(x, c, /, ...), and nobody else's have a second argument by position alone
        if len(parameters) > 1 and parameters[1].kind is inspect.Parameter.POSITIONAL_ONLY:
            return None
        names = [p.name for p in parameters[1:]]
        time = _first_known(_TIMES, names)
        if time is None:
            raise UserError(
                f"{type(net).__name__}.forward({', '.join(signature.parameters)}) has no argument with a name of a "
                f"time ({', '.join(_TIMES)}): rename one, or give dumo.Flow(call=lambda net, x, t, c: net(...))"
            )
        return cls(
            net=type(net).__name__,
            time=time,
            end_time=_first_known(_END_TIMES, names),
            condition=_first_known(CONDITIONS, names),
            names=frozenset(names),
            takes_any_name=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
        )

    def takes(self, name: str) -> bool:
        """Whether forward takes an argument of this name."""
        return name in self.names or self.takes_any_name

    def require(self, needs: Needs, *, classes: bool) -> None:
        """Raise UserError where forward has no argument for an input of the objective.

        `classes`: whether it needs one for class numbers, too.
        """
        fix = f"add or rename it, or give dumo.Flow({call_example(needs)})"
        if "r" in needs.names and self.end_time is None:
            raise UserError(
                f"{self.net}.forward has no second time, which this objective needs (an argument "
                f"{', '.join(_END_TIMES)}, the time where a jump ends): {fix}"
            )
        for name in needs.names:
            if name not in ("t", "r") and not self.takes(name):
                raise UserError(f"{self.net}.forward has no argument {name}, which this objective needs: {fix}")
        if classes and self.condition is None:
            raise UserError(
                f"{self.net}.forward has no argument for a class ({', '.join(CONDITIONS)}): {fix}, or "
                "leave out classes="
            )

    def rename_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The times and knobs by forward's names, where `inputs` has them by the objective's."""
        names = {"t": self.time, "r": self.end_time or "r"}  # `require` refuses r where it has no argument
        return {names.get(name, name): value for name, value in inputs.items()}


def call_example(needs: Needs) -> str:
    """The argument of dumo.Flow by which any network can be called for an objective, for messages."""
    return f"call=lambda net, x, {', '.join(needs.names)}, c: net(...)"


def _first_known(known: tuple[str, ...], names: list[str]) -> str | None:
    """The first of the known names that is among `names`."""
    return next((name for name in known if name in names), None)
