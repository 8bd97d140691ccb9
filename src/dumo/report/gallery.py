"""Draw trajectories: samples from the same noise by NFE, at several steps of the training.

A trajectory (paper, Figs. 5 and 6) has a row per image and a column per number of passes. A row starts from the same
noise in every column, by every sampling mode and after every step. `trajectories` draws them and `write_trajectories`
writes them to files. `sampling_modes` gives the ways to sample a network, and `sample_by_nfe` samples it by one of
them; the page, the demo and the lab use both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from dumo.config import word
from dumo.config.spec import Run
from dumo.flow.reading import head_of
from dumo.flow.sampling import Samples
from dumo.flow.solver import Euler, Heun, Hop, Restart, Solver, can_make, check
from dumo.io import picture
from dumo.run.folder import require_own_file
from dumo.run.trained import TrainedRun
from dumo.run.weights import load_net
from dumo.run.write_samples import data_points
from dumo.runtime.progress import Bar, no_bar
from dumo.training.milestone import milestones
from dumo.types import UserError

# Numbers of passes of a trajectory.
PASSES = (1, 2, 4, 8, 16, 50)
# Rows of a trajectory.
DEFAULT_COUNT = 8
PANEL_GAP = 18
# The kind of sampling of each mode, by letter.
TAUGHT_BY_LETTER = {"u": "jumps", "v": "velocity"}


@dataclass(frozen=True)
class SamplingMode:
    """A way to sample a network: u, by jumps, or v, along the velocity."""

    letter: str
    # The head that is used. v may be computed from a head of another name.
    head: str
    # Describes the head and the solver.
    title: str
    solver: Solver = field(hash=False)

    @property
    def name(self) -> str:
        """The letter and the solver, on two lines."""
        return f"{self.letter} by\n{solver_title(self.solver)}"

    def solver_for(self, nfe: int) -> Solver:
        """Return the solver for this number of passes: Euler's if the mode's own cannot divide them into its steps."""
        return self.solver if nfe % self.solver.passes == 0 else Euler()


# Pictures by mode and step.
Panels = Mapping[SamplingMode, Mapping[int, Image.Image]]


def sampling_modes(run: Run, velocity_solver: Euler | Heun | None = None) -> dict[str, SamplingMode]:
    """Return the sampling modes that the objective trains, by letter. v uses `velocity_solver`, by default Euler.

    u uses the run's solver if that jumps, otherwise the first solver that uses trained jumps only.
    """
    objective = run.objective
    modes: dict[str, SamplingMode] = {}
    for solver in (run.sample.solver, Restart(), Hop()):
        if solver.uses != "velocity" and getattr(run.readings, solver.uses):
            head = _head_name(head_of(objective, solver.uses))
            heads = f"{head} heads" if " and " in head else f"{head} head"
            modes["u"] = SamplingMode("u", head, f"{heads}, jumps ({solver.kind})", solver)
            break
    if run.readings.velocity:
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
    """Return the name of a head in words, or the head's own."""
    return word.HEADS.get(head, head)


def solver_title(solver: Solver) -> str:
    """Return a solver's name as a title: 'Restart'."""
    return solver.kind.replace("_", " ").title()


def reachable_passes(nfe: Iterable[int], run: Run, modes: Iterable[SamplingMode]) -> list[int]:
    """Return the numbers of passes among `nfe` that all these modes can make; the run's own if there are none."""
    modes = list(modes)
    reachable = [n for n in nfe if all(can_make(mode.solver_for(n), run.readings, n) for mode in modes)]
    return reachable or list(run.sample.nfe)


def sample_by_nfe(
    trained: TrainedRun, mode: SamplingMode, passes: Sequence[int], c: Tensor, seed: int | None = None
) -> dict[int, Samples]:
    """Sample the conditions c (n,) by one mode, from the same noise at each number of passes."""
    return {n: trained.make_samples(c, nfe=n, seed=seed, solver=mode.solver_for(n)) for n in passes}


