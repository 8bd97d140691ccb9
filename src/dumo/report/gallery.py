"""Galleries: what a net makes by number of passes, as it was after several steps of its training; and class by class.

Trajectories (paper, Figs. 5 and 6) have a row per image and a column per number of passes. A row starts from the same
noise in every column, by every reading and after every step: what differs is the net. Class grids (Figs. 7 to 10) have
a block of images per class, which is the same whatever other classes are drawn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dumo.config import word
from dumo.flow.generate import joined, labels
from dumo.flow.reading import head_of
from dumo.flow.solver import Euler, Heun, Hop, Restart, Solver, able, check
from dumo.io import picture
from dumo.io.picture import labelled
from dumo.run.judge import real_data
from dumo.run.origin import require_place
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder, load_net
from dumo.runtime.progress import Bar, Tick, no_bar
from dumo.training import checkpoint
from dumo.types import UserError

PASSES = (1, 2, 4, 8, 16, 50)  # of the trajectories
COUNT = 8  # rows of trajectories; images of a class
POINTS = 2000  # of a scatter; of the data behind it, twice as many
GAP = 18  # pixels between panels, and between the blocks of a class grid


@dataclass(frozen=True)
class Reading:
    """A way to sample a net: u, by jumps, or v, along the velocity. `title` says which head is read, and how."""

    letter: str
    head: str  # the one that it reads: v may be read off a head of another name
    title: str
    solver: Solver = field(hash=False)

    @property
    def name(self) -> str:
        """The letter and the solver, on two lines."""
        return f"{self.letter} by\n{solver_title(self.solver)}"

    def at(self, nfe: int) -> Solver:
        """The solver of this number of passes: Euler where this one's steps take more than one and do not divide."""
        return self.solver if nfe % self.solver.passes == 0 else Euler()


Panels = Mapping[Reading, Mapping[int, Image.Image]]  # a picture by reading and step


def readings(sampler: Sampler, along: Euler | Heun | None = None) -> dict[str, Reading]:
    """The readings that the objective taught, by letter; v takes steps by `along`, Euler's if None."""
    objective, reads, along, found = sampler.flow.objective, sampler.taught, along or Euler(), dict[str, Reading]()
    jumps = [s for s in (sampler.spec.solver, Restart(), Hop()) if s.uses != "velocity" and getattr(reads, s.uses)]
    if jumps:
        head = head_name(head_of(objective, jumps[0].uses))
        heads = f"{head} heads" if " and " in head else f"{head} head"
        found["u"] = Reading("u", head, f"{heads}, jumps ({jumps[0].kind})", jumps[0])
    if reads.velocity:
        head = head_name(head_of(objective, "velocity"))
        other = f"v = {head} at r = t" if "r" in objective.needs.inputs else f"v by the {head} head"
        title = "v head" if head == "v" else other
        found["v"] = Reading("v", head, f"{title}, {along.kind.title()} steps", along)
    return found


def head_name(head: str) -> str:
    """A head as a reader knows it."""
    return word.HEADS.get(head, head)


def within(nfe: Iterable[int], sampler: Sampler, by: Iterable[Reading]) -> list[int]:
    """Those numbers of passes that all these readings can make; the sampler's own, which they can, if none is left."""
    by, reads = list(by), sampler.taught
    return [n for n in nfe if all(able(one.at(n), reads, n) for one in by)] or list(sampler.spec.nfe)


def trajectories(
    opened: RunFolder,
    *,
    nfe: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    count: int | None = None,
    only: Sequence[int] | None = None,
    letters: Sequence[str] | None = None,
    seed: int | None = None,
    bar: Bar = no_bar,
) -> dict[Reading, dict[int, Image.Image]]:
    """A picture per reading and step: a row per image (points: one row of scatters), a column per number of passes.

    `nfe` None: those of `PASSES` that all readings can make. `steps` None: every milestone and the last checkpoint.
    `letters` None: u and v, if taught. `only`: classes of the rows, in turn. Raises UserError, before any work, for a
    step, reading, label or nfe that is not there.
    """
    sampler, found = opened.sampler, stages(opened.folder, opened.step, steps)
    ways = choose(sampler, letters, nfe)
    nfe = nfe or within(PASSES, sampler, ways)
    c = sampler.conditions.in_turn(count or (COUNT if sampler.is_image else POINTS), only)
    behind = None if sampler.is_image else real_data(sampler.data).reference(2 * POINTS, sampler.spec.seed)[0]
    panels: dict[Reading, dict[int, Image.Image]] = {reading: {} for reading in ways}
    with bar("sampling trajectories", len(found) * len(ways) * sum(nfe)) as tick:
        tick = summed(tick)
        for step, file in found.items():
            then = open_at(opened, step, file).sampler
            for reading in ways:
                note = f"step {step:,}, {reading.title}"
                panels[reading][step] = panel(then, reading, nfe, c, seed, behind, tick, note)
    return panels


