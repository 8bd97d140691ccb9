"""A tape: tangents that come later, kept as data, and how they are played.

A `Later` knows the function that will compute it and all that this needs, so a tape is no list that somebody holds, but
what its ends refer to. It plays once. What is written to before its time has come is refused, as autograd does it.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Union, cast

import torch
from torch import Tensor

from dumo.autodiff.error import WrittenTo as WrittenTo


class Later:
    """A tangent still to come: `push(*tangents of moved, *saved)`, of this shape and dtype. Data, never a closure."""

    def __init__(
        self,
        shape: Iterable[int],
        dtype: torch.dtype,
        push: Callable[..., Tensor] | None = None,
        moved: tuple["Moved", ...] = (),
        saved: Sequence[object] = (),
        writes: int | None = None,
    ) -> None:
        """Without `push` it is an input, whose value is set by hand. `saved` and `writes` are as `keep` gives them."""
        self.shape, self.dtype, self.push, self.moved, self.saved = tuple(shape), dtype, push, moved, saved
        self.value: Tensor | None = None
        self.writes = writes


Moved = Union[Tensor, Later, None]  # noqa: UP007, what an operand's tangent is; None: it does not move


def keep(saved: Iterable[object]) -> tuple[Sequence[object], int | None]:
    """These without their graph, and how often their tensors have been written to; None: a compiler does not know."""
    kept: list[object] = []  # every operation of a tape comes by: one loop, and nothing expensive
    writes = None if torch.compiler.is_dynamo_compiling() else 0
    for x in saved:
        if isinstance(x, Tensor):
            x = x.detach()  # which shares the count
            if writes is not None:
                writes += x._version
        kept.append(x)
    return kept, writes


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
                now.value = fit(now.push(*tangents, *now.saved), now.shape, now.dtype)
                now.moved = now.saved = ()
                now.writes = None


@cache
def compiled_play() -> Callable[[Iterable[Later]], None]:
    """`play` as one graph, for nets whose blocks are compiled: where they return Duals, only data is left to play."""
    return torch.compile(play, fullgraph=True)


def holds(ends: Iterable[Later]) -> bool:
    """Whether all that these tangents need is still there: sharded weights may have been given back meanwhile.

    Raises WrittenTo where it is there, but no longer what it was.
    """
    stack, seen = list(ends), set[int]()
    while stack:
        now = stack.pop()
        if id(now) in seen:
            continue
        seen.add(id(now))
        writes = 0
        for x in now.saved:
            if isinstance(x, Tensor):
                if x.numel() and not x.untyped_storage().size():
                    return False
                writes += x._version
        if now.writes is not None and writes != now.writes:
            raise WrittenTo(getattr(now.push, "__name__", ""))
        stack.extend(m for m in now.moved if isinstance(m, Later))
    return True


def fit(t: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tangent in the shape and dtype of its primal."""
    t = t if t.shape == shape else t.expand(shape)
    return t if t.dtype == dtype else t.to(dtype)


def _now(moved: Moved) -> Tensor | None:
    """A tangent that is known by now; an input's may have been set in another dtype."""
    if not isinstance(moved, Later) or moved.value is None:
        return cast(Tensor | None, moved)
    return fit(moved.value, moved.shape, moved.dtype)
