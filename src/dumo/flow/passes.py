"""A network of anybody's as objectives call one: net(x, c, t=t, r=r ...) gives a tuple of heads.

dumo's own take x and c by place, so they are called as they are. Another's `forward` takes x first, and the time, a
second time and a condition by names of its own (`Signature`). It returns its heads as a tuple, stacked along the
channels, or in an object with `.sample`.

What runs through an objective as c are class numbers, or the rows of a `Table` of conditions, of which -1 is none.
"""

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dumo.autodiff.dual import Dual, primal
from dumo.types import Array, Cond, Heads, Needs, Time, UserError

# names that forwards of the field give their arguments; the first that is there counts
TIMES = ("t", "time", "times", "timestep", "timesteps", "sigma", "noise_labels")
ENDS = ("r", "s", "end", "time_end", "target_timestep", "r_timestep")
CONDITIONS = ("c", "y", "cond", "label", "labels", "class_label", "class_labels", "classes", "condition")
NONE = -1  # the row of a table that stands for no condition

OwnCall = Callable[..., Any]  # (net, x, t, c), with r after t where the objective has it


@dataclass(frozen=True)
class Signature:
    """The names by which a network's forward takes what it is given."""

    net: str  # its class
    time: str
    end: str | None  # the second time
    condition: str | None
    names: frozenset[str]  # of all arguments
    any_name: bool  # whether it takes further ones

    @classmethod
    def of(cls, net: nn.Module) -> "Signature | None":
        """Read a network's forward; None: it is called as dumo's own. Raises UserError where no argument is a time."""
        signature = inspect.signature(net.forward)
        parameters = list(signature.parameters.values())
        if len(parameters) > 1 and parameters[1].kind is inspect.Parameter.POSITIONAL_ONLY:
            return None
        names = [p.name for p in parameters[1:]]
        time = _first(TIMES, names)
        if time is None:
            raise UserError(
                f"{type(net).__name__}.forward({', '.join(signature.parameters)}) has no argument with a name of a "
                f"time ({', '.join(TIMES)}): rename one, or give dumo.Flow(call=lambda net, x, t, c: net(...))"
            )
        return cls(
            net=type(net).__name__,
            time=time,
            end=_first(ENDS, names),
            condition=_first(CONDITIONS, names),
            names=frozenset(names),
            any_name=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
        )

    def takes(self, name: str) -> bool:
        """Whether there is an argument of this name."""
        return name in self.names or self.any_name

    def require(self, needs: Needs, *, classes: bool) -> None:
        """Raise UserError where an objective has more to say than forward takes."""
        way = f"add or rename it, or give dumo.Flow({call_of(needs)})"
        if "r" in needs.names and self.end is None:
            raise UserError(
                f"{self.net}.forward has no second time, which this objective needs (an argument {', '.join(ENDS)}, "
                f"the time where a jump ends): {way}"
            )
        for name in needs.names:
            if name not in ("t", "r") and not self.takes(name):
                raise UserError(f"{self.net}.forward has no argument {name}, which this objective needs: {way}")
        if classes and self.condition is None:
            raise UserError(
                f"{self.net}.forward has no argument for a class ({', '.join(CONDITIONS)}): {way}, or "
                "leave out classes="
            )

    def times(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Times and knobs by the names of forward."""
        names = {"t": self.time, "r": self.end or "r"}
        return {names.get(name, name): value for name, value in inputs.items()}


@dataclass(frozen=True)
class Table:
    """Conditions (n, ...) by the argument's name, a row for each sample; and what stands for none, a row each."""

    rows: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    alone: bool = False  # whether it was given as a tensor, without a name

    def take(self, place: Int64[Tensor, " b"]) -> dict[str, Tensor]:
        """The conditions of these rows, of which NONE is the null; an argument without a null keeps its row."""
        taken: dict[str, Tensor] = {}
        none = place == NONE
        for name, rows in self.rows.items():
            some = rows[place.clamp(min=0)]
            null = self.null.get(name)
            if null is not None:
                some = torch.where(none.view(-1, *(1,) * (rows.ndim - 1)), null.to(rows), some)
            taken[name] = some
        return taken

    def double(self) -> "Table":
        """The same, its numbers in float64."""

        def of(some: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: v.double() if v.is_floating_point() else v for name, v in some.items()}

        return replace(self, rows=of(self.rows), null=of(self.null))


class Passes(nn.Module):
    """A network as objectives call it. With gradients a pass goes through what wraps it, without gradients past that.

    `call`: how it is called; None: as dumo's own. `table`: the conditions of c; None: c are class numbers, which the
    network gets if it is `labelled`. `key`: random numbers that the network draws are those of this key, so the same in
    every pass; None: they are the caller's.
    """

    def __init__(
        self,
        net: nn.Module,
        needs: Needs,
        call: Signature | OwnCall | None,
        *,
        labelled: bool,
        time_scale: float = 1.0,
        table: Table | None = None,
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
        """The same passes of another network."""
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
        """Heads of the shape of x, then gauges (b,). Raises UserError where the network returned others."""
        net = self.net if torch.is_grad_enabled() else inner(self.net)
        times = {name: value * self.time_scale for name, value in inputs.items()}
        keyed = self.key is not None and not torch.compiler.is_compiling()
        with drawing(self.key, primal(x).device) if keyed else nullcontext():
            returned = self._called(net, x, c, times)
        return heads_of(returned, x, self.needs, type(inner(self.net)).__name__)

    @property
    def described(self) -> str:
        """How the network is called, in words."""
        if not isinstance(self.call, Signature):
            return "net(x, c, t=t ...)" if self.call is None else call_of(self.needs)
        times = self.call.times(dict.fromkeys(self.needs.names))
        condition = [self.call.condition] if self.labelled and self.call.condition else []
        conditions = [*self.table.rows] if self.table else condition
        return f"net(x, {', '.join(f'{name}=' for name in (*times, *conditions))})"

    def _called(self, net: nn.Module, x: Array, c: Cond, times: dict[str, Any]) -> Any:  # noqa: ANN401
        if self.call is None:
            return net(x, c, **times)
        conditions: dict[str, Any] = {}
        if self.table is not None:
            conditions = self.table.take(c)
        elif self.labelled and isinstance(self.call, Signature) and self.call.condition:
            conditions = {self.call.condition: c}
        if isinstance(self.call, Signature):
            return net(x, **self.call.times(times), **conditions)
        given: Any = c if self.labelled else None
        if self.table is not None:
            given = next(iter(conditions.values())) if self.table.alone else conditions
        return self.call(net, x, *times.values(), given)


def call_of(needs: Needs) -> str:
    """The function by which any network can be called for an objective."""
    return f"call=lambda net, x, {', '.join(needs.names)}, c: net(...)"


def heads_of(returned: Any, x: Array, needs: Needs, net: str) -> Heads:  # noqa: ANN401
    """What a network returned as a tuple of heads and gauges. Raises UserError where it is none."""
    wanted = (*needs.heads, *needs.gauges)
    if not isinstance(returned, Tensor | Dual | tuple | list):
        returned = getattr(returned, "sample", returned)  # an output of diffusers
    if isinstance(returned, tuple | list) and len(returned) == 1:
        returned = returned[0]
    if isinstance(returned, Tensor | Dual):
        returned = _unstacked(cast(Tensor, returned), x, len(wanted))
    shapes = [tuple(x.shape)] * len(needs.heads) + [(len(x),)] * len(needs.gauges)
    if not isinstance(returned, tuple | list):
        raise UserError(
            f"{net} returned a {type(returned).__name__}: return its heads, {', '.join(wanted)}, as a tuple"
        )
    found = [tuple(head.shape) if isinstance(head, Tensor | Dual) else type(head).__name__ for head in returned]
    if found != shapes:
        stacked = f", or one tensor with {len(wanted) * x.shape[1]} channels" if len(wanted) > 1 and x.ndim > 1 else ""
        kind = "a tuple of " if len(wanted) > 1 else "a tensor of shape "
        raise UserError(
            f"{net} returned {_listed(found)}; this objective needs {_count(len(wanted), 'output')}, "
            f"{', '.join(wanted)}: {kind}{_listed(shapes)}{stacked}"
        )
    return cast(Heads, tuple(returned))


def _unstacked(returned: Tensor, x: Array, heads: int) -> tuple[Tensor, ...]:
    """The heads of one tensor: it is one, or has them along its channels."""
    if heads > 1 and x.ndim > 1 and returned.ndim == x.ndim and returned.shape[1] == heads * x.shape[1]:
        return tuple(returned.chunk(heads, 1))
    return (returned,)


def inner(net: nn.Module) -> nn.Module:
    """The network inside what averages, replicates or compiles it. (One that has a part named `module` stays.)"""
    while True:
        if isinstance(net, DataParallel | DistributedDataParallel | AveragedModel):
            net = net.module
        elif isinstance(compiled_from := net.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            net = compiled_from
        else:
            return net


@contextmanager
def drawing(key: int | None, device: torch.device) -> Generator[None, None, None]:
    """Inside, torch's own generators begin at this key; afterwards they are as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(key or 0)
        if device.type == "cuda":
            torch.cuda.manual_seed(key or 0)
        yield


def generators(device: torch.device) -> bytes:
    """Where torch's generators stand, on the CPU and on a device."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return b"".join(state.numpy().tobytes() for state in states)


def _first(known: tuple[str, ...], names: list[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _listed(shapes: list[Any]) -> str:
    return ", ".join(map(str, shapes)) or "nothing"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)
