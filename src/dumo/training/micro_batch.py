"""Split the rows of a global batch over ranks and micro-batches.

Micro-batches are consecutive rows of nearly equal size, and every rank has the same number of them. The gradient is
that of the mean loss over the global batch, so the split affects only rounding, and two ranks are bit-identical to one
rank with two micro-batches.
"""

from itertools import pairwise
from math import ceil, lcm

from dumo.flow.trainable import group_size
from dumo.runtime import dist
from dumo.training.settings import Train
from dumo.types import Objective, UserError


def rows_kept_together(spec: Train, objective: Objective) -> int:
    """Return the size of groups of rows that share times, noise or targets. A micro-batch must not split a group."""
    return lcm(group_size(objective), spec.coupling.group if spec.coupling else 1)


def split_batch(spec: Train, objective: Objective, ranks: int) -> list[list[slice]]:
    """Split the global batch. Return, for each rank, the rows of each of its micro-batches.

    A micro-batch has at most `train.micro_batch` rows (None means all rows of a rank) and never splits a group
    (`rows_kept_together`). Raise UserError if the batch is not a multiple of the group size, if a group exceeds
    `train.micro_batch`, or if there are fewer groups than micro-batches.
    """
    batch = spec.batch
    micro_batch = spec.micro_batch
    group = rows_kept_together(spec, objective)
    if batch % group:
        raise UserError(f"train.batch = {batch} must be a multiple of {group}, the size of a group of dependent rows")
    if micro_batch is not None and micro_batch < group:
        raise UserError(
            f"train.micro_batch = {micro_batch} would split groups of {group} dependent rows: increase it to {group} "
            "or more"
        )
    groups = batch // group
    max_groups_per_micro_batch = batch if micro_batch is None else micro_batch // group
    micro_batches_per_rank = ceil(groups / (max_groups_per_micro_batch * ranks))
    total = ranks * micro_batches_per_rank
    if total > groups:
        content = f"{groups} rows" if group == 1 else f"{groups} groups of {group} rows"
        raise UserError(
            f"train.batch = {batch} is {content}, too few for {micro_batches_per_rank} micro-batches on each of "
            f"{ranks} ranks: increase it, or use fewer ranks"
        )
    ends = [groups * i // total * group for i in range(total + 1)]
    rows = [slice(start, end) for start, end in pairwise(ends)]
    return [rows[rank * micro_batches_per_rank : (rank + 1) * micro_batches_per_rank] for rank in range(ranks)]


def rows_of_rank(spec: Train, objective: Objective) -> tuple[slice, list[slice]]:
    """Return this rank's rows of the global batch, and the rows of its micro-batches relative to the first of them."""
    micro_batches = split_batch(spec, objective, dist.world())[dist.rank()]
    first = micro_batches[0].start
    local = [slice(rows.start - first, rows.stop - first) for rows in micro_batches]
    return slice(first, micro_batches[-1].stop), local
