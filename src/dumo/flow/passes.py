"""`Passes`: a user's network as objectives call one. net(x, c, t=t, r=r ...) gives a tuple of heads.

dumo's own networks take x and c by position, and are called as they are. Another network's `forward` takes x first, and
the time, a second time and a condition by names of its own (`Signature`). It returns its heads as a tuple, stacked
along the channels, or in an object with `.sample`.

What runs through an objective as c are class numbers, or numbers of rows of a `ConditionTable`, below 0 where dropped.

The order of events of a pass, `Passes.forward`:

1. the times are multiplied by `time_scale`;
2. torch's generators begin at the step's key (`seeded_generators`);
3. the network is called by the names of its `Signature`, with the conditions of the rows;
4. `heads_of` makes a tuple of what it returned, and refuses anything else.

`call_of` is for messages, `generator_states` for the check of a network (`dumo.flow.check`).
"""

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dumo.autodiff.dual import Dual, primal
from dumo.types import Array, Cond, Heads, Needs, Time, UserError, unwrap

# Names of arguments in forwards of the field, in the order in which they are looked for
_TIMES = ("t", "time", "times", "timestep", "timesteps", "sigma", "noise_labels")
_END_TIMES = ("r", "s", "end", "time_end", "target_timestep", "r_timestep")
CONDITIONS = ("c", "y", "cond", "label", "labels", "class_label", "class_labels", "classes", "condition")

OwnCall = Callable[..., Any]  # a user's function (net, x, t, c); with r after t where the objective has it


