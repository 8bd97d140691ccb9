"""`Passes`: a user's network as objectives call one. net(x, c, t=t, r=r ...) gives a tuple of heads.

dumo's own networks take x and c by position, and are called as they are. Another network's `forward` takes x first, and
the time, a second time and a condition by names of its own (`dumo.flow.signature`). It returns its heads as a tuple,
stacked along the channels, or in an object with `.sample`.

c (b,) holds class numbers, with the number of classes for a dropped one; or row numbers of a `ConditionTable`, below 0
for a dropped one. Besides the times t and r, objectives have knobs, which are further inputs (b,) by name, such as a
weight of guidance; and gauges, which are further outputs (b,), such as a log-variance.

The order of events of a pass, `Passes.forward`:

1. t and r are multiplied by `time_scale`;
2. torch's generators begin at the step's key (`dumo.runtime.random.seeded_generators`);
3. the network is called by the names of its `Signature`, with the conditions of the rows;
4. `heads_of` makes a tuple of what it returned, and refuses anything else.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from dumo.autodiff.dual import Dual, primal
from dumo.flow.conditiontable import ConditionTable
from dumo.flow.signature import CustomCall, Signature, call_example
from dumo.runtime.random import seeded_generators
from dumo.types import Array, Cond, Heads, Needs, Time, UserError, unwrap


class Passes(nn.Module):
    """A network as objectives call it.

    A pass with gradients goes through the network's wrappers, such as DistributedDataParallel; one without gradients
    calls the network inside them.

    net: the network, in its wrappers.
    needs: the objective's, which name times and heads.
    call: how the network is called: by the names of its forward, by a user's function, or (None) as dumo's own.
    labelled: whether it gets class numbers.
    time_scale: multiplies t and r on their way to the network.
    table: the conditions whose rows c numbers; None: c are class numbers.
    key: seeds torch's generators in every pass, so all passes draw the same; None: the generators go on. In
        torch.compile they go on, too, because it cannot trace their seeding.
    """

    def __init__(
        self,
        net: nn.Module,
        needs: Needs,
        call: Signature | CustomCall | None,
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

    def with_net(self, net: nn.Module) -> "Passes":
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
        inputs = {name: value * self.time_scale if name in ("t", "r") else value for name, value in inputs.items()}
        generators: AbstractContextManager[None] = nullcontext()
        if self.key is not None and not torch.compiler.is_compiling():
            generators = seeded_generators(self.key, primal(x).device)
        with generators:
            returned = self._call(net, x, c, inputs)
        return heads_of(returned, x, self.needs, type(unwrap(self.net)).__name__)

    @property
    def call_description(self) -> str:
        """How the network is called, for messages, such as "net(x, t=, y=)"."""
        if self.call is None:
            return "net(x, c, t=t ...)"
        if not isinstance(self.call, Signature):
            return call_example(self.needs)
        arguments = list(self.call.rename_inputs(dict.fromkeys(self.needs.names)))
        if self.table:
            arguments += self.table.rows
        elif self.labelled and self.call.condition:
            arguments.append(self.call.condition)
        return f"net(x, {', '.join(f'{name}=' for name in arguments)})"

    def _call(self, net: nn.Module, x: Array, c: Cond, inputs: dict[str, Any]) -> Any:  # noqa: ANN401
        """What the network returns for x (b, ...), c (b,) and times and knobs (b,) by name."""
        if self.call is None:
            return net(x, c, **inputs)
        if isinstance(self.call, Signature):
            return net(x, **self.call.rename_inputs(inputs), **self._named_conditions(c, self.call))
        inputs_in_order = [inputs[name] for name in self.needs.names]
        return self.call(net, x, *inputs_in_order, self._condition_as_given(c))

    def _named_conditions(self, c: Cond, signature: Signature) -> dict[str, Tensor]:
        """The conditions of rows c (b,) by the names of the network's arguments; {} where it gets none."""
        if self.table is not None:
            return self.table.take(c)
        if self.labelled and signature.condition:
            return {signature.condition: c}
        return {}

    def _condition_as_given(self, c: Cond) -> Any:  # noqa: ANN401, of the user's
        """The condition of rows c (b,) as the user gave it: class numbers, a tensor, or tensors by name; None: none."""
        if self.table is None:
            return c if self.labelled else None
        conditions = self.table.take(c)
        if self.table.is_unnamed:
            (condition,) = conditions.values()
            return condition
        return conditions


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
        fix = f"a tuple of {_join_shapes(shapes)}"
        if len(names) == 1:
            count = "1 output"
            fix = f"a tensor of shape {_join_shapes(shapes)}"
        elif x.ndim > 1:
            fix += f", or one tensor with {len(names) * x.shape[1]} channels"
        raise UserError(
            f"{net} returned {_join_shapes(returned_shapes)}; this objective needs {count}, {', '.join(names)}: {fix}"
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


def _join_shapes(shapes: list[Any]) -> str:
    """Shapes as a list of a message."""
    return ", ".join(map(str, shapes)) or "nothing"
