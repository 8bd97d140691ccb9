"""Dual numbers: a tensor and its tangent, through model code that knows nothing of them.

`Dual(p, t)` carries a primal `p`, an ordinary tensor that autograd records as ever, and a tangent `t`, which nobody
records. It is no subclass of Tensor but answers to `__torch_function__`, so a net written with `F.linear`,
`F.layer_norm` and the like runs on it as it is: every operation does to `p` what it always does, and its rule
(`dumo.autodiff.rule`) moves `t` along. So the derivative rides on a pass that is made anyway, for the price of one
more, and the primal and its gradients keep their bits. An operation without a rule raises: never a silent zero. Where a
loss holds the derivative itself, tangents are `recorded`, too.

A tangent may also come `Later`, where the direction is known only after the pass. What will compute it is kept as
data, a function of the module and the tensors it needs, most of which autograd keeps anyway. There is no list that
everybody writes to: every Dual knows what it came from, so a compiled region or a sharded module, which takes Duals
and returns Duals, needs to know no more than that.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, Union, cast

import torch
from torch import Tensor

from dumo.autodiff.scope import held
from dumo.types import Array, UserError

Rule = Callable[..., Any]
Name = Callable[..., Any] | str  # a function of torch; as a string where a compiler hands over another object for it
RULES: dict[Name, Rule] = {}  # by what a net calls; filled by `dumo.autodiff.rule`
ALONE: set[Name] = set()  # those of them whose first operand alone may move


class _State(threading.local):
    """What holds in a thread, from its start."""

    def __init__(self) -> None:
        self.primal_only = self.recorded = False


_state = _State()


class NoRule(UserError, NotImplementedError):  # noqa: N818, a lack in the rules
    """A net uses an operation, named by the argument, for which there is no tangent rule."""

    def __str__(self) -> str:
        """The name and the way out. Not made by the constructor, which a compiler could not trace."""
        return (
            f"slope 'dual' has no tangent rule for '{self.args[0]}', which this net uses: "
            "write one beside those in dumo.autodiff.rule, or use slope 'jvp'"
        )


class Later:
    """A tangent still to come: `push(*tangents of moved, *saved)`, of this shape and dtype. Data, never a closure."""

    def __init__(
        self,
        shape: Iterable[int],
        dtype: torch.dtype,
        push: Callable[..., Tensor] | None = None,
        moved: tuple["Moved", ...] = (),
        saved: tuple[object, ...] = (),
    ) -> None:
        """Without `push` it is an input, whose value is set by hand."""
        self.shape, self.dtype, self.push, self.moved, self.saved = tuple(shape), dtype, push, moved, saved
        self.value: Tensor | None = None


Moved = Union[Tensor, Later, None]  # noqa: UP007, what an operand's tangent is; None: it does not move


@dataclass(eq=False, repr=False)  # a dataclass, because sharded modules look for tensors inside those
class Dual:
    """A primal and its tangent, of the same shape and dtype. Typed as the Tensor it stands in for, see `pair`."""

    p: Tensor
    t: Tensor | Later

    shape = property(lambda self: self.p.shape)
    dtype = property(lambda self: self.p.dtype)
    device = property(lambda self: self.p.device)
    ndim = property(lambda self: self.p.ndim)
    is_cuda = property(lambda self: self.p.is_cuda)
    requires_grad = property(lambda self: self.p.requires_grad)

    __hash__ = object.__hash__  # == compares values, as Tensor's does
    __array_priority__ = 1000  # as Tensor's: a number of numpy leaves the operation to what stands on its right

    def size(self, *axis: int, **named: int) -> Any:  # noqa: ANN401, a Size or an int, as Tensor.size
        """As the primal's."""
        return self.p.size(*axis, **named)

    def dim(self) -> int:
        """As the primal's."""
        return self.p.ndim

    def numel(self) -> int:
        """As the primal's."""
        return self.p.numel()

    def is_floating_point(self) -> bool:
        """As the primal's."""
        return self.p.is_floating_point()

    def __len__(self) -> int:
        """As the primal's."""
        return len(self.p)

    def __iter__(self) -> Iterator[Array]:
        """Row by row, as Tensor's. Python by itself would ask for rows until one is missing."""
        return iter(RULES[Tensor.unbind](self, 0))

    def __getattr__(self, name: str) -> object:
        """Raise NoRule for a method of Tensor that `dumo.autodiff.rule` does not know."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        raise NoRule(f"Tensor.{name}")

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Hand the call to the function's rule. Raises NoRule where there is none."""
        kwargs = dict(kwargs) if kwargs else {}
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        name = getattr(function, "__name__", str(function))
        key = name if name in RULES else function
        if key not in RULES or (kwargs and kwargs.pop("out", None) is not None):
            raise NoRule(f"{name} with out" if key in RULES else name)
        if key in ALONE and (_moves(args[1:]) or _moves(kwargs.values())):
            raise NoRule(f"{name} with a moving parameter")
        return RULES[key](*args, **kwargs)


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(self: Dual, *others: object) -> Any:  # noqa: ANN401, it never returns
        raise NoRule(f"Tensor.{name}")

    return refuse


