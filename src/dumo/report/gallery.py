"""Galleries: what a net makes by number of passes, as it was after several steps of its training; and class by class.

Trajectories (paper, Figs. 5 and 6) have a row per image and a column per number of passes. A row starts from the same
noise in every column, by every sampling mode and after every step: what differs is the net. Class grids (Figs. 7 to 10)
have a block of images per class, which is the same whatever other classes are drawn.

`trajectories` and `class_grids` make the pictures, `write_trajectories` and `write_class_grids` their files. In this
order they find the weights (`milestone_files`), the sampling modes (`choose_modes`) and the numbers of passes
(`reachable_passes`), open each milestone (`open_milestone`), sample it, and draw.

The page, the demo and the lab also use the sampling modes of a net (`sampling_modes`) and `join_panels`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dumo.config import word
from dumo.flow.generate import Samples, join_batches, labels_in_turn
from dumo.flow.reading import head_of
from dumo.flow.solver import Euler, Heun, Hop, Restart, Solver, can_make, check
from dumo.io import picture
from dumo.report.sample import data_points, require_count
from dumo.run.provenance import require_own_file
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder, load_net
from dumo.runtime.progress import Bar, Tick, no_bar
from dumo.training import checkpoint
from dumo.types import UserError

PASSES = (1, 2, 4, 8, 16, 50)  # of trajectories: ours
DEFAULT_COUNT = 8  # rows of trajectories, or images of a class: ours
MAX_GRID_PIXELS = 2 * 10**8  # of the images of a class grid: ours; programs may refuse to show more
PANEL_GAP = 18  # pixels between panels, and between the blocks of a class grid: ours
TAUGHT_BY_LETTER = {"u": "jumps", "v": "velocity"}  # what a sampling mode follows, by its letter


@dataclass(frozen=True)
class SamplingMode:
    """A way to sample a net: u, by jumps, or v, along the velocity."""

    letter: str  # u or v
    head: str  # that is read: v may be read off a head of another name
    title: str  # says which head is read, and how
    solver: Solver = field(hash=False)

    @property
    def name(self) -> str:
        """The letter and the solver, on two lines."""
        return f"{self.letter} by\n{solver_title(self.solver)}"

    def solver_for(self, nfe: int) -> Solver:
        """The solver for this number of passes: Euler's where the mode's own cannot divide them into its steps."""
        return self.solver if nfe % self.solver.passes == 0 else Euler()


Panels = Mapping[SamplingMode, Mapping[int, Image.Image]]  # pictures by mode and step
ClassGrids = Mapping[tuple[SamplingMode, int, int], Image.Image]  # pictures by mode, step and number of passes


def sampling_modes(sampler: Sampler, velocity_solver: Euler | Heun | None = None) -> dict[str, SamplingMode]:
    """The modes that the objective taught, by letter. v takes the steps of `velocity_solver`; None: Euler's.

    u jumps by the run's own solver if that jumps, else by the first solver that jumps as the objective taught.
    """
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
        velocity_solver = velocity_solver or Euler()
        modes["v"] = SamplingMode("v", head, f"{origin}, {velocity_solver.kind.title()} steps", velocity_solver)
    return modes


def _head_name(head: str) -> str:
    """The name of a head in words; the head's own where there are none."""
    return word.HEADS.get(head, head)


def reachable_passes(nfe: Iterable[int], sampler: Sampler, modes: Iterable[SamplingMode]) -> list[int]:
    """The numbers of passes among `nfe` that all these modes can make; the run's own where there are none."""
    modes = list(modes)
    reachable = [n for n in nfe if all(can_make(mode.solver_for(n), sampler.taught, n) for mode in modes)]
    return reachable or list(sampler.spec.nfe)


def sample_by_nfe(
    sampler: Sampler, mode: SamplingMode, passes: Sequence[int], c: Tensor, seed: int | None = None
) -> dict[int, Samples]:
    """Sample the conditions c (n,) by one mode, from the same noise at each number of passes."""
    return {n: sampler.sample(c, nfe=n, seed=seed, solver=mode.solver_for(n)) for n in passes}


