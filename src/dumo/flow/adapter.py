"""`NetAdapter` adapts a user's network to the signature that objectives call: net(x, c, t=t, r=r) -> tuple of heads.

The network is called as `net(x, t=t)`, or as `net(x, t=t, c=c)` if there are conditions, with `r=r` and the objective's
knobs as further keywords. A network with other argument names needs a function `call(net, x, t, c)`. dumo's own
networks take x and c by position.

Labels (b,) are passed to the objective and to the network unchanged. For other conditions, such as text tokens, the
objective gets row numbers, which it may drop, repeat and select; the network gets the rows (`ConditionRows`).
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dumo.autodiff.dual import Dual, primal
from dumo.runtime.random import seeded_generators
from dumo.types import Array, Cond, Heads, Needs, Net, Sample, Time, UserError, unwrap

# Labels (b,), numbers (b, ...), or tensors by name.
Condition = Tensor | Mapping[str, Tensor] | None
# The row that replaces a dropped condition, or a row for each name.
Null = Tensor | Mapping[str, Tensor] | None
# A user's function of (net, x, t, c), and of r if the objective has it.
CustomCall = Callable[..., Any]


def is_labels(c: Condition) -> bool:
    """Whether conditions are class labels (b,)."""
    return isinstance(c, Tensor) and c.ndim == 1 and not c.is_floating_point()


def map_tensors(c: Condition, change: Callable[[Tensor], Tensor]) -> Condition:
    """Apply a function to each tensor of the conditions."""
    if c is None:
        return None
    if isinstance(c, Tensor):
        return change(c)
    return {name: change(rows) for name, rows in c.items()}


@dataclass(frozen=True)
class ConditionRows:
    """Conditions other than labels, one row per sample, and the row that replaces a dropped condition.

    An objective gets row numbers as c (b,). Row i of n rows has the number i - n, below 0, if its condition is dropped.

    rows: (n, ...), by name.
    null: (...) or (1, ...), by name.
    is_tensor: whether the user passed one tensor without a name.
    """

    rows: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    is_tensor: bool

    @classmethod
    def of(cls, c: Condition, null: Null) -> "ConditionRows":
        """Create the rows from conditions that are not labels. A single null is used for every name."""
        rows = c if isinstance(c, Mapping) else {"c": cast(Tensor, c)}
        if isinstance(null, Tensor):
            null = dict.fromkeys(rows, null)
        return cls(rows, null or {}, isinstance(c, Tensor))

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def drop(self, c: Cond) -> Cond:
        """Return the row numbers c (b,) with dropped conditions: i - n instead of i, from -n to -1."""
        return torch.where(c < 0, c, c - len(self))

    def take(self, c: Cond) -> Tensor | dict[str, Tensor]:
        """Return the conditions (b, ...) of the rows numbered c (b,). A dropped row gets the null, if there is one."""
        conditions: dict[str, Tensor] = {}
        is_dropped = c < 0
        for name, rows in self.rows.items():
            # The negative number i - n of a dropped row selects row i.
            values = rows[c]
            null = self.null.get(name)
            if null is not None:
                values = torch.where(is_dropped.view(-1, *(1,) * (rows.ndim - 1)), null.to(rows), values)
            conditions[name] = values
        return conditions["c"] if self.is_tensor else conditions

    def to(self, device: torch.device, dtype: torch.dtype) -> "ConditionRows":
        """Return a copy on a device, with floating-point tensors in this dtype."""

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in tensors.items()}

        return ConditionRows(moved(self.rows), moved(self.null), self.is_tensor)


class NetAdapter(nn.Module):
    """A network with the signature that objectives call.

    A pass with gradients goes through the network's wrappers, such as DistributedDataParallel; one without gradients
    calls the unwrapped network.

    net: the network, possibly wrapped.
    needs: the objective's needs, which name the times and heads.
    call: a user's function that calls the network; None means by the keywords t, r and c, or as dumo's own networks.
    labelled: whether the network gets labels.
    time_scale: a factor for t and r.
    rows: the conditions to which the row numbers c refer; None means that c are labels.
    key: a seed for torch's generators in every pass, so that all passes of a step draw the same numbers. None means not
        to seed them. It is ignored under torch.compile, which cannot trace seeding.
    """

    def __init__(
        self,
        net: nn.Module,
        needs: Needs,
        call: CustomCall | None,
        *,
        labelled: bool,
        time_scale: float = 1.0,
        rows: ConditionRows | None = None,
        key: int | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.needs = needs
        self.call = call
        self.labelled = labelled
        self.time_scale = time_scale
        self.rows = rows
        self.key = key
        self.is_dumos = takes_positional_condition(unwrap(net))

    def with_net(self, net: nn.Module) -> "NetAdapter":
        """Return an adapter with the same settings for another network."""
        return NetAdapter(
            net,
            self.needs,
            self.call,
            labelled=self.labelled,
            time_scale=self.time_scale,
            rows=self.rows,
            key=self.key,
        )

    def forward(self, x: Array, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads of a pass, each of the shape of x, then the gauges, each (b,).

        Raises UserError for other shapes, which a loss would broadcast.
        """
        net = self.net if torch.is_grad_enabled() else unwrap(self.net)
        inputs = {name: value * self.time_scale if name in ("t", "r") else value for name, value in inputs.items()}
        generators: AbstractContextManager[None] = nullcontext()
        if self.key is not None and not torch.compiler.is_compiling():
            generators = seeded_generators(self.key, primal(x).device)
        with generators:
            outputs = self._call(net, x, c, inputs)
        return heads_of(outputs, x, self.needs, type(unwrap(self.net)).__name__)

    def _call(self, net: nn.Module, x: Array, c: Cond, inputs: dict[str, Time]) -> Any:  # noqa: ANN401
        """Call the network on x (b, ...), c (b,), and the times and knobs (b,) by name."""
        condition: object = None
        if self.rows is not None:
            condition = self.rows.take(c)
        elif self.labelled:
            condition = c
        if self.call is not None:
            return self.call(net, x, **inputs, c=condition)
        if self.is_dumos:
            return net(x, c, **inputs)
        if condition is None:
            return net(x, **inputs)
        return net(x, **inputs, c=condition)


