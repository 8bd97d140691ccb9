"""Dual numbers: a net that is written for tensors runs on tensors that carry their derivative along.

`Dual(p, t)` has a primal `p`, an ordinary tensor that autograd records as ever, and a tangent `t`, which nobody
records. It is no subclass of Tensor but answers to `__torch_function__`, so a net written with `F.linear`,
`F.layer_norm` and the like runs on it as it is. An operation on Duals goes like this:

1. `Dual.__torch_function__` finds the operation's rule in `RULES`.
2. The rule (`dumo.autodiff.rule`) makes the primal by the very call of the net, and names the function that computes
   the tangent. So the primal and its gradients keep their bits, and the derivative costs one more pass.
3. `carry` pairs both. It computes the tangent at once, or, where the direction is known only after the pass, keeps what
   the tangent needs as a `Later` (`dumo.autodiff.tape`).

An operation without a rule gets torch's own derivative (`differentiate`), or raises NoRule: never a silent zero.

An operand moves if it has a tangent. A Dual whose tangent is None rests: `zeros_like` and its kin give one, for a net
may assign to it what moves. Until then every operation takes its primal alone, so nothing downstream pays for zeros.

There is no list of operations that everybody writes to: every Dual knows what it came from. So a compiled region or a
sharded module, which takes Duals and returns Duals, needs to know no more than that.

Entrances: `pair` makes a Dual, `primal` and `tangent` take it apart. Rules use `rule`, `carry`, `differentiate` and
`refuse_inplace`. `primal_only` is for what recomputes a checkpoint. `teach_others`, called before a pass, makes
`torch.is_tensor`, einops and torch's checkpoint accept Duals.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from operator import attrgetter
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_flatten, tree_leaves, tree_map, tree_unflatten

from dumo.autodiff import general
from dumo.autodiff.general import NoRecordedRule
from dumo.autodiff.general import NoRule as NoRule
from dumo.autodiff.tape import Later, detach_saved, fit_to_primal
from dumo.types import Array, UserError

Rule = Callable[..., Any]
_Operation = Callable[..., Any] | str  # a function of torch; its name where a compiler hands over another object for it
RULES: dict[_Operation, Rule] = {}  # by the operation that a net calls; filled by `rule`
FIRST_OPERAND_ONLY: set[_Operation] = set()  # operations whose rule lets the first operand alone move

# Dunder methods of Tensor that a rule may be registered for, without the underscores.
_OPERATORS = (
    "abs add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg getitem setitem eq ne lt le gt ge"
)
# Refused of a Dual that moves, because Python would do something else by itself: for `x += y`, x = x + y, though x may
# be known by other names; for `if x`, look at its length.
_REFUSED_OPERATORS = (
    "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor delitem bool int float array "
    "invert floordiv rfloordiv and rand or ror xor rxor"
)
# What code that asks for a Tensor may raise on a Dual. A lack of tangents is a RuntimeError, too (`NoRule`).
RAISED_ON_DUALS = (TypeError, AttributeError, AssertionError, ValueError, RuntimeError)
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}
_OPERATORS_WITHOUT_RULE = ("pos", "mod", "rmod", "rmatmul")  # Python asks the class for them, not `__getattr__`

METHOD_NAMES: dict[_Operation, list[str]] = {}  # the names that Tensor knows a function by
for _name in dir(Tensor):
    _method = getattr(Tensor, _name)
    if callable(_method) and (not _name.startswith("__") or _name.strip("_") in _OPERATORS.split()):
        METHOD_NAMES.setdefault(_method, []).append(_name)


class _ThreadState(threading.local):
    """The state of a thread, whole from its start: a field that came later would make a compiler begin again."""

    def __init__(self) -> None:
        self.primal_only = False


_state = _ThreadState()


class _Unassignable:
    """An attribute of Dual that is read as of a Tensor, and raises NoRule where it is assigned to."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, dual: "Dual | None", owner: type) -> object:
        if dual is None:
            raise AttributeError(self.name)  # a dataclass asks the class for defaults
        return dual.__getattr__(self.name)

    def __set__(self, dual: "Dual", value: object) -> None:
        raise NoRule(f"assignment to Tensor.{self.name}")


