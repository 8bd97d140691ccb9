"""Dual numbers: a tensor and its tangent, through model code that knows nothing of them.

`Dual(p, t)` carries a primal `p`, an ordinary tensor that autograd records as ever, and a tangent `t`, which nobody
records. It is no subclass of Tensor but answers to `__torch_function__`, so a net written with `F.linear`,
`F.layer_norm` and the like runs on it as it is: every operation does to `p` what it always does, and its rule
(`dumo.autodiff.rule`) moves `t` along. So the derivative rides on a pass that is made anyway, for the price of one
more, and the primal and its gradients keep their bits. An operation without a rule has torch's own derivative
(`dumo.autodiff.general`), or raises: never a silent zero. Where a loss holds the derivative itself, tangents are
`recorded`, too.

A Dual whose tangent is None rests. `zeros_like` and its kin give one, for a net may assign to it what moves. Until then
every operation takes its primal alone, so nothing downstream pays for a tangent of zeros.

A tangent may also come `Later`, where the direction is known only after the pass (`dumo.autodiff.tape`). What will
compute it is kept as data, a function of the module and the tensors it needs, most of which autograd keeps anyway.
There is no list that everybody writes to: every Dual knows what it came from, so a compiled region or a sharded module,
which takes Duals and returns Duals, needs to know no more than that.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_flatten, tree_map, tree_unflatten

from dumo.autodiff import general
from dumo.autodiff.error import NoRule as NoRule
from dumo.autodiff.tape import Later, fit, keep
from dumo.types import Array

Rule = Callable[..., Any]
Name = Callable[..., Any] | str  # a function of torch; as a string where a compiler hands over another object for it
RULES: dict[Name, Rule] = {}  # by what a net calls; filled by `dumo.autodiff.rule`
ALONE: set[Name] = set()  # those of them whose first operand alone may move


class _State(threading.local):
    """What holds in a thread, from its start: a name that came later would make a compiler begin again."""

    def __init__(self) -> None:
        self.primal_only = False


_state = _State()


@dataclass(eq=False, repr=False)  # a dataclass, because sharded modules look for tensors inside those
class Dual:
    """A primal and its tangent, of the same shape and dtype. Typed as the Tensor it stands in for, see `pair`."""

    p: Tensor
    t: Tensor | Later | None  # None: it rests
    part: bool = False  # a view of another Dual, which would have to see what is assigned to this one
    recorded: bool = False  # autograd records the tangent, too, for a loss that holds the derivative itself

    shape = property(lambda self: self.p.shape)
    dtype = property(lambda self: self.p.dtype)
    device = property(lambda self: self.p.device)
    ndim = property(lambda self: self.p.ndim)
    is_cuda = property(lambda self: self.p.is_cuda)
    requires_grad = property(lambda self: self.p.requires_grad)
    _base = property(lambda self: self.p._base)  # sharded modules warn of views

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

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> object:
        """On the primal, whose gradient it is: sharded modules ask for their weights by it."""
        return self.p.register_hook(hook)

    def __len__(self) -> int:
        """As the primal's."""
        return len(self.p)

    def __iter__(self) -> Iterator[Array]:
        """Row by row, as Tensor's. Python by itself would ask for rows until one is missing."""
        return iter(RULES[Tensor.unbind](self, 0))

    def __getattr__(self, name: str) -> object:
        """What the primal has; of a method without a rule, and of a view such as `.T`, as `differentiate`."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        if name in general.LOSES and self.t is not None:
            raise NoRule(f"Tensor.{name}, which loses the tangent")
        method = getattr(Tensor, name)
        if callable(method):
            return partial(differentiate if self.t is not None else _still, method, self)
        value = getattr(self.p, name)
        if self.t is None or not isinstance(value, Tensor):
            return value
        return differentiate(attrgetter(name), self)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Hand the call to the function's rule, or to `differentiate` where there is none and an operand moves."""
        kwargs = dict(kwargs) if kwargs else {}
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        name = getattr(function, "__name__", str(function))
        key = name if name in RULES else function
        out = kwargs.pop("out", None) if kwargs else None
        if key not in RULES or out is not None:
            if out is not None and _move_somewhere((args, kwargs, out)):
                raise NoRule(f"{name} with out")
            if _move_somewhere((args, kwargs)):
                return differentiate(function, *args, **kwargs)
            return _still(function, *args, **kwargs, **({} if out is None else {"out": out}))
        if key in ALONE and not (_no_dual(args[1:]) and _no_dual(kwargs.values())):
            if _move_somewhere((args[1:], kwargs)):
                return differentiate(function, *args, **kwargs)
            if not _move_somewhere(args[:1]):
                return _still(function, *args, **kwargs)
            args = (args[0], *map(primal, args[1:]))
            kwargs = {name: primal(x) for name, x in kwargs.items()}
        return RULES[key](*args, **kwargs)


