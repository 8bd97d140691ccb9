"""Which rows of a batch each pass takes: a batch is split over ranks, and a rank's rows over its passes.

Pieces are consecutive rows, of nearly equal size, and every rank has equally many: so one rank with two passes and two
ranks with one pass cut a batch at the same rows.
"""

from itertools import pairwise
from math import ceil, lcm

from dumo.training.spec import Train
from dumo.types import Objective, UserError


def together(spec: Train, objective: Objective) -> int:
    """How many neighbouring rows share times, noise or targets: no pass may part them."""
    return lcm(objective.times.group, objective.needs.group, spec.coupling.group if spec.coupling else 1)


def cuts(batch: int, *, ranks: int = 1, micro_batch: int | None = None, group: int = 1) -> list[list[slice]]:
    """The rows of every pass, by rank: at most `micro_batch` (None: all of a rank's), in whole groups of `group` rows.

    Raises UserError if the batch is not a multiple of `group`, a group exceeds `micro_batch`, or there are fewer groups
    than passes.
    """
    if batch % group:
        raise UserError(f"train.batch = {batch} is no multiple of {group}, the rows that belong together: change it")
    if micro_batch is not None and micro_batch < group:
        raise UserError(
            f"train.micro_batch = {micro_batch} parts {group} rows that belong together: raise it to {group} or more"
        )
    groups, most = batch // group, batch if micro_batch is None else micro_batch // group
    passes = ceil(groups / (most * ranks))
    if (pieces := ranks * passes) > groups:
        what = f"{groups} rows" if group == 1 else f"{groups} groups of {group} rows"
        raise UserError(
            f"train.batch = {batch} is {what}, too few for {passes} passes on each of {ranks} ranks: raise it, "
            "or take fewer ranks"
        )
    ends = [groups * i // pieces * group for i in range(pieces + 1)]
    rows = [slice(start, end) for start, end in pairwise(ends)]
    return [rows[rank * passes : (rank + 1) * passes] for rank in range(ranks)]


def passes(spec: Train, objective: Objective, ranks: int) -> list[list[slice]]:
    """The rows of every pass of a step, by rank. Raises UserError as `cuts`."""
    return cuts(spec.batch, ranks=ranks, micro_batch=spec.micro_batch, group=together(spec, objective))


def span(rows: list[slice]) -> slice:
    """All rows of a rank, given those of its passes."""
    return slice(rows[0].start, rows[-1].stop)


def share_of(asked: int, ranks: int) -> int:
    """How many ranks hold a copy of the weights between them: `asked`, or all where there are fewer.

    Raises UserError where that does not divide their number.
    """
    if ranks % (share := min(asked, ranks)):
        divisors = " or ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UserError(f"train.share = {share} does not divide {ranks} ranks: set train.share={divisors}")
    return share