def panel(
    sampler: Sampler,
    reading: Reading,
    nfe: Sequence[int],
    c: Tensor,
    seed: int | None,
    behind: Tensor | None,
    tick: Tick = lambda done, note: None,
    note: str = "",
) -> Image.Image:
    """Trajectories of one net by one reading, before the points `behind`, if they are no images."""
    columns: dict[str, list[Image.Image]] = {}
    for n in nfe:
        solver = reading.at(n)
        found = sampler.sample(c, nfe=n, seed=seed, solver=solver)
        title = f"NFE {found.nfe}" + ("" if solver is reading.solver else f"\n{solver_title(solver)}")
        if behind is None:
            columns[title] = [picture.sheet(pixels, 1) for pixels in picture.to_rows(found.x).split(1)]
        else:
            columns[title] = [picture.scatter(behind, {"": found.x})]
        tick(n, f"{note}, {n}")
    conditions = sampler.conditions
    names = [conditions.name(k) for k in c.tolist()] if conditions.count else [str(k) for k in range(len(c))]
    rows = zip(names if behind is None else [""], zip(*columns.values(), strict=True), strict=True)
    return labelled(list(rows), list(columns))


def class_grids(
    opened: RunFolder,
    classes: Sequence[int] | None,
    *,
    nfe: Sequence[int] | None = None,
    steps: Sequence[int] | None = (),
    count: int = COUNT,
    letters: Sequence[str] | None = None,
    seed: int | None = None,
    bar: Bar = no_bar,
) -> dict[tuple[Reading, int, int], Image.Image]:
    """A picture per reading, step and number of passes: a block of `count` images per class, in the order given.

    `classes` None: all. `nfe` None: one pass. `steps` (): the last checkpoint; None: every milestone too. `letters`
    None: u if taught, else v. Raises UserError as `trajectories`, and where there are no classes.
    """
    sampler, found = opened.sampler, stages(opened.folder, opened.step, (opened.step,) if steps == () else steps)
    ways = choose(sampler, letters or sorted(readings(sampler))[:1], nfe)
    nfe = nfe or within((1,), sampler, ways)
    data, n = sampler.data, sampler.data.classes
    if not n or not sampler.is_image:
        raise UserError(f"data '{data.kind}' has no classes of images, so no grid of them: leave out --classes")
    classes = labels(len(classes), n, classes).tolist() if classes else range(n)
    grids: dict[tuple[Reading, int, int], Image.Image] = {}
    with bar("sampling class grids", len(found) * len(ways) * sum(nfe)) as tick:
        tick = summed(tick)
        for step, file in found.items():
            then = open_at(opened, step, file).sampler
            for reading, n in ((reading, n) for reading in ways for n in nfe):
                grids[reading, step, n] = class_grid(then, step, reading, n, classes, count, seed)
                tick(n, f"step {step:,}, {reading.title}, {n}")
    return grids


def class_grid(
    sampler: Sampler, step: int, reading: Reading, nfe: int, classes: Sequence[int], count: int, seed: int | None
) -> Image.Image:
    """A block of `count` images per class; image i of class k is number k * count + i, whatever else is drawn."""
    every = torch.arange(sampler.data.classes).repeat_interleave(count)
    some = [k * count + i for k in classes for i in range(count)]
    solver = reading.at(nfe)
    found = joined(sampler.batches(every, nfe=nfe, seed=seed, solver=solver, indices=some))
    sheets = [picture.sheet(part, across(count)) for part in picture.to_rows(found.x).split(count)]
    names = (f"class {name}" if name.isdigit() else name for name in map(sampler.conditions.name, classes))
    blocks = [labelled([("", [sheet])], [name]) for name, sheet in zip(names, sheets, strict=True)]
    pixels = torch.from_numpy(np.stack([np.asarray(block) for block in blocks]))
    page = picture.sheet(pixels, across(len(blocks)), scale=1, gap=GAP)
    name = replace(reading, solver=solver).name
    return labelled([(name, [page])], [f"step {step:,}, NFE {found.nfe}"])