@dataclass(eq=False, repr=False)  # a dataclass, because sharded modules look for tensors inside those
class Dual:
    """A primal and its tangent, of one shape and dtype. `pair` makes it, typed as the Tensor that it stands in for."""

    p: Tensor  # the primal
    t: Tensor | Later | None  # the tangent; None: the Dual rests
    base: "Dual | None" = None  # the Dual of which this one is a view, which would have to see what is assigned here
    recorded: bool = False  # autograd records the tangent, too, for a loss that holds the derivative itself
    under_grad: bool = False  # gradients were recorded when it was made, or something that it was made of
    views: "list[weakref.ref[Dual]]" = field(default_factory=list)

    shape = property(lambda self: self.p.shape)
    dtype = property(lambda self: self.p.dtype)
    device = property(lambda self: self.p.device)
    ndim = property(lambda self: self.p.ndim)
    is_cuda = property(lambda self: self.p.is_cuda)
    requires_grad = property(lambda self: self.p.requires_grad)
    _base = property(lambda self: self.p._base)  # sharded modules warn of views

    # What autograd would have to follow, and does not.
    data = _Unassignable("data")
    real = _Unassignable("real")
    imag = _Unassignable("imag")

    __hash__ = object.__hash__  # == compares values, as Tensor's does
    __array_priority__ = 1000  # as Tensor's: a number of numpy leaves the operation to what stands on its right

    def size(self, *axis: int, **named: int) -> Any:  # noqa: ANN401, a Size or an int, as Tensor.size
        """The primal's size, or that of one axis."""
        return self.p.size(*axis, **named)

    def dim(self) -> int:
        """The primal's number of axes."""
        return self.p.ndim

    def numel(self) -> int:
        """The primal's number of elements."""
        return self.p.numel()

    def is_floating_point(self) -> bool:
        """Whether the primal holds floats."""
        return self.p.is_floating_point()

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> object:
        """Call `hook` with the primal's gradient: sharded modules ask for their weights by it."""
        return self.p.register_hook(hook)

    def __len__(self) -> int:
        """The length of the primal's first axis."""
        return len(self.p)

    def __iter__(self) -> Iterator[Array]:
        """The rows, each a Dual. Python by itself would ask for rows until one is missing."""
        return iter(RULES[Tensor.unbind](self, 0))

    def __getattr__(self, name: str) -> object:
        """An attribute of the primal; a method without a rule, or a view such as `.T`, through `differentiate`.

        Raises NoRule for a method that would lose the tangent, such as `detach`.
        """
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        has_tangent = self.t is not None
        if has_tangent and name in general.LOSE_TANGENT:
            raise NoRule(f"Tensor.{name}, which loses the tangent")
        method = getattr(Tensor, name)
        if callable(method):
            return partial(_call_method, method, self)
        value = getattr(self.p, name)
        if has_tangent and isinstance(value, Tensor):
            return differentiate(attrgetter(name), self)
        return value

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Hand the call to the function's rule, or to `differentiate` where it has none and an operand moves."""
        kwargs = dict(kwargs) if kwargs else {}
        if "input" in kwargs:  # rules name their first operand otherwise
            args = (kwargs.pop("input"), *args)
        for numpy_name, torch_name in _NUMPY_NAMES.items():  # which torch takes, too
            if numpy_name in kwargs:
                kwargs[torch_name] = kwargs.pop(numpy_name)
        name = getattr(function, "__name__", str(function))
        out = kwargs.pop("out", None)
        if out is not None:
            if _tree_has_tangent((args, kwargs, out)):
                raise NoRule(f"{name} with out")
            return _call_on_primals(function, *args, **kwargs, out=out)
        key = name if name in RULES else function
        if key not in RULES:
            return _call_without_rule(function, args, kwargs)
        if key in FIRST_OPERAND_ONLY and not (_has_no_dual(args[1:]) and _has_no_dual(kwargs.values())):
            if _tree_has_tangent((args[1:], kwargs)):
                return differentiate(function, *args, **kwargs)
            if not _tree_has_tangent(args[:1]):
                return _call_on_primals(function, *args, **kwargs)
            args = (args[0], *map(primal, args[1:]))
            kwargs = {name: primal(x) for name, x in kwargs.items()}
        return RULES[key](*args, **kwargs)