@dataclass(frozen=True)
class Signature:
    """The names of the arguments of a network's forward."""

    net: str  # the network's class, for messages
    time: str
    end: str | None  # the second time; None: there is no such argument
    condition: str | None  # None: there is no such argument
    names: frozenset[str]  # of all arguments but the first
    takes_any_name: bool  # whether forward has **kwargs

    @classmethod
    def of(cls, net: nn.Module) -> "Signature | None":
        """Read a network's forward; None: it is one of dumo's own, which take x and c by position alone.

        Raises UserError where no argument is a time.
        """
        signature = inspect.signature(net.forward)
        parameters = list(signature.parameters.values())
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
            end=_first_known(_END_TIMES, names),
            condition=_first_known(CONDITIONS, names),
            names=frozenset(names),
            takes_any_name=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
        )

    def takes(self, name: str) -> bool:
        """Whether there is an argument of this name."""
        return name in self.names or self.takes_any_name

    def require(self, needs: Needs, *, classes: bool) -> None:
        """Raise UserError where forward has no argument for an input of the objective.

        `classes`: whether it needs one for class numbers, too.
        """
        fix = f"add or rename it, or give dumo.Flow({call_of(needs)})"
        if "r" in needs.names and self.end is None:
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

    def times(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The times and knobs by forward's names, where `inputs` has them by the objective's."""
        names = {"t": self.time, "r": self.end or "r"}
        return {names.get(name, name): value for name, value in inputs.items()}


@dataclass(frozen=True)
class ConditionTable:
    """Conditions that are no class numbers, a row for each sample."""

    rows: Mapping[str, Tensor]  # (n, ...), by the name of the network's argument
    null: Mapping[str, Tensor]  # what stands for no condition, one row (...) or (1, ...), by name
    is_unnamed: bool = False  # whether it was given as one tensor, without a name

    def dropped(self, c: Cond) -> Cond:
        """Row numbers c (b,) that say that the conditions are dropped: i - n instead of i, from -n to -1."""
        num_rows = len(next(iter(self.rows.values())))
        return torch.where(c < 0, c, c - num_rows)

    def take(self, c: Cond) -> dict[str, Tensor]:
        """The conditions (b, ...) of the rows numbered c (b,), by name: those of a dropped row are the null.

        An argument without a null keeps the row's own value.
        """
        conditions: dict[str, Tensor] = {}
        is_dropped = c < 0
        for name, rows in self.rows.items():
            values = rows[c]  # also of a dropped row, because tensors count negative numbers from the end
            null = self.null.get(name)
            if null is not None:
                values = torch.where(is_dropped.view(-1, *(1,) * (rows.ndim - 1)), null.to(rows), values)
            conditions[name] = values
        return conditions

    def double(self) -> "ConditionTable":
        """A copy whose floats are float64."""
        return replace(self, rows=_in_float64(self.rows), null=_in_float64(self.null))


def _in_float64(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of floats in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


class Passes(nn.Module):
    """A network as objectives call it.

    A pass with gradients goes through the network's wrappers, such as DistributedDataParallel; one without gradients
    calls the network inside them.

    net: the network, in its wrappers.
    needs: the objective's, which name times and heads.
    call: how the network is called; None: as dumo's own.
    labelled: whether it gets class numbers.
    time_scale: multiplies each time and knob on its way to the network.
    table: the conditions whose rows c numbers; None: c are class numbers.
    key: seeds torch's generators in every pass, so all passes draw the same; None: the generators go on.
    """

    def __init__(
        self,
        net: nn.Module,
        needs: Needs,
        call: Signature | OwnCall | None,
        *,
        labelled: bool,
        time_scale: float = 1.0,
        table: ConditionTable | None = None,
        key: int | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.needs = needs
        self.call = call
        self.labelled = labelled
        self.time_scale = time_scale
        self.table = table
        self.key = key

    def of(self, net: nn.Module) -> "Passes":
        """Passes of another network, called as this one."""
        return Passes(
            net,
            self.needs,
            self.call,
            labelled=self.labelled,
            time_scale=self.time_scale,
            table=self.table,
            key=self.key,
        )

    def forward(self, x: Array, c: Cond, /, **inputs: Time) -> Heads:
        """The heads of a pass, each of the shape of x, then the gauges, each (b,).

        Raises UserError where the network returned anything else.
        """
        net = self.net if torch.is_grad_enabled() else unwrap(self.net)
        times = {name: value * self.time_scale for name, value in inputs.items()}
        generators: AbstractContextManager[None] = nullcontext()
        if self.key is not None and not torch.compiler.is_compiling():
            generators = seeded_generators(self.key, primal(x).device)
        with generators:
            returned = self._call(net, x, c, times)
        return heads_of(returned, x, self.needs, type(unwrap(self.net)).__name__)

    @property
    def described(self) -> str:
        """How the network is called, for messages, such as "net(x, t=, y=)"."""
        if self.call is None:
            return "net(x, c, t=t ...)"
        if not isinstance(self.call, Signature):
            return call_of(self.needs)
        arguments = list(self.call.times(dict.fromkeys(self.needs.names)))
        if self.table:
            arguments += self.table.rows
        elif self.labelled and self.call.condition:
            arguments.append(self.call.condition)
        return f"net(x, {', '.join(f'{name}=' for name in arguments)})"

    def _call(self, net: nn.Module, x: Array, c: Cond, times: dict[str, Any]) -> Any:  # noqa: ANN401
        """What the network returns: called as dumo's own, by the names of its forward, or by the user's function."""
        if self.call is None:
            return net(x, c, **times)
        conditions: dict[str, Any] = {}
        if self.table is not None:
            conditions = self.table.take(c)
        elif self.labelled and isinstance(self.call, Signature) and self.call.condition:
            conditions = {self.call.condition: c}
        if isinstance(self.call, Signature):
            return net(x, **self.call.times(times), **conditions)
        condition: Any = None
        if self.table is not None and self.table.is_unnamed:
            condition = next(iter(conditions.values()))
        elif self.table is not None:
            condition = conditions
        elif self.labelled:
            condition = c
        times_in_order = [times[name] for name in self.needs.names]
        return self.call(net, x, *times_in_order, condition)


def call_of(needs: Needs) -> str:
    """The argument of dumo.Flow by which any network can be called for an objective, for messages."""
    return f"call=lambda net, x, {', '.join(needs.names)}, c: net(...)"


def heads_of(returned: Any, x: Array, needs: Needs, net: str) -> Heads:  # noqa: ANN401
    """What a network returned for x (b, ...) as a tuple: heads (b, ...), then gauges (b,).

    `net`: its class, for messages. Raises UserError where it returned anything else.
    """
    names = (*needs.heads, *needs.gauges)
    # one form for all: a tuple of outputs
    if not isinstance(returned, Tensor | Dual | tuple | list):
        returned = getattr(returned, "sample", returned)  # an output of diffusers
    if isinstance(returned, tuple | list) and len(returned) == 1:
        returned = returned[0]
    if isinstance(returned, Tensor | Dual):
        returned = _unstack_heads(cast(Tensor, returned), x, len(names))

    # compare its shapes with those that the objective needs
    shapes = [tuple(x.shape)] * len(needs.heads) + [(len(x),)] * len(needs.gauges)
    if not isinstance(returned, tuple | list):
        raise UserError(f"{net} returned a {type(returned).__name__}: return its heads, {', '.join(names)}, as a tuple")
    returned_shapes = [_shape_or_type(head) for head in returned]
    if returned_shapes != shapes:
        count = f"{len(names)} outputs"
        fix = f"a tuple of {_listed(shapes)}"
        if len(names) == 1:
            count = "1 output"
            fix = f"a tensor of shape {_listed(shapes)}"
        elif x.ndim > 1:
            fix += f", or one tensor with {len(names) * x.shape[1]} channels"
        raise UserError(
            f"{net} returned {_listed(returned_shapes)}; this objective needs {count}, {', '.join(names)}: {fix}"
        )
    return cast(Heads, tuple(returned))


def _shape_or_type(head: object) -> tuple[int, ...] | str:
    """The shape of a tensor; of anything else the name of its type."""
    if isinstance(head, Tensor | Dual):
        return tuple(head.shape)
    return type(head).__name__


def _unstack_heads(returned: Tensor, x: Array, heads: int) -> tuple[Tensor, ...]:
    """The heads that a tensor (b, heads * channels, ...) holds along axis 1; a tensor of another shape alone."""
    if heads > 1 and x.ndim > 1 and returned.ndim == x.ndim and returned.shape[1] == heads * x.shape[1]:
        return tuple(returned.chunk(heads, 1))
    return (returned,)


@contextmanager
def seeded_generators(key: int | None, device: torch.device) -> Generator[None, None, None]:
    """Inside, torch's generators of the CPU and of a GPU begin at this key (None: 0); afterwards they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(key or 0)
        if device.type == "cuda":
            torch.cuda.manual_seed(key or 0)
        yield


def generator_states(device: torch.device) -> bytes:
    """The states of torch's generators, on the CPU and on a device, as bytes to compare."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return b"".join(state.numpy().tobytes() for state in states)


def _first_known(known: tuple[str, ...], names: list[str]) -> str | None:
    """The first of the known names that is among `names`."""
    return next((name for name in known if name in names), None)


def _listed(shapes: list[Any]) -> str:
    return ", ".join(map(str, shapes)) or "nothing"
