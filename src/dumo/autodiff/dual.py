"""Dual numbers: pairs of a primal and its tangent that stand in for tensors in a network.

`Dual(p, t)` has a primal `p`, an ordinary tensor that autograd records, and a tangent `t`, which autograd does not
record by default. It is not a subclass of Tensor but implements `__torch_function__`, so an unchanged network runs on
it. An operation on Duals:

1. `Dual.__torch_function__` looks up the operation's rule in `RULES`.
2. The rule (`dumo.autodiff.rule`) computes the primal by the same call as the network, and names the JVP. The primal
   and its gradients are therefore bit-identical to a plain pass.
3. `carry` pairs the primal with its tangent. It computes the tangent at once, or, if the direction is not known yet,
   stores the JVP as a `DeferredTangent` (`dumo.autodiff.tape`).

Operations without a rule use torch's own derivative (`differentiate`) or raise NoRule; none returns a silent zero.

`zeros_like` and similar functions return a Dual whose tangent is None, because a network may assign a Dual to it. Until
then, operations use its primal only.

There is no global list of operations: each tangent refers to those that it depends on. Compiled regions and sharded
modules therefore only have to accept and return Duals.

`pair` creates a Dual; `primal` and `tangent` return its parts. Rules use `rule`, `carry`, `differentiate` and
`refuse_inplace`. `primal_only` is for checkpoint recomputation. Call `accept_duals` before a pass, so that
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

from dumo.autodiff import fallback
from dumo.autodiff.fallback import NoRecordedRule
from dumo.autodiff.fallback import NoRule as NoRule
from dumo.autodiff.tape import DeferredTangent, detach_saved, fit_to_primal, version
from dumo.types import Array, UserError

Rule = Callable[..., Any]
# A torch function, or its name if torch.compile passes another object for it.
_Operation = Callable[..., Any] | str
# The rule of each operation, filled by `rule`.
RULES: dict[_Operation, Rule] = {}
# Operations with a rule for a tangent of the first operand only.
FIRST_OPERAND_ONLY: set[_Operation] = set()

# Dunder methods of Tensor, without the underscores, for which a rule may be registered.
_OPERATORS = (
    "abs add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg getitem setitem eq ne lt le gt ge"
)
# Operators that a Dual with a tangent refuses, because Python's fallback would be wrong: for `x += y` it computes
# x = x + y, although x may have other references; for `if x` it uses the length.
_REFUSED_OPERATORS = (
    "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor delitem bool int float array "
    "invert floordiv rfloordiv and rand or ror xor rxor"
)
# Errors that code written for Tensors may raise on a Dual. NoRule is a RuntimeError.
RAISED_ON_DUALS = (TypeError, AttributeError, AssertionError, ValueError, RuntimeError)
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}
# Python looks these up in the class, so `__getattr__` does not see them.
_OPERATORS_WITHOUT_RULE = ("pos", "mod", "rmod", "rmatmul")

# The names of the Tensor methods that are the same function.
METHOD_NAMES: dict[_Operation, list[str]] = {}
for _name in dir(Tensor):
    _method = getattr(Tensor, _name)
    if callable(_method) and (not _name.startswith("__") or _name.strip("_") in _OPERATORS.split()):
        METHOD_NAMES.setdefault(_method, []).append(_name)


class _ThreadState(threading.local):
    """The state of a thread. All fields exist from the start, because a new field would make torch recompile."""

    def __init__(self) -> None:
        self.primal_only = False


_state = _ThreadState()


class _Unassignable:
    """An attribute that is read as from a Tensor and raises NoRule on assignment."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, dual: "Dual | None", owner: type) -> object:
        if dual is None:
            # A dataclass looks for default values in the class.
            raise AttributeError(self.name)
        return dual.__getattr__(self.name)

    def __set__(self, dual: "Dual", value: object) -> None:
        raise NoRule(f"assignment to Tensor.{self.name}")