def _call_method(method: Callable[..., Any], *args: Any, **kwargs: Any) -> object:  # noqa: ANN401, torch's results
    """Call a method of Tensor as torch would: any operand may move, also where the first one rests."""
    return Dual.__torch_function__(method, (), args, kwargs)


def _call_on_primals(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, torch's results
    """Call a function where nothing moves. If it returns its first operand, that operand is returned as the Dual."""
    primal_args = tree_map(primal, args)
    primal_kwargs = tree_map(primal, kwargs)
    out = function(*primal_args, **primal_kwargs)
    if args and out is primal_args[0]:
        return args[0]
    return out


def _call_without_rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """Call a function that has no rule: with torch's derivative where an operand moves."""
    if _tree_has_tangent((args, kwargs)):
        return differentiate(function, *args, **kwargs)
    return _call_on_primals(function, *args, **kwargs)


def differentiate(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, torch's results
    """Call a function of torch by torch's own derivative of it, which is exact (`dumo.autodiff.general`).

    Some operands move. Raises NoRule where torch has no derivative, where the function writes to an operand, where it
    draws random numbers on a tape, and where a loss holds the derivative itself; UserError for a scripted module.
    """
    if isinstance(function, torch._C.ScriptMethod):  # torch's derivative of it is zero
        raise UserError("a module of torch.jit.script has no derivative: take it as it was before it was scripted")
    reason = general.reason_without_tangent(function, args, kwargs)
    if reason:
        raise NoRule(reason)
    name = general.operation_name(function)
    leaves, spec = tree_flatten((args, kwargs))
    dual_places = tuple(i for i, x in enumerate(leaves) if isinstance(x, Dual))
    duals = tuple(leaves[i] for i in dual_places)
    if any(dual.recorded for dual in duals):  # torch's own gradient of such a tangent is wrong for some norms
        raise NoRecordedRule(name)
    if _state.primal_only:
        return _call_on_primals(function, *args, **kwargs)
    primals = [primal(x) for x in leaves]
    num_writes = general.num_writes(primals)
    random_state = torch.get_rng_state()

    # One call in forward mode gives values and tangents. It draws once, and the tangent knows what was drawn.
    results: list[Any] = []
    tangents_of_results: Sequence[Tensor | None] | None = None
    results_spec = None
    on_tape = any(isinstance(dual.t, Later) for dual in duals)
    if not (on_tape or "attention" in name):  # whose fused kernels have no forward mode
        tangents = {i: cast(Tensor, x.t) for i, x in zip(dual_places, duals, strict=True) if x.t is not None}
        try:
            results, tangents_of_results, results_spec = general.call_in_forward_mode(function, spec, primals, tangents)
        except NotImplementedError:  # torch has no forward derivative
            torch.set_rng_state(random_state)

    # Else the value is made here, and the tangent by a second call, which would draw other numbers.
    if tangents_of_results is None:
        if on_tape and general.draws_random(function):
            raise NoRule(f"{name}, which draws random numbers")
        primal_args, primal_kwargs = tree_unflatten(primals, spec)
        results, results_spec = tree_flatten(function(*primal_args, **primal_kwargs))
        tangents_of_results = [None] * len(results)
    assert results_spec is not None, "one of both calls was made"
    if general.num_writes(primals) != num_writes:
        raise NoRule(f"{name}, which changes an operand")
    if not any(isinstance(result, Tensor) for result in results):  # strides and the like
        return tree_unflatten(results, results_spec)
    if not any(map(general.can_have_tangent, results)):
        raise NoRule(f"{name}, whose result has no derivative")

    # Pair each value with its tangent.
    for k, result in enumerate(results):
        operand = next((dual for dual in duals if dual.p is result), None)
        if operand is not None:  # not another Dual: what is assigned to the one must be seen in the other
            results[k] = operand
        elif general.can_have_tangent(result):
            found = tangents_of_results[k]
            if found is not None:
                paired = carry(result, _push_known, duals, found)
            elif general.is_constant(function, result, k):
                paired = pair(result, None)
            else:
                if not torch.equal(torch.get_rng_state(), random_state):
                    raise NoRule(f"{name}, which draws random numbers")
                call = general.OperationCall(function, spec, dual_places, k)
                paired = carry(result, general.tangent, duals, call, *primals)
            if isinstance(paired, Dual):
                base = next((dual for dual in duals if general.share_memory(result, dual.p)), None)
                if base is not None:
                    mark_view(paired, base)
            results[k] = paired
    return tree_unflatten(results, results_spec)


def mark_view(x: Array, base: Any) -> None:  # noqa: ANN401, nothing is marked of what is no Dual
    """Mark a Dual as a view of another, so that nothing is assigned to it, nor to the other while it is in use."""
    if not isinstance(x, Dual) or not isinstance(base, Dual):
        return
    x.base = base if base.base is None else base.base
    if not torch.compiler.is_compiling():  # which follows no weak references
        x.base.views.append(weakref.ref(x))


def _push_known(*arguments: Any) -> Tensor:  # noqa: ANN401, tangents of operands
    """A tangent that was computed together with its value: the last of the arguments."""
    return arguments[-1]


def _refused_operator(name: str) -> Callable[..., Any]:
    """A method of Dual that raises NoRule where an operand moves."""

    def operator(self: Dual, *others: object) -> Any:  # noqa: ANN401, as Tensor's
        if _tree_has_tangent((self, others)) or not hasattr(Tensor, name):
            raise NoRule(f"Tensor.{name}")
        return _call_on_primals(getattr(Tensor, name), self, *others)

    return operator


def _operator_without_rule(name: str) -> Callable[..., Any]:
    """A method of Dual that takes torch's own derivative where an operand moves."""

    def operator(self: Dual, *others: object) -> Any:  # noqa: ANN401, as Tensor's
        return _call_without_rule(getattr(Tensor, name), (self, *others), {})

    return operator


for _name in _REFUSED_OPERATORS.split():
    setattr(Dual, f"__{_name}__", _refused_operator(f"__{_name}__"))
for _name in _OPERATORS_WITHOUT_RULE:
    setattr(Dual, f"__{_name}__", _operator_without_rule(f"__{_name}__"))


def pair(p: Tensor, t: Tensor | Later | None, *, recorded: bool = False) -> Array:
    """A Dual of a primal and its tangent, typed as the tensor that it stands in for.

    `recorded`: autograd records its tangent, and those that follow from it, as it does primals. A loss that holds the
    derivative itself needs that.
    """
    return cast(Array, Dual(p, t, recorded=recorded, under_grad=torch.is_grad_enabled()))


def primal(x: Any) -> Any:  # noqa: ANN401, numbers and None pass through
    """The primal of a Dual; anything else as it is."""
    return x.p if isinstance(x, Dual) else x


def tangent(x: Any) -> Tensor | Later | None:  # noqa: ANN401, typed as a Tensor where it is a Dual
    """The tangent of a Dual; None for one that rests and for anything else."""
    return x.t if isinstance(x, Dual) else None


def carry(p: Tensor, push: Callable[..., Tensor], operands: tuple[object, ...], *saved: object) -> Array:
    """Pair `p` with the tangent `push(*tangents of operands, *saved)`: computed now if these are known, else later.

    An operand that does not move has tangent None; where none moves, `p` is returned alone. The tangent may have any
    shape that expands to p's. `push` is a function of a module: it must not close over anything. Raises NoRule where an
    operand would lose gradients.
    """
    if _state.primal_only:
        return p
    has_grad = torch.is_grad_enabled()
    tangents: list[Tensor | Later | None] = []
    has_tangent = False
    is_later = False
    recorded = False
    under_grad = has_grad
    for x in operands:  # every operation of every net comes by: one loop, no generators
        if not isinstance(x, Dual) or x.t is None:
            tangents.append(None)
            continue
        if not has_grad:
            _require_gradients_kept(x)
            under_grad = under_grad or x.under_grad
        has_tangent = True
        tangents.append(_in_dtype_of(x.p, x.t))
        is_later = is_later or isinstance(x.t, Later)
        recorded = recorded or x.recorded
    if not has_tangent:
        return p
    if is_later:
        saved_tensors, writes = detach_saved(saved)
        t: Tensor | Later = Later(p.shape, p.dtype, push, tuple(tangents), saved_tensors, writes)
    elif not has_grad or recorded:
        t = fit_to_primal(push(*tangents, *saved), p.shape, p.dtype)
    else:
        with torch.no_grad():
            t = fit_to_primal(push(*tangents, *saved), p.shape, p.dtype)
    return cast(Array, Dual(p, t, recorded=recorded and not is_later, under_grad=under_grad))


def _require_gradients_kept(x: Dual) -> None:
    """Raise NoRule where no gradients are recorded, but those of the Dual, or of what it meets, would be lost."""
    loses_own = x.p.requires_grad
    if loses_own or (x.under_grad and _is_in_function_of_gradients()):
        raise NoRule("a custom autograd.Function, reentrant checkpoint or no_grad block, where a Dual loses gradients")


def _is_in_function_of_gradients() -> bool:
    """Whether this is part of a custom autograd.Function that was given tensors with gradients, such as weights.

    A Dual that it returns is no tensor to autograd, so their gradients would be lost.
    """
    if torch.compiler.is_compiling():
        return False  # a compiler follows no frames, so that nobody can know
    frame = sys._getframe()
    while frame is not None:
        if _is_forward_of_function(frame.f_code):
            return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(list(frame.f_locals.values())))
        frame = frame.f_back
    return False


@cache
def _is_forward_of_function(code: CodeType) -> bool:
    """Whether this is the code of the `forward` of a custom autograd.Function. One is defined before it runs."""
    stack = torch.autograd.Function.__subclasses__()
    while stack:
        function = stack.pop()
        if getattr(function.forward, "__code__", None) is code:
            return True
        stack += function.__subclasses__()
    return False


@contextmanager
def primal_only() -> Generator[None, None, None]:
    """Inside, no tangent is computed: for recomputing what a checkpoint let go, whose tangents are known already.

    A state of the thread, not an argument: torch's checkpoint calls a block again by itself, with the inputs of the
    first call, and takes nothing but contexts. One that is forgotten costs time and changes nothing.
    """
    was_primal_only = _state.primal_only
    _state.primal_only = True
    try:
        yield
    finally:
        _state.primal_only = was_primal_only


def _has_no_dual(operands: Iterable[object]) -> bool:
    """Whether none of the operands is a Dual."""
    for x in operands:  # noqa: SIM110, a generator takes three times as long
        if isinstance(x, Dual):
            return False
    return True


def _has_no_numpy_name(named: dict[str, object]) -> bool:
    """Whether none of the arguments is named as numpy names it."""
    for name in _NUMPY_NAMES:  # noqa: SIM110, as above
        if name in named:
            return False
    return True


def _tree_has_tangent(operands: object) -> bool:
    """Whether an operand moves, or anything inside lists and dicts of operands."""
    return tree_any(_has_tangent, operands)


def _has_tangent(x: object) -> bool:
    """Whether x is a Dual that moves."""
    return isinstance(x, Dual) and x.t is not None


def _in_dtype_of(p: Tensor, t: Tensor | Later) -> Tensor | Later:
    """The tangent of an operand in its primal's dtype: a sharded module may have cast the primal on its way in."""
    if t.dtype == p.dtype:
        return t
    if isinstance(t, Later):
        return Later(p.shape, p.dtype, _cast, (t,), (p.dtype,))
    return t.to(p.dtype)


def _cast(dx: Tensor, dtype: torch.dtype) -> Tensor:
    """The tangent of a cast; a function of the module, because a `Later` keeps no closure."""
    return dx.to(dtype)


def rule(*functions: _Operation) -> Callable[[Rule], Rule]:
    """Make the decorated function the rule of these functions of torch; of methods of Tensor, a method of Dual too.

    A parameter that is annotated as Dual is the first one, and says that no other operand may move.
    """

    def register(tangent_rule: Rule) -> Rule:
        has_dual_parameter = Dual in tangent_rule.__annotations__.values()
        for function in functions:
            RULES[function] = tangent_rule
            if has_dual_parameter:
                FIRST_OPERAND_ONLY.add(function)
            method = _method_of_rule(function, tangent_rule) if has_dual_parameter else tangent_rule
            for name in METHOD_NAMES.get(function, ()):
                setattr(Dual, name, method)
        return tangent_rule

    return register


def _method_of_rule(function: _Operation, tangent_rule: Rule) -> Callable[..., Any]:
    """A rule as a method of Dual, where the rule lets the first operand alone move."""

    def method(self: Dual, *others: object, **named: object) -> Any:  # noqa: ANN401, as Tensor's
        if _has_no_numpy_name(named) and _has_no_dual(others) and _has_no_dual(named.values()):
            return tangent_rule(self, *others, **named)
        return _call_method(cast(Callable[..., Any], function), self, *others, **named)

    return method


def refuse_inplace(name: str, inplace: bool) -> None:
    """Raise NoRule where a function is to write its result over its input, which other Duals may be views of."""
    if inplace:
        raise NoRule(f"{name} with inplace=True")


def teach_others() -> None:
    """Make torch.is_tensor, checkpoints and einops take Duals. Later calls look for einops alone."""
    if torch.compiler.is_compiling():
        return
    _teach_is_tensor()
    _teach_checkpoint()
    if "einops" in sys.modules:
        _define_einops_backend()


@cache
def _teach_is_tensor() -> None:
    """Make torch.is_tensor return True for a Dual from now on.

    Models of diffusers ask it of times, also when a checkpoint is recomputed.
    """
    is_tensor = torch.is_tensor
    torch.is_tensor = lambda obj: isinstance(obj, Dual) or is_tensor(obj)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _teach_checkpoint() -> None:
    """Make torch's checkpoint keep the generator of a Dual's GPU from now on, so that both passes drop the same."""
    from torch.utils import checkpoint

    def of_primals(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*tree_map(primal, args))

    checkpoint.get_device_states = of_primals(checkpoint.get_device_states)
    checkpoint._infer_device_type = of_primals(checkpoint._infer_device_type)


@cache
def _define_einops_backend() -> type:
    """Define a backend, which einops finds among the subclasses of its own: it knows no type of ours."""
    from einops._backends import TorchBackend  # the one place where a type of tensors can be added

    class DualBackend(TorchBackend):
        """The backend of torch, for Duals: they answer to torch's functions."""

        framework_name = "dumo"

        def is_appropriate_type(self, tensor: Any) -> bool:  # noqa: ANN401, whatever einops is given
            return isinstance(tensor, Dual)

    return DualBackend
