"""`NetAdapter` calls a user's network as objectives call one: net(x, c, t=t, r=r) returns a tuple of heads.

The network itself is called as `net(x, t=t)`, or as `net(x, t=t, c=c)` if there are conditions; `r=r` follows t, and
the knobs of an objective follow r, by their own names. Keywords let a network have its arguments in any order, and one
with other names raises a TypeError. `call(net, x, t, c)`, a function of the user's with arguments of these names, calls
any other network. dumo's own networks take x and c by position.

Conditions are of two kinds. Labels (b,) go to the objective and to the network as they are. Of anything else, such as
the tokens of a text, the objective gets row numbers, which it drops, duplicates and picks without knowing what they
stand for; the network gets the rows behind these numbers (`ConditionRows`).
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

Condition = Tensor | Mapping[str, Tensor] | None  # labels (b,), numbers (b, ...), or tensors by name
Null = Tensor | Mapping[str, Tensor] | None  # the row that replaces a dropped condition, or one by name
CustomCall = Callable[..., Any]  # a user's function of (net, x, t, c), and of r if the objective has it


def is_labels(c: Condition) -> bool:
    """Whether conditions are class labels (b,)."""
    return isinstance(c, Tensor) and c.ndim == 1 and not c.is_floating_point()


def map_tensors(c: Condition, change: Callable[[Tensor], Tensor]) -> Condition:
    """The conditions with each tensor changed: a tensor, a dict or None, as c is."""
    if c is None:
        return None
    if isinstance(c, Tensor):
        return change(c)
    return {name: change(rows) for name, rows in c.items()}


@dataclass(frozen=True)
class ConditionRows:
    """Conditions other than labels, a row for each sample, and the row that replaces a dropped one.

    An objective gets row numbers as c (b,). Row i of n rows with its condition dropped has the number i - n, below 0.
    """

    rows: Mapping[str, Tensor]  # (n, ...), by name
    null: Mapping[str, Tensor]  # (...) or (1, ...), by name
    is_tensor: bool  # the user gave one tensor, without a name

    @classmethod
    def of(cls, c: Condition, null: Null) -> "ConditionRows":
        """The rows of conditions that are not labels. A single null replaces each of them."""
        rows = c if isinstance(c, Mapping) else {"c": cast(Tensor, c)}
        if isinstance(null, Tensor):
            null = dict.fromkeys(rows, null)
        return cls(rows, null or {}, isinstance(c, Tensor))

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def drop(self, c: Cond) -> Cond:
        """The numbers of rows c (b,) with their conditions dropped: i - n instead of i, from -n to -1."""
        return torch.where(c < 0, c, c - len(self))

    def take(self, c: Cond) -> Tensor | dict[str, Tensor]:
        """The conditions (b, ...) of the rows numbered c (b,), as the user gave them. A dropped row has the null.

        A condition without a null keeps the row's own value.
        """
        conditions: dict[str, Tensor] = {}
        is_dropped = c < 0
        for name, rows in self.rows.items():
            values = rows[c]  # also of a dropped row, because tensors count negative numbers from the end
            null = self.null.get(name)
            if null is not None:
                values = torch.where(is_dropped.view(-1, *(1,) * (rows.ndim - 1)), null.to(rows), values)
            conditions[name] = values
        return conditions["c"] if self.is_tensor else conditions

    def to(self, device: torch.device, dtype: torch.dtype) -> "ConditionRows":
        """A copy on a device, whose floats have this dtype."""

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in tensors.items()}

        return ConditionRows(moved(self.rows), moved(self.null), self.is_tensor)


class NetAdapter(nn.Module):
    """A network as objectives call it.

    A pass with gradients goes through the network's wrappers, such as DistributedDataParallel; one without gradients
    calls the network inside them.

    net: the network, in its wrappers.
    needs: the objective's, which name times and heads.
    call: a user's function that calls the network; None: by the names t, r and c, or as dumo's own.
    labelled: whether the network gets labels.
    time_scale: multiplies t and r before they reach the network.
    rows: the conditions whose row numbers c are; None: c are labels.
    key: seeds torch's generators in every pass, so all passes of a step draw the same; None: the generators continue.
        Under torch.compile, which cannot trace seeding, they continue, too.
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
        """The adapter of another network, which is called as this one."""
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
        """The heads of a pass, each of the shape of x, then the gauges, each (b,).

        Raises UserError if the network returned other shapes, which a loss would broadcast.
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
        """What the network returns for x (b, ...), c (b,) and times and knobs (b,) by name."""
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
    """Whether a network is one of dumo's own, forward(x, c, /, *, t, ...): others have no second positional-only."""
    parameters = list(inspect.signature(net.forward).parameters.values())
    return len(parameters) > 1 and parameters[1].kind is inspect.Parameter.POSITIONAL_ONLY


def heads_of(outputs: object, x: Array, needs: Needs, net: str) -> Heads:
    """What a network returned for x (b, ...), a tensor or a tuple, as a tuple: heads (b, ...), then gauges (b,).

    `net`: its class, for the message. Raises UserError for other shapes, which a loss would broadcast.
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
    """The adapter on x in the floating-point type of the network's weights; what it returns is in that of x."""
    weights = (p for p in unwrap(adapter.net).parameters() if p.is_floating_point())
    weight = next(weights, None)
    if weight is None or weight.dtype == torch.float32:
        return adapter

    def net(x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        return tuple(head.to(x.dtype) for head in adapter(x.to(weight.dtype), c, **inputs))

    return net
