"""Whether a batch can be cut into passes, on one rank or many, each with all kinds of rows."""

from itertools import chain

from dumo.config.tree import Tree
from dumo.flow.times import Jumps, Pair
from dumo.training.cut import passes, share_of, together
from dumo.types import UserError


def check_pieces(run: Tree, ranks: int = 1) -> None:
    """Refuse a batch that so many ranks cannot cut into passes, each with all kinds of rows; and what takes one rank.

    Passes are cut as `dumo.training.cut` does.
    """
    train, times, group = run.train, run.objective.times, together(run.train, run.objective)
    try:
        pieces = passes(train, run.objective, ranks)
    except UserError as error:
        raise UserError(f"{error}{_grouped(run) if group > 1 else ''}") from error
    moving = times.moving(train.batch)
    if moving is not None and 0 < times.moving_share < 1:
        for rows in chain.from_iterable(pieces):
            if len(set(moving[rows])) == 1:
                raise UserError(_lacking(run, ranks, rows, "r = t" if moving[rows.start] else "r < t"))
    share_of(train.share, ranks)
    if ranks > 1 and train.compile == "loss":
        raise UserError(f"train.compile = loss is for one rank, not for {ranks}: set train.compile=blocks")


def _grouped(run: Tree) -> str:
    """Which fields make rows belong together."""
    times, guide = run.objective.times, run.objective.needs.guide
    said = [f"objective.times of kind '{times.kind}' keeps {times.group} rows together"] if times.group > 1 else []
    if guide and guide.group > 1:
        said.append(f"objective.guide.fraction = {1 / guide.group:g} picks one of every {guide.group}")
    if run.objective.needs.group > 1:
        said.append(f"the objective compares {run.objective.needs.group} rows")
    if run.train.coupling:
        said.append(f"train.coupling lets {run.train.coupling.group} rows exchange noise")
    return f" ({' and '.join(said)})"


def _lacking(run: Tree, ranks: int, rows: slice, kind: str) -> str:
    """Which piece lacks rows of this kind, and the way out."""
    train, times, n = run.train, run.objective.times, rows.stop - rows.start
    where = f"objective.times of kind '{times.kind}'"
    if isinstance(times, Jumps | Pair):
        where = f"objective.times.velocity_ratio = {times.velocity_ratio:g}"
    cut = f", train.micro_batch = {train.micro_batch}" if train.micro_batch else ""
    cut += f", {ranks} ranks" if ranks > 1 else ""
    ways = ["raise train.batch", *(["train.micro_batch"] if train.micro_batch else [])]
    return (
        f"train.batch = {train.batch} has a pass of {n} rows{f' ({cut[2:]})' if cut else ''} without one with {kind} "
        f"at {where}: {' or '.join(ways)}{', or take fewer ranks' if ranks > 1 else ''}"
    )