def side_by_side(rows: Mapping[str, Mapping[int, Image.Image]]) -> Image.Image:
    """Panels by name and step in one picture: a row per name, a column per step."""
    steps = next(iter(rows.values()))
    panels = {name: list(row.values()) for name, row in rows.items()}
    return labelled(panels, [f"step {step:,}" for step in steps], GAP)


def write_trajectories(folder: Path, panels: Panels) -> list[Path]:
    """Each panel as a file that says its reading and step, and all of them as one; return the paths, that one last."""
    files: list[Path] = []
    for reading, row in panels.items():
        for step, image in row.items():
            files.append(folder / f"{reading.letter}-step-{step:08d}.png")
            picture.write_picture(files[-1], side_by_side({reading.name: {step: image}}))
    files.append(folder / "trajectories.png")
    picture.write_picture(files[-1], side_by_side({reading.name: row for reading, row in panels.items()}))
    return files


def write_class_grids(folder: Path, grids: Mapping[tuple[Reading, int, int], Image.Image]) -> list[Path]:
    """Each class grid as a file that says its reading, step and number of passes; return the paths."""
    files: list[Path] = []
    for (reading, step, n), image in grids.items():
        files.append(folder / f"classes-{reading.letter}-nfe{n}-step-{step:08d}.png")
        picture.write_picture(files[-1], image)
    return files


def stages(folder: Path, last: int, steps: Sequence[int] | None = None) -> dict[int, Path | None]:
    """The milestones, and the checkpoint of step `last` (None), by step; of these steps only, where they are given.

    Raises UserError for a step that was not kept.
    """
    kept = checkpoint.milestones(folder / "milestones")
    there = dict(sorted({**kept, last: None}.items()))
    for step in steps or ():
        if step not in there:
            raise UserError(
                f"{folder} has nothing of step {step}: there is {', '.join(map(str, there))}. "
                f"To keep it, train with --set train.milestones=[{step}]"
            )
    return {step: there[step] for step in (there if steps is None else steps)}


def solver_title(solver: Solver) -> str:
    """Its name as a title."""
    return solver.kind.replace("_", " ").title()


def open_at(opened: RunFolder, step: int, file: Path | None) -> RunFolder:
    """The run as it was at a milestone. Raises UserError where its weights do not fit, or are not that milestone."""
    if file is None:
        return opened
    require_place(file, opened.identities, "milestone", step)
    net, _ = load_net(opened.run, file, opened.device)
    return replace(opened, net=net, step=step, weights=str(file.relative_to(opened.folder)))


def choose(sampler: Sampler, letters: Sequence[str] | None, nfe: Sequence[int] | None) -> list[Reading]:
    """The readings of these letters, v by Heun's steps. Raises UserError for one not taught, or nfe out of reach."""
    there = readings(sampler, Heun())
    for letter in letters or ():
        if letter not in there:
            what = {"u": "jumps", "v": "velocity"}.get(letter)
            why = f", for objective '{sampler.flow.objective.kind}' teaches no {what}" if what else ""
            raise UserError(f"there is no reading {letter}{why}: use --reading {','.join(there)}")
    ways = [there[letter] for letter in dict.fromkeys(letters or there)]
    for n, reading in ((n, reading) for n in nfe or () for reading in ways):
        check(reading.at(n), sampler.taught, n)
    return ways


def across(n: int) -> int:
    """Columns of a full rectangle of n cells, as near to a square as there is, and wide rather than high."""
    return next(k for k in range(1, n + 1) if n % k == 0 and k * k >= n)


def summed(tick: Tick) -> Tick:
    """A tick to be called with each piece of work, for one that wants the sum."""
    done: list[int] = []

    def add(n: int, note: str) -> None:
        done.append(n)
        tick(sum(done), note)

    return add
