"""Weights that are not made yet: a net is built without them, and each is made when its device, or a rank's part, is.

Inside `Deferred`, memory that is allocated for numbers on the CPU has none, and what is done to it is noted: that it is
drawn, scaled, copied, cast. `Deferred` then makes one tensor at a time, by doing it. A draw is noted with the
generator's state, and the generator goes on as if it had drawn, so the numbers are those of a net that is built as it
stands, to the bit. A tensor in a file (`leaf`) is read when it is wanted.

The host then never holds more than the largest tensor, and what a rank keeps.

What looks at the numbers while it builds fails. `trunc_normal_`, `orthogonal_` and `sparse_` of `torch.nn.init` leave
them out, so nets from outside are built as they stand.
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

Make = Callable[[], Tensor]
WHOLE = ("uniform_", "normal_", "zero_", "fill_", "copy_", "random_", "exponential_")  # what was there is lost

EMPTY = torch.ops.aten.empty.memory_format
CPU = torch.device("cpu")
_now: ContextVar["Deferred | None"] = ContextVar("deferred", default=None)


@dataclass(frozen=True)
class Ref:
    """A view of a tensor that is not made yet."""

    key: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Note:
    """An operation: when, on what, and the generator's state before; its output of place `out` is the tensor."""

    time: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int | None = None  # None: it changes what is there
    state: Tensor | None = None


class Deferred(TorchDispatchMode):
    """Notes, while it is entered, how weights are made; `made` makes them. On the device 'meta' they stand for them."""

    def __init__(self) -> None:
        """Of no weights yet."""
        super().__init__()
        self._notes: dict[int, list[Note]] = {}
        self._kept: dict[int, Tensor] = {}  # so that no other tensor gets its key
        self._time = 0
        self._several: tuple[int, list[Any]] = (0, [])  # the last operation of several outputs, and those

    def __enter__(self) -> "Deferred":
        """Begin to note."""
        self._before = _now.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401, as torch has it
        """Stop."""
        _now.reset(self._before)
        super().__exit__(*error)

    def __contains__(self, x: Tensor) -> bool:
        """Whether a tensor is not made yet, and known here."""
        return x.is_meta and key(x) in self._notes

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run one operation, or note it."""
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is EMPTY and (kwargs.get("device") or CPU) == CPU:
            if (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point:
                return self._new(func, args, kwargs)
        elif any(x in self for x in given):
            return self._note(func, args, kwargs)
        elif given and str(kwargs.get("device")) == "meta":  # to go where the weights are
            kwargs = kwargs | {"device": CPU}
        return func(*args, **kwargs)

    def leaf(self, make: Make, like: Tensor) -> Tensor:
        """A tensor shaped like another one, that `make` makes; what it makes is never changed."""
        with _disable_current_modes():
            x = torch.empty_like(like, device="meta", requires_grad=False)
        self.put(x, make)
        return x

    def put(self, x: Tensor, make: Make) -> None:
        """From now on `make` makes all of this tensor."""
        self._keep(x, Note(self._tick(), make, (), {}, out=0))  # what was made of it before is as it was

    def made(self, x: Tensor) -> Tensor:
        """The numbers of a tensor on the CPU, which no one may change; itself, where it was there already."""
        if x not in self:
            return x.detach()
        with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self._made(key(x), self._time + 1).as_strided(x.size(), x.stride(), x.storage_offset())

    def fill(self, net: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
        """Make all weights of a net, in place, one by one on a device."""
        found: dict[int, Tensor] = {}
        for module in net.modules():
            for name, p in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                if p in self:
                    own = found.get(id(p))
                    if own is None:
                        found[id(p)] = own = nn.Parameter(owned(self.made(p), device), p.requires_grad)
                    setattr(module, name, own)
            for name, b in [*module.named_buffers(recurse=False, remove_duplicate=False)]:
                if b in self:
                    setattr(module, name, found.setdefault(id(b), owned(self.made(b), device)))
        return net.to(device)

    def strange(self, net: nn.Module) -> list[str]:
        """The tensors of a net that hold no numbers, and are not known here."""
        named = (*net.named_parameters(), *net.named_buffers())
        return [name for name, x in named if x.is_meta and x not in self]

    def _new(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:  # noqa: ANN401, an operation
        """Memory without numbers."""
        x = func(*args, **kwargs | {"device": torch.device("meta")})
        self._keep(x, Note(self._tick(), func, args, kwargs, out=0))
        return x

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401, as `_new`
        """Note an operation on what is not made yet."""
        if kwargs.get("generator") is not None or "out" in kwargs:
            raise RuntimeError(f"{func} on weights that are not made yet draws by a generator of its own, or has out=")
        refs = tree_map(self._ref, (args, kwargs))
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            state = torch.get_rng_state()
            func(*tree_map(blank, args), **tree_map(blank, kwargs))  # the generator goes on
        out = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        time = self._tick()
        changed = changes(func, args)
        for x in changed:
            if x not in self:
                raise RuntimeError(f"{func} changes numbers by weights that are not made yet")
            self._notes[key(x)].append(Note(time, func, *refs, state=state))
        for i, x in enumerate(tree_leaves(out)):
            if isinstance(x, Tensor) and key(x) not in self._notes and not changed:
                self._keep(x, Note(time, func, *refs, out=i, state=state))
        return changed[0] if changed and isinstance(out, Tensor) else out

    def _keep(self, x: Tensor, note: Note) -> None:
        """Remember a tensor."""
        self._kept.setdefault(key(x), x.detach())
        self._notes.setdefault(key(x), []).append(note)

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def _ref(self, x: object) -> object:
        if not isinstance(x, Tensor) or x not in self:
            return x
        return Ref(key(x), tuple(x.size()), x.stride(), int(x.storage_offset()), x.dtype)

    def _made(self, place: int, before: int) -> Tensor:
        """All numbers of a storage as they are before a time, as one row."""
        notes, own = [note for note in self._notes[place] if note.time < before], self._kept[place]
        numbers = own.untyped_storage().nbytes() // own.dtype.itemsize
        first = max(i for i, note in enumerate(notes) if note.out is not None or overwrites(note, place, numbers))
        begin, notes = notes[first], notes[first + 1 :]
        if begin.out is None or begin.func is EMPTY:
            row, notes = own.new_empty(numbers, device="cpu"), [begin, *notes] if begin.out is None else notes
        else:
            row = flat(self._outputs(begin)[begin.out], own)
            row = row.clone() if notes else row  # a file's pages
        for note in notes:
            self._run(note, {place: row})
        return row

    def _outputs(self, note: Note) -> list[Any]:
        """What an operation gives; of several outputs, such as codes and scales, those of the last are kept."""
        if self._several[0] != note.time:
            outputs = tree_leaves(self._run(note, {}))
            self._several = (note.time, outputs) if len(outputs) > 1 else (0, [])
            return outputs
        return self._several[1]

    def _run(self, note: Note, there: Mapping[int, Tensor]) -> Any:  # noqa: ANN401, what an operation gives
        """Do what was noted, on the numbers that are there."""

        def real(x: object) -> object:
            if not isinstance(x, Ref):
                return x
            row = there[x.key] if x.key in there else self._made(x.key, note.time)
            return row.view(x.dtype).as_strided(x.size, x.stride, x.offset)

        args, kwargs = tree_map(real, (note.args, note.kwargs), is_leaf=lambda x: isinstance(x, Ref))
        if note.state is not None:
            torch.set_rng_state(note.state)
        return note.func(*args, **kwargs)


def key(x: Tensor) -> int:
    """Of a tensor's storage, which torch shows as one object while a tensor is on it."""
    return id(x.untyped_storage())