def trajectories(
    opened: RunFolder,
    *,
    nfe: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    count: int | None = None,
    only: Sequence[int] | None = None,
    seed: int | None = None,
    bar: Bar = no_bar,
) -> dict[SamplingMode, dict[int, Image.Image]]:
    """A picture per mode and step: a row per image (points: one row of scatters), a column per number of passes.

    - `nfe`: numbers of passes; None: those of `PASSES` that all modes can make
    - `steps`: of the training; None: every milestone and the last checkpoint
    - `count`: rows, or points of a scatter; None: DEFAULT_COUNT, or SCATTER_POINTS, and a row for each of `only`
    - `only`: the classes of the rows, in turn; None: all

    Raises UserError, before any work, for a step, label or nfe that the run does not have.
    """
    sampler = opened.sampler
    files = milestone_files(opened.folder, opened.step, steps)
    modes = choose_modes(sampler, nfe)
    passes = nfe or reachable_passes(PASSES, sampler, modes)
    default_count = DEFAULT_COUNT if sampler.is_image else picture.SCATTER_POINTS
    chosen = only or ()
    if count is None:
        count = max(default_count, len(chosen))
    require_count(count, chosen, "labels")
    c = sampler.conditions.in_turn(count, only)
    background = None if sampler.is_image else data_points(sampler.data, sampler.spec.seed)
    panels: dict[SamplingMode, dict[int, Image.Image]] = {mode: {} for mode in modes}
    with bar("sampling trajectories", len(files) * len(modes) * sum(passes)) as tick:
        tick_more = _tick_by_piece(tick)
        for step, file in files.items():
            milestone = open_milestone(opened, step, file).sampler
            for mode in modes:
                note = f"step {step:,}, {mode.title}"
                panels[mode][step] = _draw_panel(
                    milestone,
                    mode,
                    nfe=passes,
                    c=c,
                    seed=seed,
                    background=background,
                    tick_more=tick_more,
                    note=note,
                )
    return panels


def _draw_panel(
    sampler: Sampler,
    mode: SamplingMode,
    *,
    nfe: Sequence[int],
    c: Tensor,
    seed: int | None,
    background: picture.Points | None,
    tick_more: Tick,
    note: str,
) -> Image.Image:
    """Sample one net by one mode, from conditions c (n,), and draw its trajectories.

    Points are drawn before the points `background` of the data; of images it is None. `tick_more` is called with the
    passes of each column, and with `note`.
    """
    columns: dict[str, list[Image.Image]] = {}
    for n, samples in sample_by_nfe(sampler, mode, nfe, c, seed).items():
        solver = mode.solver_for(n)
        title = f"NFE {samples.nfe}"
        if solver is not mode.solver:
            title += f"\n{solver_title(solver)}"
        if background is None:
            columns[title] = [picture.sheet(pixels, 1) for pixels in picture.to_rows(samples.x).split(1)]
        else:
            columns[title] = [picture.scatter(background, {"": samples.x})]
        tick_more(n, f"{note}, {n}")
    if background is not None:
        row_names = [""]
    elif sampler.conditions.count:
        row_names = [sampler.conditions.name(k) for k in c.tolist()]
    else:
        row_names = [str(k) for k in range(len(c))]
    rows = zip(*columns.values(), strict=True)
    return picture.labelled_grid(list(zip(row_names, rows, strict=True)), list(columns))


def class_grids(
    opened: RunFolder,
    classes: Sequence[int] | None,
    *,
    nfe: Sequence[int] | None = None,
    steps: Sequence[int] | None = (),
    count: int = DEFAULT_COUNT,
    seed: int | None = None,
    bar: Bar = no_bar,
) -> dict[tuple[SamplingMode, int, int], Image.Image]:
    """A picture per mode, step and number of passes: a block of `count` images per class, in the order of `classes`.

    - `classes`: None: all
    - `nfe`: numbers of passes; None: one pass, or the run's own where a mode cannot make one
    - `steps`: of the training; (): the last checkpoint; None: that and every milestone

    Raises UserError, before any work, for a step, class or nfe that the run does not have, where there are no
    classes of images, and for a picture of more than MAX_GRID_PIXELS.
    """
    sampler = opened.sampler
    files = milestone_files(opened.folder, opened.step, (opened.step,) if steps == () else steps)
    # By u if it is taught, else by v.
    modes = choose_modes(sampler, nfe)[:1]
    passes = nfe or reachable_passes((1,), sampler, modes)
    data = sampler.data
    if not data.classes or not sampler.is_image:
        raise UserError(f"data '{data.kind}' has no classes of images, so no grid of them")
    chosen_classes = range(data.classes)
    if classes is not None:
        chosen_classes = labels_in_turn(len(classes), data.classes, classes).tolist()
    _, height, width = sampler.pixels
    num_pixels = len(chosen_classes) * count * height * width * picture.readable_scale(height) ** 2
    if num_pixels > MAX_GRID_PIXELS:
        raise UserError(
            f"a picture of {len(chosen_classes):,} classes, {count:,} images each, has {num_pixels / 1e6:,.0f} million "
            f"pixels, more than {MAX_GRID_PIXELS / 1e6:,.0f}: choose fewer classes or images"
        )
    grids: dict[tuple[SamplingMode, int, int], Image.Image] = {}
    with bar("sampling class grids", len(files) * len(modes) * sum(passes)) as tick:
        tick_more = _tick_by_piece(tick)
        for step, file in files.items():
            milestone = open_milestone(opened, step, file).sampler
            for mode in modes:
                for n in passes:
                    grids[mode, step, n] = _draw_class_grid(
                        milestone, step, mode, nfe=n, classes=chosen_classes, count=count, seed=seed
                    )
                    tick_more(n, f"step {step:,}, {mode.title}, {n}")
    return grids


