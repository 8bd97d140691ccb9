"""Galleries: what a net makes by number of passes, as it was after several steps of its training; and class by class.

Trajectories (paper, Figs. 5 and 6) have a row per image and a column per number of passes. A row starts from the same
noise in every column, by every sampling mode and after every step: what differs is the net. Class grids (Figs. 7 to 10)
have a block of images per class, which is the same whatever other classes are drawn. `trajectories` and `class_grids`
make the pictures, `write_trajectories` and `write_class_grids` their files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dumo.config import word
from dumo.flow.generate import join_batches, labels_in_turn
from dumo.flow.reading import head_of
from dumo.flow.solver import Euler, Heun, Hop, Restart, Solver, can_make, check
from dumo.io import picture
from dumo.report.sample import data_points
from dumo.run.origin import require_place
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder, load_net
from dumo.runtime.progress import Bar, Tick, no_bar
from dumo.training import checkpoint
from dumo.types import UserError

PASSES = (1, 2, 4, 8, 16, 50)  # of the trajectories
COUNT = 8  # rows of trajectories; images of a class
POINTS = 2000  # samples of a scatter
PANEL_GAP = 18  # pixels between panels, and between the blocks of a class grid
TAUGHT_BY_LETTER = {"u": "jumps", "v": "velocity"}  # what a sampling mode follows


@dataclass(frozen=True)
class SamplingMode:
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


Panels = Mapping[SamplingMode, Mapping[int, Image.Image]]  # a picture by mode and step
ClassGrids = Mapping[tuple[SamplingMode, int, int], Image.Image]  # a picture by mode, step and number of passes


def sampling_modes(sampler: Sampler, along: Euler | Heun | None = None) -> dict[str, SamplingMode]:
    """The modes that the objective taught, by letter; v takes steps by `along`, Euler's if None."""
    objective = sampler.flow.objective
    modes: dict[str, SamplingMode] = {}
    for solver in (sampler.spec.solver, Restart(), Hop()):
        if solver.uses != "velocity" and getattr(sampler.taught, solver.uses):
            head = _head_name(head_of(objective, solver.uses))
            heads = f"{head} heads" if " and " in head else f"{head} head"
            modes["u"] = SamplingMode("u", head, f"{heads}, jumps ({solver.kind})", solver)
            break
    if sampler.taught.velocity:
        head = _head_name(head_of(objective, "velocity"))
        if head == "v":
            origin = "v head"
        elif "r" in objective.needs.inputs:
            origin = f"v = {head} at r = t"
        else:
            origin = f"v by the {head} head"
        along = along or Euler()
        modes["v"] = SamplingMode("v", head, f"{origin}, {along.kind.title()} steps", along)
    return modes


def _head_name(head: str) -> str:
    """A head as a reader knows it."""
    return word.HEADS.get(head, head)


def reachable_passes(nfe: Iterable[int], sampler: Sampler, modes: Iterable[SamplingMode]) -> list[int]:
    """Those numbers of passes that all these modes can make; the sampler's own, which they can, if none is left."""
    modes = list(modes)
    reachable = [n for n in nfe if all(can_make(mode.at(n), sampler.taught, n) for mode in modes)]
    return reachable or list(sampler.spec.nfe)


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
) -> dict[SamplingMode, dict[int, Image.Image]]:
    """A picture per mode and step: a row per image (points: one row of scatters), a column per number of passes.

    `nfe` None: those of `PASSES` that all modes can make. `steps` None: every milestone and the last checkpoint.
    `letters` None: u and v, if taught. `only`: classes of the rows, in turn. Raises UserError, before any work, for a
    step, mode, label or nfe that is not there.
    """
    sampler = opened.sampler
    files = milestone_files(opened.folder, opened.step, steps)
    modes = choose_modes(sampler, letters, nfe)
    passes = nfe or reachable_passes(PASSES, sampler, modes)
    default_count = COUNT if sampler.is_image else POINTS
    c = sampler.conditions.in_turn(count or default_count, only)
    behind = None if sampler.is_image else data_points(sampler.data, sampler.spec.seed)
    panels: dict[SamplingMode, dict[int, Image.Image]] = {mode: {} for mode in modes}
    with bar("sampling trajectories", len(files) * len(modes) * sum(passes)) as tick:
        tick_more = _tick_by_piece(tick)
        for step, file in files.items():
            earlier = open_at(opened, step, file).sampler
            for mode in modes:
                note = f"step {step:,}, {mode.title}"
                panels[mode][step] = _draw_panel(earlier, mode, passes, c, seed, behind, tick_more, note)
    return panels


