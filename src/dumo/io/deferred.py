"""Weights that are not made yet: a net is built without them, and each is made when its device, or a rank's part, is.

1. Inside `with Deferred() as weights`, memory that is allocated for floats on the CPU is on 'meta' instead, and what is
   done to it is noted: that it is drawn, scaled, copied, cast. A draw is noted with the generator's state, and the
   generator advances as if it had drawn. A tensor in a file is noted by `leaf`, and f(x) of a weight x by `derived`.
   Inside `unnoted`, weights are made at once.
2. `weights.replace` gives a tensor other values, such as those of a checkpoint.
3. `weights.materialize` makes one tensor, by running what was noted; `weights.fill` makes all of a net. The values are
   those of a net that is built without `Deferred`, to the bit.

The host then never holds more than the largest tensor, and what a rank keeps.

Code that looks at values while it builds fails. `trunc_normal_`, `orthogonal_` and `sparse_` of `torch.nn.init` lose
their draws, so nets from outside are built without `Deferred`.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

MakeTensor = Callable[[], Tensor]
OVERWRITING = ("uniform_", "normal_", "zero_", "fill_", "copy_", "random_", "exponential_")  # keep no old value
EMPTY = torch.ops.aten.empty.memory_format
CPU = torch.device("cpu")
_entered: ContextVar["Deferred | None"] = ContextVar("deferred", default=None)  # the mode that notes now


@dataclass(frozen=True)
class TensorRef:
    """A view of a tensor that is not made yet, as an argument of an operation."""

    key: int  # of its storage (`_storage_key`)
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Operation:
    """An operation that makes or changes a tensor that is not made yet."""

    time: int  # in the order of all operations
    func: Callable[..., Any]
    args: tuple[Any, ...]  # with `TensorRef` in place of tensors that are not made yet
    kwargs: dict[str, Any]  # also with `TensorRef`
    out: int | None = None  # which of its outputs the tensor is; None: it changes the tensor in place
    state: Tensor | None = None  # of the generator, before it draws; None: it draws nothing


class Deferred(TorchDispatchMode):
    """Notes how weights are made while it is entered; `materialize` makes them later. Until then they are on 'meta'."""

    def __init__(self) -> None:
        """Start without weights."""
        super().__init__()
        self._operations: dict[int, list[Operation]] = {}  # by the key of a storage
        self._storages: dict[int, Tensor] = {}  # by key; they live on, so that no other storage gets the key
        self._time = 0  # of the last operation noted
        self._outputs_time = 0  # of the last operation that was run and had several outputs
        self._outputs_of_last: list[Any] = []  # what it returned

    def __enter__(self) -> "Deferred":
        """Begin to note operations."""
        self._before = _entered.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401, as torch has it
        """Stop noting operations."""
        _entered.reset(self._before)
        super().__exit__(*error)

    def __contains__(self, x: Tensor) -> bool:
        """Whether a tensor is not made yet, and can be made here."""
        return x.is_meta and _storage_key(x) in self._operations

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run one operation, or note it."""
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is EMPTY and (kwargs.get("device") or CPU) == CPU:
            if (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point:
                return self._new(func, args, kwargs)
        elif any(x in self for x in tensors):
            return self._note(func, args, kwargs)
        elif tensors and str(kwargs.get("device")) == "meta":  # a real tensor moved to where the weights seem to be
            kwargs = kwargs | {"device": CPU}
        return func(*args, **kwargs)

    def leaf(self, make: MakeTensor, like: Tensor) -> Tensor:
        """A tensor shaped like `like` that `make` makes later; the tensor that it returns is never changed."""
        with _disable_current_modes():
            x = torch.empty_like(like, device="meta", requires_grad=False)
        self.replace(x, make)
        return x

    def replace(self, x: Tensor, make: MakeTensor) -> None:
        """Let `make` make a tensor from now on. What was computed from the tensor before keeps its old values."""
        self._add(x, Operation(self._tick(), make, (), {}, out=0))

    def materialize(self, x: Tensor) -> Tensor:
        """A tensor with its values, on the CPU, which must not be changed; a tensor that has values as it is."""
        if x not in self:
            return x.detach()
        with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            row = self._materialize(_storage_key(x), self._time + 1)
            return row.as_strided(x.size(), x.stride(), x.storage_offset())

    def fill(self, net: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
        """MakeTensor all weights of a net, in place, one by one on a device. Tied weights stay tied."""
        made: dict[int, Tensor] = {}  # by the identity of the tensor on 'meta'
        for module in net.modules():
            for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                if parameter in self:
                    if id(parameter) not in made:
                        values = _copy_to(self.materialize(parameter), device)
                        made[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
                    setattr(module, name, made[id(parameter)])
            for name, buffer in [*module.named_buffers(recurse=False, remove_duplicate=False)]:
                if buffer in self:
                    if id(buffer) not in made:
                        made[id(buffer)] = _copy_to(self.materialize(buffer), device)
                    setattr(module, name, made[id(buffer)])
        return net.to(device)

    def unknown_names(self, net: nn.Module) -> list[str]:
        """The names of a net's tensors that have no values and cannot be made here."""
        named_tensors = (*net.named_parameters(), *net.named_buffers())
        return [name for name, x in named_tensors if x.is_meta and x not in self]

    def _new(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:  # noqa: ANN401, an operation
        """Allocate on 'meta' in place of the CPU."""
        x = func(*args, **kwargs | {"device": torch.device("meta")})
        self._add(x, Operation(self._tick(), func, args, kwargs, out=0))
        return x

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401, as `_new`
        """Note an operation on tensors that are not made yet. Returns its output on 'meta'."""
        if kwargs.get("generator") is not None or "out" in kwargs:
            raise RuntimeError(f"{func} on weights that are not made yet draws by a generator of its own, or has out=")
        refs = tree_map(self._ref, (args, kwargs))
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            state = torch.get_rng_state()
            func(*tree_map(_blank, args), **tree_map(_blank, kwargs))  # the generator advances
        out = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        time = self._tick()
        written = _written_tensors(func, args)
        for x in written:
            if x not in self:
                raise RuntimeError(f"{func} changes numbers by weights that are not made yet")
            self._operations[_storage_key(x)].append(Operation(time, func, *refs, state=state))
        if not written:
            for i, x in enumerate(tree_leaves(out)):
                if isinstance(x, Tensor) and _storage_key(x) not in self._operations:
                    self._add(x, Operation(time, func, *refs, out=i, state=state))
        return written[0] if written and isinstance(out, Tensor) else out

    def _add(self, x: Tensor, operation: Operation) -> None:
        """Note an operation that makes a tensor."""
        self._storages.setdefault(_storage_key(x), x.detach())
        self._operations.setdefault(_storage_key(x), []).append(operation)

    def _tick(self) -> int:
        """The time of the next operation."""
        self._time += 1
        return self._time

    def _ref(self, x: object) -> object:
        """A `TensorRef` to a tensor that is not made yet; anything else as it is."""
        if not isinstance(x, Tensor) or x not in self:
            return x
        return TensorRef(_storage_key(x), tuple(x.size()), x.stride(), int(x.storage_offset()), x.dtype)

    def _materialize(self, key: int, before: int) -> Tensor:
        """All values of a storage as they are before a time, (n,)."""
        operations = [operation for operation in self._operations[key] if operation.time < before]
        like = self._storages[key]
        count = like.untyped_storage().nbytes() // like.dtype.itemsize
        # the last operation that all values come from: earlier ones need not run
        first = max(
            i
            for i, operation in enumerate(operations)
            if operation.out is not None or _overwrites(operation, key, count)
        )
        source = operations[first]
        changes_after = operations[first + 1 :]
        if source.out is None:
            row = like.new_empty(count, device="cpu")
            self._run(source, {key: row})
        elif source.func is EMPTY:
            row = like.new_empty(count, device="cpu")
        else:
            row = _flat(self._outputs(source)[source.out], like)
            if changes_after:
                row = row.clone()  # it may be the pages of a file
        for operation in changes_after:
            self._run(operation, {key: row})
        return row

    def _outputs(self, operation: Operation) -> list[Any]:
        """The outputs of an operation. Of the last one with several, such as codes and scales, they are cached."""
        if self._outputs_time == operation.time:
            return self._outputs_of_last
        outputs = tree_leaves(self._run(operation, {}))
        has_several = len(outputs) > 1
        self._outputs_time = operation.time if has_several else 0
        self._outputs_of_last = outputs if has_several else []
        return outputs

    def _run(self, operation: Operation, rows: Mapping[int, Tensor]) -> Any:  # noqa: ANN401, an operation's output
        """Run an operation on the values in `rows`, by key; other tensors are made first, as they were at its time."""

        def with_values(x: object) -> object:
            if not isinstance(x, TensorRef):
                return x
            row = rows[x.key] if x.key in rows else self._materialize(x.key, operation.time)
            return row.view(x.dtype).as_strided(x.size, x.stride, x.offset)

        inputs = (operation.args, operation.kwargs)
        args, kwargs = tree_map(with_values, inputs, is_leaf=lambda x: isinstance(x, TensorRef))
        if operation.state is not None:
            torch.set_rng_state(operation.state)
        return operation.func(*args, **kwargs)


def _storage_key(x: Tensor) -> int:
    """The identity of a tensor's storage, which is one Python object as long as a tensor uses it."""
    return id(x.untyped_storage())


def _to_meta(x: object) -> object:
    """A tensor's shape and dtype alone; anything else as it is."""
    return x.detach().to("meta") if isinstance(x, Tensor) and not x.is_meta else x


def _blank(x: object) -> object:
    """Memory with any values for a tensor that is not made yet; anything else as it is."""
    return torch.empty_like(x, device="cpu") if isinstance(x, Tensor) and x.is_meta else x


def _written_tensors(func: Any, args: tuple[Any, ...]) -> list[Tensor]:  # noqa: ANN401, an operation
    """The tensors that an operation writes to."""
    written: list[Tensor] = []
    for argument, x in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(x)
    return written


def _overwrites(operation: Operation, key: int, count: int) -> bool:
    """Whether an operation writes all `count` values of a storage, whatever they were."""
    name = getattr(operation.func, "__name__", "").partition(".")[0]
    if name not in OVERWRITING or not operation.args:
        return False
    target = operation.args[0]
    return isinstance(target, TensorRef) and target.key == key and prod(target.size) == count


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """The values of a tensor as (n,), in the memory order of `like`."""
    if x.is_contiguous() and like.is_contiguous():
        return x.detach().reshape(-1)
    row = x.new_empty(x.numel())
    row.as_strided(like.size(), like.stride()).copy_(x)
    return row


def _copy_to(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy of a tensor on a device, with its strides."""
    return torch.empty_like(x, device=device, memory_format=torch.preserve_format).copy_(x)


def leaf(x: Tensor) -> Tensor:
    """A tensor that must not be changed, such as one of a file. Inside `Deferred` it is read later."""
    deferred = _entered.get()
    if deferred is None:
        return x
    return deferred.leaf(lambda: x, x)


def derived(f: Callable[[Tensor], Tensor], x: Tensor, like: Tensor) -> Tensor:
    """f(x), shaped like `like`: made later, where x is; `like` itself, where x has no values at all."""
    deferred = _entered.get()
    if deferred is not None and x in deferred:
        return deferred.leaf(lambda: f(deferred.materialize(x)), like)
    if x.is_meta or is_fake(x):
        return like
    return f(x)


def is_fake(x: Tensor) -> bool:
    """Whether a tensor is torch's `FakeTensor`: a device and a shape without values, to count bytes."""
    return isinstance(x, FakeTensor)


@contextmanager
def unnoted() -> Generator[None, None, None]:
    """Inside, no operation is noted: weights are made at once."""
    with _disable_current_modes():
        yield