def bare(x: object) -> object:
    """Shape and type alone."""
    return x.detach().to("meta") if isinstance(x, Tensor) and not x.is_meta else x


def blank(x: object) -> object:
    """Memory of its own for a tensor that is not made yet."""
    return torch.empty_like(x, device="cpu") if isinstance(x, Tensor) and x.is_meta else x


def changes(func: Any, args: tuple[Any, ...]) -> list[Tensor]:  # noqa: ANN401, an operation
    """The tensors that an operation writes to."""
    given = zip(func._schema.arguments, args, strict=False)
    return [x for about, x in given if about.alias_info is not None and about.alias_info.is_write]


def overwrites(note: Note, place: int, numbers: int) -> bool:
    """Whether nothing stays of what a storage held."""
    name, target = getattr(note.func, "__name__", "").partition(".")[0], note.args[0] if note.args else None
    return name in WHOLE and isinstance(target, Ref) and target.key == place and prod(target.size) == numbers


def flat(x: Tensor, like: Tensor) -> Tensor:
    """The numbers of a tensor in one row, as those of `like` lie."""
    if x.is_contiguous() and like.is_contiguous():
        return x.detach().reshape(-1)
    row = x.new_empty(x.numel())
    row.as_strided(like.size(), like.stride()).copy_(x)
    return row


def owned(x: Tensor, device: torch.device | str) -> Tensor:
    """The numbers on a device, in memory of their own."""
    return torch.empty_like(x, device=device, memory_format=torch.preserve_format).copy_(x)


def leaf(x: Tensor) -> Tensor:
    """A tensor that is not to be changed, such as one of a file: to be made, where weights are noted, else itself."""
    here = _now.get()
    return x if here is None else here.leaf(lambda: x, x)


def derived(f: Callable[[Tensor], Tensor], x: Tensor, like: Tensor) -> Tensor:
    """f(x), shaped like another tensor: to be made, where x is; where x holds no numbers, the other."""
    here = _now.get()
    if here is not None and x in here:
        return here.leaf(lambda: f(here.made(x)), like)
    return like if x.is_meta or is_fake(x) else f(x)


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has a device and a shape alone: its bytes are counted, and it holds no numbers."""
    return isinstance(x, FakeTensor)


@contextmanager
def unnoted() -> Generator[None, None, None]:
    """Inside, weights are made as they come."""
    with _disable_current_modes():
        yield