def trajectories(
    trained: TrainedRun,
    *,
    nfe: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    count: int | None = None,
    only: Sequence[int] | None = None,
    seed: int | None = None,
    bar: Bar = no_bar,
) -> dict[SamplingMode, dict[int, Image.Image]]:
    """Draw a picture per mode and step: a row per image, or one row of scatters, and a column per number of passes.

    - `nfe`: numbers of passes, by default those in `PASSES` that all modes support
    - `steps`: training steps, by default every milestone and the last checkpoint
    - `count`: rows, by default DEFAULT_COUNT or one for each of `only`; for points, their number (SCATTER_POINTS)
    - `only`: the classes of the rows, repeated cyclically, by default all

    Raises UserError, before any work, for a step, label or nfe that the run does not have.
    """
    run = trained.spec
    files = milestone_files(trained.run_folder.path, trained.step, steps)
    modes = choose_modes(run, nfe)
    passes = nfe or reachable_passes(PASSES, run, modes)
    if count is None:
        count = max(DEFAULT_COUNT if trained.makes_images else picture.SCATTER_POINTS, len(only or ()))
    c = trained.conditions(only, count)

    # The names of the rows, and the data behind points.
    background = None
    row_names = [str(k) for k in range(count)]
    if not trained.makes_images:
        background = data_points(run.data, run.sample.seed)
        row_names = [""]
    elif run.conditions.count:
        row_names = trained.names_of_conditions(c)

    panels: dict[SamplingMode, dict[int, Image.Image]] = {mode: {} for mode in modes}
    done = 0
    with bar("sampling trajectories", len(files) * len(modes) * sum(passes)) as tick:
        for step, file in files.items():
            milestone = open_milestone(trained, step, file)
            for mode in modes:
                columns: dict[str, list[Image.Image]] = {}
                for n, samples in sample_by_nfe(milestone, mode, passes, c, seed).items():
                    solver = mode.solver_for(n)
                    title = f"NFE {samples.nfe}"
                    if solver is not mode.solver:
                        title += f"\n{solver_title(solver)}"
                    if background is None:
                        columns[title] = [picture.sheet(pixels, 1) for pixels in picture.to_rows(samples.x).split(1)]
                    else:
                        columns[title] = [picture.scatter(background, {"": samples.x})]
                cells = [cell for row in zip(*columns.values(), strict=True) for cell in row]
                panels[mode][step] = picture.labelled_grid(cells, len(columns), list(columns), row_names)
                done += sum(passes)
                tick(done, f"step {step:,}, {mode.title}")
    return panels


def join_panels(rows: Mapping[str, Mapping[int, Image.Image]]) -> Image.Image:
    """Join panels, by name and step, to one picture: a row per name, a column per step."""
    steps = next(iter(rows.values()))
    panels = [panel for row in rows.values() for panel in row.values()]
    titles = [f"step {step:,}" for step in steps]
    return picture.labelled_grid(panels, len(steps), titles, list(rows), PANEL_GAP)


def write_trajectories(folder: Path, panels: Panels) -> list[Path]:
    """Write a file for each panel, named after its mode and step, and one of all; return the paths, the latter last."""
    pictures: dict[Path, Image.Image] = {}
    for mode, row in panels.items():
        for step, image in row.items():
            path = folder / f"{mode.letter}-step-{step:08d}.png"
            pictures[path] = join_panels({mode.name: {step: image}})
    pictures[folder / "trajectories.png"] = join_panels({mode.name: row for mode, row in panels.items()})
    for path, image in pictures.items():
        picture.write_picture(path, image)
    return list(pictures)


def milestone_files(folder: Path, last: int, steps: Sequence[int] | None = None) -> dict[int, Path | None]:
    """Return the files of milestones by step, and None for the step `last`, which is that of the last checkpoint.

    `steps` chooses some; None: all, in order. Raises UserError for a step that was not kept.
    """
    kept: dict[int, Path | None] = {**milestones(folder / "milestones")}
    kept[last] = None
    files = dict(sorted(kept.items()))
    if steps is None:
        return files
    for step in steps:
        if step not in files:
            raise UserError(
                f"{folder} keeps no weights of step {step}, only of {', '.join(map(str, files))}: train with "
                f"train.milestones=[{step}]"
            )
    return {step: files[step] for step in steps}


def open_milestone(trained: TrainedRun, step: int, file: Path | None) -> TrainedRun:
    """Return the run with the weights of the milestone in `file`, or the run itself if `file` is None.

    Raises UserError if the weights do not fit the run, or are not that milestone's.
    """
    if file is None:
        return trained
    require_own_file(file, trained.spec, "milestone", step)
    net = load_net(trained.spec, file, trained.device)
    return replace(trained, net=net, step=step, weights=str(file.relative_to(trained.run_folder.path)))


def choose_modes(run: Run, nfe: Sequence[int] | None) -> list[SamplingMode]:
    """Return the supported sampling modes, u before v, which uses Heun steps.

    Raises UserError for an NFE that one of them does not support.
    """
    modes = [*sampling_modes(run, Heun()).values()]
    for n in nfe or ():
        for mode in modes:
            check(mode.solver_for(n), run.readings, n)
    return modes