def _still(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, whatever torch gives
    """The function where nothing moves. What it does in place to a Dual it gives back as that."""
    args_, kwargs = tree_map(primal, args), tree_map(primal, kwargs)
    out = function(*args_, **kwargs)
    return args[0] if args and out is args_[0] else out


def differentiate(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, whatever torch gives
    """A call of torch where some operands move and no rule says how: exact, or NoRule (`dumo.autodiff.general`)."""
    reason = general.fault(function, args, kwargs)
    if reason:
        raise NoRule(reason)
    leaves, spec = tree_flatten((args, kwargs))
    place = tuple(i for i, x in enumerate(leaves) if isinstance(x, Dual))
    if any(leaves[i].recorded for i in place):  # torch's own gradient of such a tangent is wrong for some norms
        raise NoRule(f"{general.name_of(function)}, in a loss that holds the derivative itself")
    primals = [primal(x) for x in leaves]
    args_, kwargs_ = tree_unflatten(primals, spec)
    before = general.state_of(primals)
    results, results_spec = tree_flatten(function(*args_, **kwargs_))
    if general.state_of(primals) != before:  # the tangent's own call would write, or draw, once more
        raise NoRule(f"{general.name_of(function)}, which draws random numbers or changes an operand")
    if not any(isinstance(result, Tensor) for result in results):  # strides and the like
        return tree_unflatten(results, results_spec)
    if not any(map(general.differentiable, results)):
        raise NoRule(f"{general.name_of(function)}, whose result has no derivative")
    moved = tuple(leaves[i] for i in place)
    for k, p in enumerate(results):
        operand = next((leaves[i] for i in place if primals[i] is p), None)
        if operand is not None:  # not another: what is assigned to the one must be seen in the other
            results[k] = operand
        elif general.differentiable(p):
            call = general.Call(function, spec, place, k)
            results[k] = carry(p, general.tangent, moved, call, *primals)
            if isinstance(results[k], Dual):
                results[k].part = general.shares(p, primals)
    return tree_unflatten(results, results_spec)


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(self: Dual, *others: object) -> Any:  # noqa: ANN401, as Tensor's
        if _move_somewhere((self, others)) or not hasattr(Tensor, name):
            raise NoRule(f"Tensor.{name}")
        return _still(getattr(Tensor, name), self, *others)

    return refuse


# What Python would else do by itself: `x += y` as `x = x + y`, though x may be known by other names; `if x` by its len.
# Of what moves it is refused.
REFUSED = (
    "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor delitem bool int float array "
    "invert floordiv rfloordiv and rand or ror xor rxor"
)
for _name in REFUSED.split():
    setattr(Dual, f"__{_name}__", _refuse(f"__{_name}__"))


def _general(name: str) -> Callable[..., Any]:
    def operator(self: Dual, *others: object) -> Any:  # noqa: ANN401, as Tensor's
        return (differentiate if _move_somewhere((self, others)) else _still)(getattr(Tensor, name), self, *others)

    return operator


for _name in ["pos", "mod", "rmod", "rmatmul"]:  # what Python asks the class for
    setattr(Dual, f"__{_name}__", _general(f"__{_name}__"))


def pair(p: Tensor, t: Tensor | Later | None, *, recorded: bool = False) -> Array:
    """A Dual, typed as what it stands in for: a tensor on its way through a net.

    `recorded`: autograd records its tangent, and those that follow from it, as it does primals.
    """
    return cast(Array, Dual(p, t, recorded=recorded))


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
    moved, later, recorded = [], False, False
    for x in operands:
        if not isinstance(x, Dual) or x.t is None:
            moved.append(None)
            continue
        if not graded and x.p.requires_grad:
            raise NoRule(
                "a custom autograd.Function, reentrant checkpoint or no_grad block, where a Dual loses gradients"
            )
        moved.append(_tangent(x.p, x.t))
        later, recorded = later or isinstance(x.t, Later), recorded or x.recorded
    if later:
        return pair(p, Later(p.shape, p.dtype, push, tuple(moved), *keep(saved)))
    if not graded or recorded:
        return pair(p, fit(push(*moved, *saved), p.shape, p.dtype), recorded=recorded)
    with torch.no_grad():
        return pair(p, fit(push(*moved, *saved), p.shape, p.dtype))


@contextmanager
def primal_only() -> Generator[None, None, None]:
    """Inside, no tangent is computed: for recomputing what a checkpoint let go, whose tangents are known already.

    A state of the thread, not an argument: torch's checkpoint calls a block again by itself, with the inputs of the
    first call, and takes nothing but contexts. One that is forgotten costs time and changes nothing.
    """
    before, _state.primal_only = _state.primal_only, True
    try:
        yield
    finally:
        _state.primal_only = before


def _moves(operands: Iterable[object]) -> bool:
    for x in operands:  # noqa: SIM110, a generator takes three times as long
        if isinstance(x, Dual) and x.t is not None:
            return True
    return False


def _no_dual(operands: Iterable[object]) -> bool:
    for x in operands:  # noqa: SIM110, as above
        if isinstance(x, Dual):
            return False
    return True


def _move_somewhere(operands: object) -> bool:
    """Whether one of them moves, or of what they hold."""
    return tree_any(_is_moving, operands)


def _is_moving(x: object) -> bool:
    return isinstance(x, Dual) and x.t is not None


def _tangent(p: Tensor, t: Tensor | Later) -> Tensor | Later:
    """The tangent of an operand, in its dtype: a sharded module may have cast the primal on its way in."""
    if t.dtype == p.dtype:
        return t
    return Later(p.shape, p.dtype, _cast, (t,), (p.dtype,)) if isinstance(t, Later) else t.to(p.dtype)


def _cast(dx: Tensor, dtype: torch.dtype) -> Tensor:
    return dx.to(dtype)


OPERATORS = (
    "abs add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg getitem setitem eq ne lt le gt ge"
)


METHODS: dict[Name, list[str]] = {}  # the names that Tensor knows a function by
for _name in dir(Tensor):
    if callable(_f := getattr(Tensor, _name)) and (not _name.startswith("__") or _name.strip("_") in OPERATORS.split()):
        METHODS.setdefault(_f, []).append(_name)


def rule(*functions: Name) -> Callable[[Rule], Rule]:
    """Make the decorated function the rule of these functions of torch; of methods of Tensor, a method of Dual too.

    Where an argument is annotated as Dual, it is the first, and no other may move.
    """

    def register(f: Rule) -> Rule:
        for function in functions:
            RULES[function] = f
            if Dual in f.__annotations__.values():
                ALONE.add(function)
            for name in METHODS.get(function, ()):
                setattr(Dual, name, f)
        return f

    return register


def elsewhere(name: str, inplace: bool) -> None:
    """Raise NoRule where the result is to overwrite the input, which other Duals may be views of."""
    if inplace:
        raise NoRule(f"{name} with inplace=True")