# A dataclass, because FSDP2 finds the tensors inside dataclasses.
@dataclass(eq=False, repr=False)
class Dual:
    """A primal and its tangent, of one shape and dtype. `pair` creates it.

    p: the primal.
    t: the tangent, or None.
    base: the Dual of which this one is a view.
    recorded: whether autograd records the tangent, for a loss that contains the derivative.
    under_grad: whether gradients were enabled when this Dual, or one that it depends on, was created.
    views: the Duals that are views of this one.
    """

    p: Tensor
    t: Tensor | DeferredTangent | None
    base: "Dual | None" = None
    recorded: bool = False
    under_grad: bool = False
    views: "list[weakref.ref[Dual]]" = field(default_factory=list)

    shape = property(lambda self: self.p.shape)
    dtype = property(lambda self: self.p.dtype)
    device = property(lambda self: self.p.device)
    ndim = property(lambda self: self.p.ndim)
    is_cuda = property(lambda self: self.p.is_cuda)
    requires_grad = property(lambda self: self.p.requires_grad)
    # FSDP2 checks this to warn about views.
    _base = property(lambda self: self.p._base)

    # Autograd does not follow assignments to these.
    data = _Unassignable("data")
    real = _Unassignable("real")
    imag = _Unassignable("imag")

    # Hash by identity, because == compares values, as for Tensor.
    __hash__ = object.__hash__
    # As Tensor's, so that numpy scalars defer to the right operand.
    __array_priority__ = 1000

    def size(self, *axis: int, **named: int) -> Any:  # noqa: ANN401, a Size or an int, as Tensor.size
        """Return the primal's size, or the size of one axis."""
        return self.p.size(*axis, **named)

    def dim(self) -> int:
        """Return the primal's number of axes."""
        return self.p.ndim

    def numel(self) -> int:
        """Return the primal's number of elements."""
        return self.p.numel()

    def is_floating_point(self) -> bool:
        """Whether the primal is a floating-point tensor."""
        return self.p.is_floating_point()

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> object:
        """Call `hook` with the primal's gradient. FSDP2 uses such hooks to gather weights."""
        return self.p.register_hook(hook)

    def __len__(self) -> int:
        """Return the length of the primal's first axis."""
        return len(self.p)

    def __iter__(self) -> Iterator[Array]:
        """Iterate over the rows as Duals."""
        return iter(RULES[Tensor.unbind](self, 0))

    def __getattr__(self, name: str) -> object:
        """Return an attribute of the primal. Methods without a rule and views such as `.T` use `differentiate`.

        Raises NoRule for a method that would lose the tangent, such as `detach`.
        """
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        has_tangent = self.t is not None
        if has_tangent and name in fallback.LOSE_TANGENT:
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
        """Call the function's rule, or `differentiate` if it has none and an operand has a tangent."""
        # Normalize the arguments: rules take `input` by position, and torch accepts numpy's names.
        kwargs = dict(kwargs) if kwargs else {}
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        for numpy_name, torch_name in _NUMPY_NAMES.items():
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
    """Call a Tensor method through `__torch_function__`: any operand may have a tangent."""
    return Dual.__torch_function__(method, (), args, kwargs)


