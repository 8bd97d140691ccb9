"""Weights that are not made yet: a net is built without them, and each is made when its device, or a rank's part, is.

1. Inside `with Deferred() as weights`, memory that is allocated for floats on the CPU is on 'meta' instead, and each
   operation on it is recorded: draws, products, copies, casts. A draw is recorded with the generator's state, and the
   generator advances as if it had drawn. `read_later` records a tensor in a file, `apply_later` a function of a weight.
   Inside `not_deferred`, weights are made at once.
2. `weights.replace` gives a tensor other values, such as those of a checkpoint.
3. `weights.materialize` makes one tensor, by running the recorded operations; `weights.fill` makes all of a net. The
   values are those of a net that is built without `Deferred`, to the bit.

The host then never holds more than the largest tensor, and what a rank keeps.

Operations are numbered in their order. A tensor's values at a number are those that the operations before it make, so
a copy keeps its values when its original is changed later.

Code that looks at values while it builds fails. `trunc_normal_`, `orthogonal_` and `sparse_` of `torch.nn.init` lose
their draws, so nets from outside are built without `Deferred`. The dispatch mode and the schema of operations are
private names of torch, which has no public way to record what a constructor does.
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
# Operations in place that keep no old value of the tensor, by torch's name.
_OVERWRITING = ("uniform_", "normal_", "zero_", "fill_", "copy_", "random_", "exponential_")
_EMPTY = torch.ops.aten.empty.memory_format  # the operation that allocates memory
CPU = torch.device("cpu")
_entered: ContextVar["Deferred | None"] = ContextVar("deferred", default=None)  # the mode that records now


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
    """A recorded operation, which makes or changes a tensor that is not made yet."""

    number: int  # in the order of all operations
    func: Callable[..., Any]
    args: tuple[Any, ...]  # with `TensorRef` in place of tensors that are not made yet
    kwargs: dict[str, Any]  # also with `TensorRef`
    output_index: int | None = None  # which of its outputs the tensor is; None: it changes the tensor in place
    generator_state: Tensor | None = None  # before it draws; None: it draws nothing


class Deferred(TorchDispatchMode):
    """Records how weights are made while it is entered; `materialize` makes them later. Until then they are on 'meta'.

    `x in weights` asks whether a tensor is not made yet.
    """

    def __init__(self) -> None:
        """Start without weights."""
        super().__init__()
        self._operations: dict[int, list[Operation]] = {}  # by the key of a storage
        self._storages: dict[int, Tensor] = {}  # by key; they live on, so that no other storage gets the key
        self._last_number = 0  # of the operations recorded so far
        self._cached_number = 0  # of the last operation that was run and had several outputs; 0: none
        self._cached_outputs: list[Any] = []  # what it returned

    def __enter__(self) -> "Deferred":
        """Begin to record operations."""
        self._token = _entered.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401, as torch has it
        """Stop recording operations."""
        _entered.reset(self._token)
        super().__exit__(*error)

    def __contains__(self, x: Tensor) -> bool:
        """Whether a tensor is not made yet, and can be made here."""
        return x.is_meta and _storage_key(x) in self._operations

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Record an operation that allocates or uses weights; run any other. Torch calls it for each operation."""
        kwargs = kwargs or {}
        if func is _EMPTY and (kwargs.get("device") or CPU) == CPU:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            if dtype.is_floating_point:
                return self._record_allocation(func, args, kwargs)
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x in self for x in tensors):
            return self._record_use(func, args, kwargs)
        if tensors and str(kwargs.get("device")) == "meta":
            kwargs = kwargs | {"device": CPU}  # a tensor with values is to go where the weights seem to be
        return func(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------ what others call

    def make_later(self, make: MakeTensor, like: Tensor) -> Tensor:
        """A tensor shaped like `like` that `make` makes later; the tensor that `make` returns is never changed."""
        with _disable_current_modes():
            x = torch.empty_like(like, device="meta", requires_grad=False)
        self.replace(x, make)
        return x

    def replace(self, x: Tensor, make: MakeTensor) -> None:
        """Let `make` make a tensor from now on. What was computed from the tensor before keeps its old values."""
        self._add(x, Operation(self._next_number(), make, (), {}, output_index=0))

    def materialize(self, x: Tensor) -> Tensor:
        """The values of a tensor, on the CPU, which must not be changed; a tensor that has values as it is."""
        if x not in self:
            return x.detach()
        with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            values = self._storage_values(_storage_key(x), self._last_number + 1)
            return values.as_strided(x.size(), x.stride(), x.storage_offset())

    def fill(self, net: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
        """Make all weights of a net, in place, one by one on a device. Tied weights stay tied. Returns the net."""
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

    # ------------------------------------------------------------------------------------------------------- recording

    def _record_allocation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:  # noqa: ANN401
        """Allocate on 'meta' in place of the CPU."""
        x = func(*args, **kwargs | {"device": torch.device("meta")})
        self._add(x, Operation(self._next_number(), func, args, kwargs, output_index=0))
        return x

    def _record_use(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Record an operation on tensors that are not made yet. Returns its output on 'meta'."""
        if kwargs.get("generator") is not None or "out" in kwargs:
            raise RuntimeError(f"{func} on weights that are not made yet draws by a generator of its own, or has out=")
        refs = tree_map(self._ref, (args, kwargs))

        # what it draws from
        generator_state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator_state = torch.get_rng_state()
            func(*tree_map(_blank, args), **tree_map(_blank, kwargs))  # the generator advances
        output = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        number = self._next_number()

        # what it writes to
        written = _written_tensors(func, args)
        if written:
            for x in written:
                if x not in self:
                    raise RuntimeError(f"{func} changes numbers by weights that are not made yet")
                self._add(x, Operation(number, func, *refs, generator_state=generator_state))
            return written[0] if isinstance(output, Tensor) else output

        # what it returns anew
        for i, x in enumerate(tree_leaves(output)):
            if isinstance(x, Tensor) and _storage_key(x) not in self._operations:  # else it is a view
                self._add(x, Operation(number, func, *refs, output_index=i, generator_state=generator_state))
        return output

    def _add(self, x: Tensor, operation: Operation) -> None:
        """Add an operation to those that make a tensor's storage."""
        self._storages.setdefault(_storage_key(x), x.detach())
        self._operations.setdefault(_storage_key(x), []).append(operation)

    def _next_number(self) -> int:
        """The number of the next operation."""
        self._last_number += 1
        return self._last_number

    def _ref(self, x: object) -> object:
        """A `TensorRef` to a tensor that is not made yet; anything else as it is."""
        if not isinstance(x, Tensor) or x not in self:
            return x
        return TensorRef(_storage_key(x), tuple(x.size()), x.stride(), int(x.storage_offset()), x.dtype)

    # --------------------------------------------------------------------------------------------------------- running

    def _storage_values(self, key: int, before: int) -> Tensor:
        """All values of a storage, (n,), as the operations with a number below `before` make them."""
        operations = [operation for operation in self._operations[key] if operation.number < before]
        like = self._storages[key]
        count = like.untyped_storage().nbytes() // like.dtype.itemsize

        # the last operation that gives all values: earlier ones need not run
        first = 0
        for i, operation in enumerate(operations):
            if operation.output_index is not None or _overwrites(operation, key, count):
                first = i
        source = operations[first]
        later_operations = operations[first + 1 :]

        if source.output_index is None:  # it overwrites whatever is there
            values = like.new_empty(count, device="cpu")
            self._run(source, {key: values})
        elif source.func is _EMPTY:
            values = like.new_empty(count, device="cpu")
        else:
            values = _flat(self._outputs(source)[source.output_index], like)
            if later_operations:
                values = values.clone()  # they may be the pages of a file
        for operation in later_operations:
            self._run(operation, {key: values})
        return values

    def _outputs(self, operation: Operation) -> list[Any]:
        """The outputs of an operation. Those of the last one with several, such as codes and scales, are cached."""
        if self._cached_number == operation.number:
            return self._cached_outputs
        outputs = tree_leaves(self._run(operation, {}))
        has_several = len(outputs) > 1
        self._cached_number = operation.number if has_several else 0
        self._cached_outputs = outputs if has_several else []
        return outputs

    def _run(self, operation: Operation, storages: Mapping[int, Tensor]) -> Any:  # noqa: ANN401, an operation's output
        """Run an operation on the values in `storages`, by key; other tensors are made first, as they were then."""

        def with_values(x: object) -> object:
            if not isinstance(x, TensorRef):
                return x
            values = storages[x.key] if x.key in storages else self._storage_values(x.key, operation.number)
            return values.view(x.dtype).as_strided(x.size, x.stride, x.offset)

        inputs = (operation.args, operation.kwargs)
        args, kwargs = tree_map(with_values, inputs, is_leaf=lambda x: isinstance(x, TensorRef))
        if operation.generator_state is not None:
            torch.set_rng_state(operation.generator_state)
        return operation.func(*args, **kwargs)


# ------------------------------------------------------------------------------ for code that builds with or without it


def read_later(x: Tensor) -> Tensor:
    """A tensor of a file, or another that must not be changed: inside `Deferred` it is read later, else it is x."""
    deferred = _entered.get()
    if deferred is None:
        return x
    return deferred.make_later(lambda: x, x)


def apply_later(f: Callable[[Tensor], Tensor], x: Tensor, like: Tensor) -> Tensor:
    """f(x), shaped like `like`. It is made later if x is; where x never has values, it is `like` itself."""
    deferred = _entered.get()
    if deferred is not None and x in deferred:
        return deferred.make_later(lambda: f(deferred.materialize(x)), like)
    if x.is_meta or is_fake(x):
        return like
    return f(x)


@contextmanager
def not_deferred() -> Generator[None, None, None]:
    """Inside, no operation is recorded: weights are made at once."""
    with _disable_current_modes():
        yield


def is_fake(x: Tensor) -> bool:
    """Whether a tensor is torch's `FakeTensor`: a device and a shape without values, to count bytes."""
    return isinstance(x, FakeTensor)


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
    for argument, x in zip(func._schema.arguments, args, strict=False):  # arguments that are left out have defaults
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(x)
    return written


def _overwrites(operation: Operation, key: int, count: int) -> bool:
    """Whether an operation writes all `count` values of a storage, whatever they were."""
    name = getattr(operation.func, "__name__", "").partition(".")[0]
    if name not in _OVERWRITING or not operation.args:
        return False
    target = operation.args[0]
    return isinstance(target, TensorRef) and target.key == key and prod(target.size) == count


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """The values of a tensor as (n,), in the memory order of `like`."""
    if x.is_contiguous() and like.is_contiguous():
        return x.detach().reshape(-1)
    values = x.new_empty(x.numel())
    values.as_strided(like.size(), like.stride()).copy_(x)
    return values


def _copy_to(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy of a tensor on a device, with its strides."""
    return torch.empty_like(x, device=device, memory_format=torch.preserve_format).copy_(x)
