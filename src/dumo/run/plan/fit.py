"""The first layout of a run on its ranks that keeps within a memory, of those that leave what it learns as it is.

Tried in this order: fewer rows at a time, blocks computed again in the backward pass (`net.checkpoint`), weights shared
by more ranks, weights given back after each pass.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

from dumo.run.config.change import override, shown
from dumo.run.config.check import check_pieces
from dumo.run.config.load import parse
from dumo.run.config.spec import Run
from dumo.run.plan import cluster, plan
from dumo.run.plan.plan import most_rows
from dumo.runtime.progress import sized
from dumo.training.layout import share_of
from dumo.types import UserError

FEWEST = 8  # rows at a time: fewer leave a GPU idle. Ours
Fields = dict[str, Any]  # dotted fields and their values


def fit(spec: Run, ranks: int, limit: int, tell: Callable[[str], object] = lambda line: None) -> Fields:
    """The fields to set, of the first layout whose peak on each rank is at most `limit` bytes.

    `tell` hears of each layout that is tried. Raises UserError where none fits, or the run does not fit so many ranks.
    """
    held, tried, counted = plan.held(spec), dict[str, int](), set[str]()

    def fits(fields: Fields) -> bool:
        name, run = " ".join(words(fields)) or "as it is", changed(spec, fields)
        if name not in tried:
            tried[name] = at_least(run, ranks, held)
            if tried[name] <= limit:
                counted.add(name)
                tried[name] = sum(cluster.counted(run, ranks).memory.values())
            tell(f"{name}: {'' if name in counted else 'more than '}{sized(tried[name], 1024)}")
        return tried[name] <= limit

    for layout in layouts(spec, ranks):
        first, *others = (layout | rows for rows in halved(changed(spec, layout), ranks))
        if fits(first):
            return first
        if others and fits(others[-1]):  # else none does
            return next(fields for fields in others if fits(fields))
    name = min(counted or tried, key=lambda name: tried[name])
    least = f"{'' if counted else 'more than '}{sized(tried[name], 1024)}, {name}"
    raise UserError(
        f"no layout keeps within {sized(limit, 1024)} on each of {ranks} rank{'s' if ranks > 1 else ''}: the least is "
        f"{least}. Take more ranks, larger GPUs, or a smaller net"
    )


def at_least(spec: Run, ranks: int, held: Mapping[str, int]) -> int:
    """Bytes that a rank holds at the end of a forward pass, activations left out: known without one."""
    stays = held["weights"] + held["optimizer"] + held["averages"]
    share = share_of(spec.train.share, ranks)
    return stays // share + (held["weights"] if ranks > 1 and not spec.train.reshard else 0)


def layouts(spec: Run, ranks: int) -> Iterator[Fields]:
    """The fields to set, besides rows at a time; the run as it is first, and then what takes less memory."""
    share = share_of(spec.train.share, ranks)
    shares = [n for n in range(share, ranks + 1) if ranks % n == 0]
    lie = [
        *((n, spec.train.reshard) for n in shares),
        *([(ranks, True)] if ranks > 1 and not spec.train.reshard else []),
    ]
    lean = (False, True) if getattr(spec.net, "checkpoint", None) is False else (False,)
    for (n, reshard), checkpoint in product(lie, lean):
        asked = {"net.checkpoint": checkpoint, "train.share": n, "train.reshard": reshard}
        given = {"net.checkpoint": False, "train.share": share, "train.reshard": spec.train.reshard}
        yield {field: value for field, value in asked.items() if value != given[field]}


def halved(spec: Run, ranks: int) -> Iterator[Fields]:
    """Rows at a time: those of the run, then half of them again and again, where its batch can be cut so."""
    yield {}
    rows = most_rows(spec, ranks) // 2
    while rows >= FEWEST:
        fields = {"train.micro_batch": rows}
        try:
            check_pieces(changed(spec, fields), ranks)
        except UserError:  # groups of rows, or kinds of them, would be parted
            return
        yield fields
        rows //= 2


def changed(spec: Run, fields: Fields) -> Run:
    """The run with these fields set."""
    tree = spec.model_dump(mode="json")
    override(tree, words(fields))
    return parse(Run, tree)


def words(fields: Fields) -> list[str]:
    """The fields as `--set` takes them."""
    return [f"{name}={shown(value)}" for name, value in fields.items()]