# What Python would else do by itself: `x += y` as `x = x + y`, though x may be known by other names; `if x` by its len.
REFUSED = (
    "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor setitem delitem bool int float array "
    "abs pos invert floordiv rfloordiv mod rmod rpow rmatmul and rand or ror xor rxor"
)
for _name in REFUSED.split():
    setattr(Dual, f"__{_name}__", _refuse(f"__{_name}__"))


def pair(p: Tensor, t: Tensor | Later) -> Array:
    """A Dual, typed as what it stands in for: a tensor on its way through a net."""
    return cast(Array, Dual(p, t))


def primal(x: Any) -> Any:  # noqa: ANN401, numbers and None pass through
    """What an operand is without its tangent."""
    return x.p if isinstance(x, Dual) else x


def tangent(x: Any) -> Tensor | Later | None:  # noqa: ANN401, typed as a Tensor where it is a Dual
    """The tangent of what may be a Dual; None: it does not move."""
    return x.t if isinstance(x, Dual) else None


def carry(p: Tensor, push: Callable[..., Tensor], operands: tuple[object, ...], *saved: object) -> Array:
    """Pair `p` with the tangent `push(*tangents of operands, *saved)`: now if these are known, else later.

    An operand that does not move has tangent None; where none moves, `p` is returned alone. The tangent may have any
    shape that expands to p's. `push` is a function of a module: it must not close over anything.
    """
    if not _moves(operands) or _state.primal_only:  # every operation of every net comes by: no generators here
        return p
    graded = torch.is_grad_enabled()
    moved, later = [], False
    for x in operands:
        if not isinstance(x, Dual):
            moved.append(None)
            continue
        if not graded and x.p.requires_grad:
            raise NoRule(
                "a custom autograd.Function, reentrant checkpoint or no_grad block, where a Dual loses gradients"
            )
        moved.append(_tangent(x))
        later = later or isinstance(x.t, Later)
    if later:
        kept = tuple([x.detach() if isinstance(x, Tensor) else x for x in saved])
        return pair(p, Later(p.shape, p.dtype, push, tuple(moved), kept))
    if not graded or _state.recorded:
        return pair(p, _fit(push(*moved, *saved), p.shape, p.dtype))
    with torch.no_grad():
        return pair(p, _fit(push(*moved, *saved), p.shape, p.dtype))


def play(ends: Iterable[Later]) -> None:
    """Compute these tangents, and before them all that they need, each once; what is no longer needed is let go.

    Inputs must have their value. Depth first, by hand: a net is deeper than Python's stack.
    """
    stack = list(ends)
    with torch.no_grad():
        while stack:
            now = stack[-1]
            before = [m for m in now.moved if isinstance(m, Later) and m.value is None]
            if before:
                stack.extend(before)
                continue
            stack.pop()
            if now.value is None:
                assert now.push is not None, "an input of the pass was given no tangent"
                tangents = [_now(m) for m in now.moved]
                now.value = _fit(now.push(*tangents, *now.saved), now.shape, now.dtype)
                now.moved = now.saved = ()


@cache
def compiled_play() -> Callable[[Iterable[Later]], None]:
    """`play` as one graph, for nets whose blocks are compiled: where they return Duals, only data is left to play."""
    return torch.compile(play, fullgraph=True)


def holds(ends: Iterable[Later]) -> bool:
    """Whether all that these tangents need is still there: sharded weights may have been given back meanwhile."""
    stack, seen = list(ends), set[int]()
    while stack:
        now = stack.pop()
        if id(now) in seen:
            continue
        seen.add(id(now))
        if any(isinstance(x, Tensor) and x.numel() and not x.untyped_storage().size() for x in now.saved):
            return False
        stack.extend(m for m in now.moved if isinstance(m, Later))
    return True


def primal_only() -> AbstractContextManager[None]:
    """Inside, no tangent is computed: for recomputing what a checkpoint let go, whose tangents are known already."""
    return held(_state, "primal_only", True)


def recorded() -> AbstractContextManager[None]:
    """Inside, tangents that are known are recorded as primals are: for a loss that holds the derivative itself."""
    return held(_state, "recorded", True)


def recording() -> bool:
    """Whether tangents are recorded; then a rule must save what autograd can follow, and no kernel's own numbers."""
    return _state.recorded


def _moves(operands: Iterable[object]) -> bool:
    for x in operands:  # noqa: SIM110, a generator takes three times as long
        if isinstance(x, Dual):
            return True
    return False


def _tangent(x: Dual) -> Tensor | Later:
    """The tangent of an operand, in its dtype: a sharded module may have cast the primal on its way in."""
    if x.t.dtype == x.p.dtype:
        return x.t
    return Later(x.p.shape, x.p.dtype, _cast, (x.t,), (x.p.dtype,)) if isinstance(x.t, Later) else x.t.to(x.p.dtype)


def _cast(dx: Tensor, dtype: torch.dtype) -> Tensor:
    return dx.to(dtype)


def _now(moved: Moved) -> Tensor | None:
    """A tangent that is known by now; an input's may have been set in another dtype."""
    if not isinstance(moved, Later) or moved.value is None:
        return cast(Tensor | None, moved)
    return _fit(moved.value, moved.shape, moved.dtype)


def _fit(t: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tangent in the shape and dtype of its primal."""
    t = t if t.shape == shape else t.expand(shape)
    return t if t.dtype == dtype else t.to(dtype)