def takes_positional_condition(net: nn.Module) -> bool:
    """Whether a network has the signature of dumo's own, forward(x, c, /, *, t, ...)."""
    parameters = list(inspect.signature(net.forward).parameters.values())
    return len(parameters) > 1 and parameters[1].kind is inspect.Parameter.POSITIONAL_ONLY


def heads_of(outputs: object, x: Array, needs: Needs, net: str) -> Heads:
    """Convert a network's outputs for x (b, ...) to a tuple of heads (b, ...), then gauges (b,).

    net: the network's class, for the message.

    Raises UserError for other shapes, which a loss would broadcast.
    """
    heads = (outputs,) if isinstance(outputs, Tensor | Dual) else tuple(cast("tuple[Tensor, ...]", outputs))
    shapes = [tuple(head.shape) for head in heads]
    expected = [tuple(x.shape)] * len(needs.heads) + [(len(x),)] * len(needs.gauges)
    if shapes != expected:
        names = ", ".join((*needs.heads, *needs.gauges))
        raise UserError(
            f"net {net} returned tensors of shapes {shapes}, and the objective needs ({names}) of shapes {expected}: "
            "return a tuple of these, or give dumo.Flow(call=...)"
        )
    return cast(Heads, heads)


def in_weights_dtype(adapter: NetAdapter) -> Net:
    """Wrap an adapter so that x is cast to the dtype of the network's weights, and the heads to the dtype of x."""
    weights = (p for p in unwrap(adapter.net).parameters() if p.is_floating_point())
    weight = next(weights, None)
    if weight is None or weight.dtype == torch.float32:
        return adapter

    def net(x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        return tuple(head.to(x.dtype) for head in adapter(x.to(weight.dtype), c, **inputs))

    return net