def _draw_class_grid(
    sampler: Sampler, step: int, mode: SamplingMode, *, nfe: int, classes: Sequence[int], count: int, seed: int | None
) -> Image.Image:
    """Sample one net by one mode, and draw a block of `count` images per class.

    Image i of class k is sample k * count + i of the seed, whatever other classes are drawn.
    """
    class_of_each = torch.arange(sampler.data.classes).repeat_interleave(count)
    indices = [k * count + i for k in classes for i in range(count)]
    solver = mode.solver_for(nfe)
    samples = join_batches(sampler.batches(class_of_each, nfe=nfe, seed=seed, solver=solver, indices=indices))
    blocks: list[np.ndarray] = []
    for k, pixels in zip(classes, picture.to_rows(samples.x).split(count), strict=True):
        name = sampler.conditions.name(k)
        if name.isdigit():
            name = f"class {name}"
        sheet = picture.sheet(pixels, full_columns(count))
        blocks.append(np.asarray(picture.labelled_grid([("", [sheet])], [name])))
    page = picture.sheet(torch.from_numpy(np.stack(blocks)), full_columns(len(blocks)), scale=1, gap=PANEL_GAP)
    row_name = replace(mode, solver=solver).name
    return picture.labelled_grid([(row_name, [page])], [f"step {step:,}, NFE {samples.nfe}"])


def join_panels(rows: Mapping[str, Mapping[int, Image.Image]]) -> Image.Image:
    """Panels, by name and step, as one picture: a row per name, a column per step."""
    steps = next(iter(rows.values()))
    panels = {name: list(row.values()) for name, row in rows.items()}
    return picture.labelled_grid(panels, [f"step {step:,}" for step in steps], PANEL_GAP)


def write_trajectories(folder: Path, panels: Panels) -> list[Path]:
    """Write a file for each panel, named after its mode and step, and one of all; return the paths, the latter last."""
    pictures: dict[Path, Image.Image] = {}
    for mode, row in panels.items():
        for step, image in row.items():
            path = folder / f"{mode.letter}-step-{step:08d}.png"
            pictures[path] = join_panels({mode.name: {step: image}})
    pictures[folder / "trajectories.png"] = join_panels({mode.name: row for mode, row in panels.items()})
    return write_pictures(pictures)


def write_class_grids(folder: Path, grids: ClassGrids) -> list[Path]:
    """Write a file for each class grid, named after its mode, step and number of passes; return the paths."""
    pictures: dict[Path, Image.Image] = {}
    for (mode, step, n), image in grids.items():
        pictures[folder / f"classes-{mode.letter}-nfe{n}-step-{step:08d}.png"] = image
    return write_pictures(pictures)


def write_pictures(pictures: Mapping[Path, Image.Image]) -> list[Path]:
    """Write each picture into its file; return the paths."""
    for path, image in pictures.items():
        picture.write_picture(path, image)
    return list(pictures)


def milestone_files(folder: Path, last: int, steps: Sequence[int] | None = None) -> dict[int, Path | None]:
    """The files of milestones by step, and None for the step `last`, which is that of the last checkpoint.

    `steps` chooses some; None: all, in order. Raises UserError for a step that was not kept.
    """
    milestones: dict[int, Path | None] = {**checkpoint.milestones(folder / "milestones")}
    milestones[last] = None
    files = dict(sorted(milestones.items()))
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
    """A solver's name as a title: 'Restart'."""
    return solver.kind.replace("_", " ").title()


def open_milestone(opened: RunFolder, step: int, file: Path | None) -> RunFolder:
    """The run with the weights of a milestone, in `file`; None: the run as it is opened.

    Raises UserError where the weights do not fit the run, or are not that milestone's.
    """
    if file is None:
        return opened
    require_own_file(file, opened.identities, "milestone", step)
    net, _ = load_net(opened.run, file, opened.device)
    return replace(opened, net=net, step=step, weights=str(file.relative_to(opened.folder)))


def choose_modes(sampler: Sampler, nfe: Sequence[int] | None) -> list[SamplingMode]:
    """The sampling modes that are taught, u before v, which takes Heun's steps.

    Raises UserError for a number of passes that one of them cannot make.
    """
    modes = [*sampling_modes(sampler, Heun()).values()]
    for n in nfe or ():
        for mode in modes:
            check(mode.solver_for(n), sampler.taught, n)
    return modes


def full_columns(n: int) -> int:
    """The columns of a rectangle that n cells fill, as near to a square as possible, and rather wide than high."""
    return next(k for k in range(1, n + 1) if n % k == 0 and k * k >= n)


def _tick_by_piece(tick: Tick) -> Tick:
    """A function to call with the passes made since its last call; it calls `tick` with all passes so far."""
    done = 0

    def tick_more(passes: int, note: str) -> None:
        nonlocal done
        done += passes
        tick(done, note)

    return tick_more
