"""How the rows of a global batch are split over ranks and micro-batches.

A batch is split over ranks, and a rank's rows over its micro-batches: consecutive rows, of nearly equal size, equally
many on every rank. The gradient is that of the mean loss over the global batch, so the split changes rounding only, and
two ranks equal one rank with two micro-batches, to the bit.
"""

from itertools import pairwise
from math import ceil, lcm

from dumo.flow.trainable import group_size
from dumo.runtime import dist
from dumo.training.settings import Train
from dumo.types import Objective, UserError


def rows_kept_together(spec: Train, objective: Objective) -> int:
    """How many neighbouring rows share times, noise or targets; a micro-batch must not part them."""
    return lcm(group_size(objective), spec.coupling.group if spec.coupling else 1)


def split_batch(spec: Train, objective: Objective, ranks: int) -> list[list[slice]]:
    """Split the global batch: for each rank, the rows of each of its micro-batches.

    A micro-batch has at most `train.micro_batch` rows (None: all of a rank's), and never parts rows that belong
    together. Raises UserError if the batch is not a multiple of a group of such rows, a group exceeds
    `train.micro_batch`, or there are fewer groups than micro-batches.
    """
    batch = spec.batch
    micro_batch = spec.micro_batch
    group = rows_kept_together(spec, objective)
    if batch % group:
        raise UserError(f"train.batch = {batch} must be a multiple of {group}, the rows that belong together")
    if micro_batch is not None and micro_batch < group:
        raise UserError(
            f"train.micro_batch = {micro_batch} parts {group} rows that belong together: raise it to {group} or more"
        )
    groups = batch // group
    max_groups_per_micro_batch = batch if micro_batch is None else micro_batch // group
    micro_batches_per_rank = ceil(groups / (max_groups_per_micro_batch * ranks))
    total = ranks * micro_batches_per_rank
    if total > groups:
        content = f"{groups} rows" if group == 1 else f"{groups} groups of {group} rows"
        raise UserError(
            f"train.batch = {batch} is {content}, too few for {micro_batches_per_rank} micro-batches on each of "
            f"{ranks} ranks: raise it, or use fewer ranks"
        )
    ends = [groups * i // total * group for i in range(total + 1)]
    rows = [slice(start, end) for start, end in pairwise(ends)]
    return [rows[rank * micro_batches_per_rank : (rank + 1) * micro_batches_per_rank] for rank in range(ranks)]


def rows_of_rank(spec: Train, objective: Objective) -> tuple[slice, list[slice]]:
    """The rows of the global batch that this rank takes, and those of its micro-batches, counted from the first one.

    Raises UserError as `split_batch`.
    """
    micro_batches = split_batch(spec, objective, dist.world())[dist.rank()]
    first = micro_batches[0].start
    local = [slice(rows.start - first, rows.stop - first) for rows in micro_batches]
    return slice(first, micro_batches[-1].stop), local