def _call_on_primals(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, torch's results
    """Call a function on the primals. If it returns its first operand, return that operand's Dual."""
    primal_args = tree_map(primal, args)
    primal_kwargs = tree_map(primal, kwargs)
    out = function(*primal_args, **primal_kwargs)
    if args and out is primal_args[0]:
        return args[0]
    return out


def _call_without_rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """Call a function that has no rule, with torch's derivative if an operand has a tangent."""
    if _tree_has_tangent((args, kwargs)):
        return differentiate(function, *args, **kwargs)
    return _call_on_primals(function, *args, **kwargs)


def differentiate(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, torch's results
    """Call a torch function on Duals, and compute the tangent by torch's own derivative (`dumo.autodiff.fallback`).

    Raises NoRule if torch has no derivative, if the function modifies an operand, if it draws random numbers while the
    direction is not known, and if a loss differentiates through the derivative. Raises UserError for scripted modules.
    """
    # torch's derivative of a scripted module is zero.
    if isinstance(function, torch._C.ScriptMethod):
        raise UserError("a torch.jit.script module has no derivative: pass the module before scripting")
    reason = fallback.unsupported_reason(function, args, kwargs)
    if reason:
        raise NoRule(reason)
    name = fallback.operation_name(function)
    leaves, spec = tree_flatten((args, kwargs))
    dual_places = tuple(i for i, x in enumerate(leaves) if isinstance(x, Dual))
    duals = tuple(leaves[i] for i in dual_places)
    # torch's gradient of a forward-mode tangent is wrong for some norms.
    if any(dual.recorded for dual in duals):
        raise NoRecordedRule(name)
    if _state.primal_only:
        return _call_on_primals(function, *args, **kwargs)
    primals = [primal(x) for x in leaves]
    version_sum = sum(version(x) for x in primals if isinstance(x, Tensor))
    random_state = torch.get_rng_state()

    # Compute values and tangents by one call in forward mode, so that random numbers are drawn once. Fused attention
    # kernels have no forward mode.
    results: list[Any] = []
    tangents_of_results: Sequence[Tensor | None] | None = None
    results_spec = None
    is_deferred = any(isinstance(dual.t, DeferredTangent) for dual in duals)
    if not (is_deferred or "attention" in name):
        tangents = {i: cast(Tensor, x.t) for i, x in zip(dual_places, duals, strict=True) if x.t is not None}
        try:
            results, tangents_of_results, results_spec = fallback.call_in_forward_mode(
                function, spec, primals, tangents
            )
        except NotImplementedError:
            # torch has no forward derivative.
            torch.set_rng_state(random_state)

    # Otherwise compute the values here, and the tangents by a second call, which would draw other random numbers.
    if tangents_of_results is None:
        if is_deferred and fallback.draws_random(function):
            raise NoRule(f"{name}, which draws random numbers")
        primal_args, primal_kwargs = tree_unflatten(primals, spec)
        results, results_spec = tree_flatten(function(*primal_args, **primal_kwargs))
        tangents_of_results = [None] * len(results)
    assert results_spec is not None, "one of the two calls was made"
    if sum(version(x) for x in primals if isinstance(x, Tensor)) != version_sum:
        raise NoRule(f"{name}, which changes an operand")
    # Strides and other results that are not tensors.
    if not any(isinstance(result, Tensor) for result in results):
        return tree_unflatten(results, results_spec)
    if not any(map(fallback.can_have_tangent, results)):
        raise NoRule(f"{name}, whose result has no derivative")

    # Pair each value with its tangent. An operand that is returned stays the same Dual, because a later assignment must
    # be visible in both.
    for k, result in enumerate(results):
        operand = next((dual for dual in duals if dual.p is result), None)
        if operand is not None:
            results[k] = operand
        elif fallback.can_have_tangent(result):
            found = tangents_of_results[k]
            if found is not None:
                paired = carry(result, _jvp_known, duals, found)
            elif fallback.is_constant(function, result, k):
                paired = pair(result, None)
            else:
                if not torch.equal(torch.get_rng_state(), random_state):
                    raise NoRule(f"{name}, which draws random numbers")
                call = fallback.OperationCall(function, spec, dual_places, k)
                paired = carry(result, fallback.tangent, duals, call, *primals)
            if isinstance(paired, Dual):
                base = next((dual for dual in duals if fallback.share_memory(result, dual.p)), None)
                if base is not None:
                    mark_view(paired, base)
            results[k] = paired
    return tree_unflatten(results, results_spec)


def mark_view(x: Array, base: Any) -> None:  # noqa: ANN401, does nothing unless both are Duals
    """Mark a Dual as a view of another: assignments to the view, and to its base while the view exists, are refused."""
    if not isinstance(x, Dual) or not isinstance(base, Dual):
        return
    x.base = base if base.base is None else base.base
    # torch.compile does not support weak references.
    if not torch.compiler.is_compiling():
        x.base.views.append(weakref.ref(x))


def _jvp_known(*arguments: Any) -> Tensor:  # noqa: ANN401, tangents of operands
    """Return a tangent that was computed together with its value, the last argument."""
    return arguments[-1]


def _refused_operator(name: str) -> Callable[..., Any]:
    """Return a Dual method that raises NoRule if an operand has a tangent."""

    def operator(self: Dual, *others: object) -> Any:  # noqa: ANN401, as Tensor's
        if _tree_has_tangent((self, others)) or not hasattr(Tensor, name):
            raise NoRule(f"Tensor.{name}")
        return _call_on_primals(getattr(Tensor, name), self, *others)

    return operator


def _operator_without_rule(name: str) -> Callable[..., Any]:
    """Return a Dual method that uses torch's own derivative if an operand has a tangent."""

    def operator(self: Dual, *others: object) -> Any:  # noqa: ANN401, as Tensor's
        return _call_without_rule(getattr(Tensor, name), (self, *others), {})

    return operator


for _name in _REFUSED_OPERATORS.split():
    setattr(Dual, f"__{_name}__", _refused_operator(f"__{_name}__"))
for _name in _OPERATORS_WITHOUT_RULE:
    setattr(Dual, f"__{_name}__", _operator_without_rule(f"__{_name}__"))


def pair(p: Tensor, t: Tensor | DeferredTangent | None, *, recorded: bool = False) -> Array:
    """Create a Dual, typed as the tensor that it stands in for.

    recorded: whether autograd records its tangent and the tangents computed from it, for a loss that contains the
        derivative.
    """
    return cast(Array, Dual(p, t, recorded=recorded, under_grad=torch.is_grad_enabled()))


def primal(x: Any) -> Any:  # noqa: ANN401, numbers and None pass through
    """Return the primal of a Dual; anything else unchanged."""
    return x.p if isinstance(x, Dual) else x


def tangent(x: Any) -> Tensor | DeferredTangent | None:  # noqa: ANN401, Duals are typed as Tensors
    """Return the tangent of a Dual; None for anything else."""
    return x.t if isinstance(x, Dual) else None


def carry(p: Tensor, jvp: Callable[..., Tensor], operands: tuple[object, ...], *saved: object) -> Array:
    """Pair `p` with the tangent `jvp(*tangents of operands, *saved)`, computed now or deferred.

    An operand without a tangent contributes None; if no operand has a tangent, `p` itself is returned. The tangent may
    have any shape that expands to that of `p`. `jvp` is a module-level function without a closure. Raises NoRule if an
    operand would lose gradients.
    """
    if _state.primal_only:
        return p
    has_grad = torch.is_grad_enabled()
    tangents: list[Tensor | DeferredTangent | None] = []
    has_tangent = False
    is_deferred = False
    recorded = False
    under_grad = has_grad
    # This runs for every operation of a network, so it is one loop without generators.
    for x in operands:
        if not isinstance(x, Dual) or x.t is None:
            tangents.append(None)
            continue
        if not has_grad:
            _require_gradients_kept(x)
            under_grad = under_grad or x.under_grad
        has_tangent = True
        tangents.append(_in_dtype_of(x.p, x.t))
        is_deferred = is_deferred or isinstance(x.t, DeferredTangent)
        recorded = recorded or x.recorded
    if not has_tangent:
        return p
    if is_deferred:
        saved_values, version_sum = detach_saved(saved)
        t: Tensor | DeferredTangent = DeferredTangent(p.shape, p.dtype, jvp, tuple(tangents), saved_values, version_sum)
    elif not has_grad or recorded:
        t = fit_to_primal(jvp(*tangents, *saved), p.shape, p.dtype)
    else:
        with torch.no_grad():
            t = fit_to_primal(jvp(*tangents, *saved), p.shape, p.dtype)
    return cast(Array, Dual(p, t, recorded=recorded and not is_deferred, under_grad=under_grad))


def _require_gradients_kept(x: Dual) -> None:
    """Raise NoRule if gradients are disabled here and those of the Dual, or of weights that it meets, would be lost."""
    loses_own = x.p.requires_grad
    if loses_own or (x.under_grad and _is_in_function_of_gradients()):
        raise NoRule("a custom autograd.Function, reentrant checkpoint or no_grad block, where a Dual loses gradients")


def _is_in_function_of_gradients() -> bool:
    """Whether the caller is in a custom autograd.Function whose inputs, such as weights, require gradients.

    Autograd does not see a Dual that the function returns, so their gradients would be lost.
    """
    # torch.compile cannot inspect frames.
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe()
    while frame is not None:
        if _is_forward_of_function(frame.f_code):
            return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(list(frame.f_locals.values())))
        frame = frame.f_back
    return False


@cache
def _is_forward_of_function(code: CodeType) -> bool:
    """Whether this is the code of a custom autograd.Function's `forward`."""
    stack = torch.autograd.Function.__subclasses__()
    while stack:
        function = stack.pop()
        if getattr(function.forward, "__code__", None) is code:
            return True
        stack += function.__subclasses__()
    return False


@contextmanager
def primal_only() -> Generator[None, None, None]:
    """Disable tangents, for the recomputation of a checkpointed block whose tangents are computed already.

    This is thread state and not an argument, because torch's checkpoint repeats the first call and accepts only context
    managers. Without it, the recomputation is slower but correct.
    """
    was_primal_only = _state.primal_only
    _state.primal_only = True
    try:
        yield
    finally:
        _state.primal_only = was_primal_only


def _has_no_dual(operands: Iterable[object]) -> bool:
    """Whether none of the operands is a Dual."""
    for x in operands:  # noqa: SIM110, a generator is three times slower
        if isinstance(x, Dual):
            return False
    return True


def _has_no_numpy_name(named: dict[str, object]) -> bool:
    """Whether no keyword is one of numpy's names."""
    for name in _NUMPY_NAMES:  # noqa: SIM110, a generator is three times slower
        if name in named:
            return False
    return True


def _tree_has_tangent(operands: object) -> bool:
    """Whether an operand, or an item of nested lists and dicts, has a tangent."""
    return tree_any(_has_tangent, operands)


def _has_tangent(x: object) -> bool:
    """Whether x is a Dual with a tangent."""
    return isinstance(x, Dual) and x.t is not None


def _in_dtype_of(p: Tensor, t: Tensor | DeferredTangent) -> Tensor | DeferredTangent:
    """Return a tangent in its primal's dtype, because FSDP2 may have cast the primal."""
    if t.dtype == p.dtype:
        return t
    if isinstance(t, DeferredTangent):
        return DeferredTangent(p.shape, p.dtype, _cast, (t,), (p.dtype,))
    return t.to(p.dtype)


def _cast(dx: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the JVP of a cast."""
    return dx.to(dtype)


def rule(*functions: _Operation) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of these torch functions, and as a Dual method for Tensor methods.

    If the first parameter is annotated as Dual, the rule supports a tangent of the first operand only.
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
    """Return a Dual method for a rule that supports a tangent of the first operand only."""

    def method(self: Dual, *others: object, **named: object) -> Any:  # noqa: ANN401, as Tensor's
        if _has_no_numpy_name(named) and _has_no_dual(others) and _has_no_dual(named.values()):
            return tangent_rule(self, *others, **named)
        return _call_method(cast(Callable[..., Any], function), self, *others, **named)

    return method


def refuse_inplace(name: str, inplace: bool) -> None:
    """Raise NoRule if `inplace` is set: the function would overwrite its input, of which other Duals may be views."""
    if inplace:
        raise NoRule(f"{name} with inplace=True")


def accept_duals() -> None:
    """Patch torch.is_tensor, torch's checkpoint and, if it is imported, einops to accept Duals."""
    if torch.compiler.is_compiling():
        return
    _patch_is_tensor()
    _patch_checkpoint()
    if "einops" in sys.modules:
        _register_einops_backend()


@cache
def _patch_is_tensor() -> None:
    """Make torch.is_tensor return True for Duals. diffusers models call it on the time, also in recomputation."""
    is_tensor = torch.is_tensor
    torch.is_tensor = lambda obj: isinstance(obj, Dual) or is_tensor(obj)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _patch_checkpoint() -> None:
    """Make torch's checkpoint save the GPU generator state for Duals, so that the recomputed dropout masks agree."""
    from torch.utils import checkpoint

    def of_primals(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*tree_map(primal, args))

    checkpoint.get_device_states = of_primals(checkpoint.get_device_states)
    checkpoint._infer_device_type = of_primals(checkpoint._infer_device_type)


@cache
def _register_einops_backend() -> type:
    """Define an einops backend for Duals. einops finds it among the subclasses of its backend class."""
    from einops._backends import TorchBackend

    class DualBackend(TorchBackend):
        """The torch backend, applied to Duals."""

        framework_name = "dumo"

        def is_appropriate_type(self, tensor: Any) -> bool:  # noqa: ANN401, whatever einops is given
            return isinstance(tensor, Dual)

    return DualBackend