def _draw_panel(
    sampler: Sampler,
    mode: SamplingMode,
    nfe: Sequence[int],
    c: Tensor,
    seed: int | None,
    behind: picture.Points | None,
    tick: Tick,
    note: str,
) -> Image.Image:
    """Trajectories of one net by one mode, before the points `behind`, if they are no images."""
    columns: dict[str, list[Image.Image]] = {}
    for n in nfe:
        solver = mode.at(n)
        made = sampler.sample(c, nfe=n, seed=seed, solver=solver)
        title = f"NFE {made.nfe}"
        if solver is not mode.solver:
            title += f"\n{solver_title(solver)}"
        if behind is None:
            columns[title] = [picture.sheet(pixels, 1) for pixels in picture.to_rows(made.x).split(1)]
        else:
            columns[title] = [picture.scatter(behind, {"": made.x})]
        tick(n, f"{note}, {n}")
    if behind is not None:
        names = [""]
    elif sampler.conditions.count:
        names = [sampler.conditions.name(k) for k in c.tolist()]
    else:
        names = [str(k) for k in range(len(c))]
    rows = zip(*columns.values(), strict=True)
    return picture.labelled_grid(list(zip(names, rows, strict=True)), list(columns))


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
) -> dict[tuple[SamplingMode, int, int], Image.Image]:
    """A picture per mode, step and number of passes: a block of `count` images per class, in the order given.

    `classes` None: all. `nfe` None: one pass. `steps` (): the last checkpoint; None: every milestone too. `letters`
    None: u if taught, else v. Raises UserError as `trajectories`, and where there are no classes.
    """
    sampler = opened.sampler
    files = milestone_files(opened.folder, opened.step, (opened.step,) if steps == () else steps)
    modes = choose_modes(sampler, letters or sorted(sampling_modes(sampler))[:1], nfe)
    passes = nfe or reachable_passes((1,), sampler, modes)
    data = sampler.data
    if not data.classes or not sampler.is_image:
        raise UserError(f"data '{data.kind}' has no classes of images, so no grid of them: leave out --classes")
    chosen = range(data.classes) if classes is None else labels_in_turn(len(classes), data.classes, classes).tolist()
    grids: dict[tuple[SamplingMode, int, int], Image.Image] = {}
    with bar("sampling class grids", len(files) * len(modes) * sum(passes)) as tick:
        tick_more = _tick_by_piece(tick)
        for step, file in files.items():
            earlier = open_at(opened, step, file).sampler
            for mode in modes:
                for n in passes:
                    grids[mode, step, n] = _draw_class_grid(earlier, step, mode, n, chosen, count, seed)
                    tick_more(n, f"step {step:,}, {mode.title}, {n}")
    return grids


def _draw_class_grid(
    sampler: Sampler, step: int, mode: SamplingMode, nfe: int, classes: Sequence[int], count: int, seed: int | None
) -> Image.Image:
    """A block of `count` images per class; image i of class k is number k * count + i, whatever else is drawn."""
    class_of_each = torch.arange(sampler.data.classes).repeat_interleave(count)
    indices = [k * count + i for k in classes for i in range(count)]
    solver = mode.at(nfe)
    made = join_batches(sampler.batches(class_of_each, nfe=nfe, seed=seed, solver=solver, indices=indices))
    blocks: list[np.ndarray] = []
    for k, pixels in zip(classes, picture.to_rows(made.x).split(count), strict=True):
        name = sampler.conditions.name(k)
        if name.isdigit():
            name = f"class {name}"
        sheet = picture.sheet(pixels, full_columns(count))
        blocks.append(np.asarray(picture.labelled_grid([("", [sheet])], [name])))
    page = picture.sheet(torch.from_numpy(np.stack(blocks)), full_columns(len(blocks)), scale=1, gap=PANEL_GAP)
    row_name = replace(mode, solver=solver).name
    return picture.labelled_grid([(row_name, [page])], [f"step {step:,}, NFE {made.nfe}"])


