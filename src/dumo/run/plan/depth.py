"""A count of a deep net by a few of its blocks: those that are alike, one after another, cost alike.

So a count is affine in the length of each such stretch of blocks: its value with one block of each, and with one more
of each in turn, tells it for all.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

from torch import nn

from dumo.nets.dualized import Dualized
from dumo.nets.twin import exchanged

FEW = 6  # blocks up to which all are run: ours
M = TypeVar("M", bound=nn.Module)


class Stretch(NamedTuple):
    """Blocks that are alike and run one after another, and the path of the list that they are in."""

    path: str
    blocks: list[nn.Module]


def by_depth(net: M, count: Callable[[M], int], *, check: bool = False) -> int:
    """A count of a net: of all of it, or, where it is deep, of its first few blocks of each stretch, and so of all.

    `check`: where the ends of a net may outweigh a few blocks, as of bytes. Then the first count has two blocks, and
    two more must add twice what one more adds, or all are counted; and so they are where two stretches are deep, of
    which now this, now that may outweigh the other.
    """
    lengths, few = [len(stretch.blocks) for stretch in stretches(net)], 2 if check else 1
    deep = [i for i, n in enumerate(lengths) if n > few]
    if sum(lengths) <= FEW or not deep or (check and len(deep) > 1):
        return count(net)

    def at(i: int | None = None, more: int = 1) -> int:
        return count(cut(net, [min(n, few + more * (i == j)) for j, n in enumerate(lengths)]))

    first = at()
    steps = {i: at(i) - first for i in deep}
    if check and any(step == 0 or at(i, 2) != first + 2 * step for i, step in steps.items() if lengths[i] > few + 1):
        return count(net)
    return first + sum((lengths[i] - few) * step for i, step in steps.items())


def short(net: M) -> M:
    """The net with the first block of each stretch alone."""
    return cut(net, [1 for _ in stretches(net)])


def cut(net: M, lengths: Sequence[int]) -> M:
    """The net with so many first blocks of each stretch. All parts are shared, and the net is left as it is."""
    kept: dict[str, list[nn.Module]] = {}
    for stretch, n in zip(stretches(net), lengths, strict=True):
        kept.setdefault(stretch.path, []).extend(stretch.blocks[:n])
    return exchanged(net, {path: nn.ModuleList(blocks) for path, blocks in kept.items()})


def stretches(net: nn.Module) -> list[Stretch]:
    """All of a net whose blocks may be left out: a pretrained one, or one of `blocks` alike but for the last."""
    if isinstance(net, Dualized):
        lists = {f"model.{name}": part for name, part in net.model.named_children() if isinstance(part, nn.ModuleList)}
    else:
        blocks = getattr(net, "blocks", None)
        lists = (
            {"blocks": blocks} if isinstance(blocks, nn.ModuleList) and len({*map(kind, [*blocks][:-1])}) <= 1 else {}
        )
    return [Stretch(path, [*alike]) for path, blocks in lists.items() for _, alike in groupby(blocks, kind)]


def kind(block: nn.Module) -> tuple[object, ...]:
    """What blocks that cost alike have in common: their class, and the shapes of what is trained and of what rests."""
    return type(block), *((name, p.shape, p.requires_grad) for name, p in block.named_parameters())