def side_by_side(rows: Mapping[str, Mapping[int, Image.Image]]) -> Image.Image:
    """Panels by name and step in one picture: a row per name, a column per step."""
    steps = next(iter(rows.values()))
    panels = {name: list(row.values()) for name, row in rows.items()}
    return picture.labelled_grid(panels, [f"step {step:,}" for step in steps], PANEL_GAP)


def write_trajectories(folder: Path, panels: Panels) -> list[Path]:
    """Each panel as a file that says its mode and step, and all of them as one; return the paths, that one last."""
    pictures: dict[Path, Image.Image] = {}
    for mode, row in panels.items():
        for step, image in row.items():
            path = folder / f"{mode.letter}-step-{step:08d}.png"
            pictures[path] = side_by_side({mode.name: {step: image}})
    pictures[folder / "trajectories.png"] = side_by_side({mode.name: row for mode, row in panels.items()})
    return _write_pictures(pictures)


def write_class_grids(folder: Path, grids: ClassGrids) -> list[Path]:
    """Each class grid as a file that says its mode, step and number of passes; return the paths."""
    pictures: dict[Path, Image.Image] = {}
    for (mode, step, n), image in grids.items():
        pictures[folder / f"classes-{mode.letter}-nfe{n}-step-{step:08d}.png"] = image
    return _write_pictures(pictures)


def _write_pictures(pictures: Mapping[Path, Image.Image]) -> list[Path]:
    """Write each picture into its file; return the paths."""
    for path, image in pictures.items():
        picture.write_picture(path, image)
    return list(pictures)


def milestone_files(folder: Path, last: int, steps: Sequence[int] | None = None) -> dict[int, Path | None]:
    """The milestones, and the checkpoint of step `last` (None), by step; of these steps only, where they are given.

    Raises UserError for a step that was not kept.
    """
    kept = checkpoint.milestones(folder / "milestones")
    files = dict(sorted({**kept, last: None}.items()))
    if steps is None:
        return files
    for step in steps:
        if step not in files:
            raise UserError(
                f"{folder} has nothing of step {step}: there is {', '.join(map(str, files))}. "
                f"To keep it, train with --set train.milestones=[{step}]"
            )
    return {step: files[step] for step in steps}


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


def choose_modes(sampler: Sampler, letters: Sequence[str] | None, nfe: Sequence[int] | None) -> list[SamplingMode]:
    """The modes of these letters, v by Heun's steps. Raises UserError for one not taught, or nfe out of reach."""
    taught = sampling_modes(sampler, Heun())
    for letter in letters or ():
        if letter in taught:
            continue
        why = ""
        if letter in TAUGHT_BY_LETTER:
            why = f", for objective '{sampler.flow.objective.kind}' teaches no {TAUGHT_BY_LETTER[letter]}"
        raise UserError(f"there is no reading {letter}{why}: use --reading {','.join(taught)}")
    modes = [taught[letter] for letter in dict.fromkeys(letters or taught)]
    for n in nfe or ():
        for mode in modes:
            check(mode.at(n), sampler.taught, n)
    return modes


def full_columns(n: int) -> int:
    """Columns of a full rectangle of n cells, as near to a square as there is, and wide rather than high."""
    return next(k for k in range(1, n + 1) if n % k == 0 and k * k >= n)


def _tick_by_piece(tick: Tick) -> Tick:
    """A tick to be called with each piece of work, for one that wants the sum."""
    done = 0

    def add(n: int, note: str) -> None:
        nonlocal done
        done += n
        tick(done, note)

    return add
