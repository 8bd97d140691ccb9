"""What the demo answers: rows of pictures with their words, of one run or of several.

Each tab of the page has a function that answers for one run: `make_samples`, `compare_passes`, `interpolate_seeds` and
`find_neighbours`. `answer_runs` calls one of them for each run in turn.

A function yields an answer whenever there is more to show; each holds all that the one before held, and the last is
complete. What a person typed is read here (`parse_seed`); what is wrong raises UserError. Nothing here knows a browser
or a server.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import cos, isqrt, pi, sin

import torch
from PIL import Image
from torch import Tensor

from dumo.evaluation.neighbours import nearest
from dumo.flow.guide import CFG
from dumo.flow.solver import Fresh
from dumo.io import picture
from dumo.io.read import brief
from dumo.report.gallery import TAUGHT_BY_LETTER, SamplingMode, solver_title
from dumo.report.live import InteractiveRun
from dumo.report.sample import draw_sheet
from dumo.run.prompt import names_of_conditions
from dumo.runtime.text import nfe_text
from dumo.types import Sample, UserError

PASSES = (1, 2, 4, 50)  # compared side by side: what few-step models take, and what flow models do
NUM_INTERPOLATED = 9  # samples from one seed to another, both ends among them: ours
NUM_COMPARED = 8  # samples that are shown with their nearest images: ours
MAX_SEED_DIGITS = 18  # of a seed, which fits 64 bits then: ours


@dataclass(frozen=True)
class AnswerCell:
    """A picture and the words below it."""

    picture: Image.Image | None  # None: not made yet, or it cannot be made, and `note` says why
    note: str = ""


@dataclass(frozen=True)
class AnswerRow:
    """Pictures side by side, below a title that says what they have in common."""

    title: str
    cells: Sequence[AnswerCell]
    columns: int = 0  # cells to a line; 0: all of them in one line

    @property
    def width(self) -> int:
        """The number of cells in the longest line."""
        return self.columns or len(self.cells)


@dataclass(frozen=True)
class Answer:
    """Rows of pictures, and a line about them all."""

    rows: Sequence[AnswerRow]
    line: str = ""
    sheet: Image.Image | None = None  # the pictures as one, to download; None: there is nothing to download
    script: str = ""  # the Python that makes the pictures again; "" without a sheet


AnswerFunction = Callable[..., Iterator[Answer]]  # takes a run, and the values of a tab's fields in their order


def answer_runs(
    runs: Sequence[InteractiveRun], answer_run: AnswerFunction, *field_values: object
) -> Iterator[dict[str, Answer]]:
    """The answers of several runs by the runs' names, one run after the other.

    Where a run cannot answer and another can, the line of its answer says why. Raises UserError where none can, or
    there is no run.
    """
    if not runs:
        raise UserError("there is no run to answer: give the folder of one, or of two")
    answers: dict[str, Answer] = {}  # of the runs that are done
    errors: list[UserError] = []
    for run in runs:
        answer = Answer([])
        try:
            for answer in answer_run(run, *field_values):
                yield {**answers, run.name: answer}
        except UserError as error:
            answer = replace(answer, line=str(error))
            errors.append(error)
        answers[run.name] = answer
    if len(errors) == len(runs):
        raise errors[0]
    if errors:  # else the last answer was yielded when it was made
        yield answers


def make_samples(
    run: InteractiveRun, condition: str, seed_text: str, guidance: float, count: int, nfe: int, letter: str
) -> Iterator[Answer]:
    """Samples 0 to count - 1 of a seed, as `dumo sample` and `run.sample` make them, with sheet and script.

    `condition` is a prompt or a class as it was typed, `letter` that of a sampling mode. Raises UserError for a
    condition, seed, guidance, number of passes or mode that the run does not have.
    """
    c = run.conditions(condition, count)
    seed = parse_seed(seed_text)
    mode = run.mode(letter)
    samples = run.sample(mode, nfe, c, run.noises(seed, count), run.guide(guidance))
    conditions = run.sampler.conditions
    condition_names = names_of_conditions(run.sampler, c)
    notes = [str(i) for i in range(count)]
    if conditions.count and len(set(condition_names)) > 1:
        notes = condition_names
    cells = [AnswerCell(image, note) for image, note in zip(_pictures(run, samples.x), notes, strict=True)]
    images = "1 image" if count == 1 else f"{count} images"
    columns = 1 + isqrt(count - 1)  # nearly a square
    yield Answer(
        [AnswerRow("", cells, columns=columns)],
        f"{images}, {nfe_text(samples.nfe)} each, {_seconds_text(samples.seconds)} for all.",
        draw_sheet(picture.to_rows(samples.x), c, conditions, condition_names),
        _script(run, mode, condition=condition, seed=seed, guidance=guidance, count=count, nfe=nfe),
    )


def _script(
    run: InteractiveRun, mode: SamplingMode, *, condition: str, seed: int, guidance: float, count: int, nfe: int
) -> str:
    """The Python that makes the images of `make_samples` again, and writes them to files."""
    conditions = run.sampler.conditions
    options: dict[str, object] = {}
    if conditions.count and condition.strip():
        option = "prompts" if conditions.captions else "labels"
        options[option] = condition.strip()
    options["count"] = count
    options["nfe"] = nfe
    options["seed"] = seed
    if mode.solver.kind != run.sampler.spec.solver.kind:
        options["solver"] = mode.solver.kind
    if not run.guidance_refusal:
        options["guidance"] = guidance
    options["output"] = "pil"
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    stem = run.name.replace("{", "{{").replace("}", "}}")  # it stands in an f-string
    file = stem + "-{i:06d}.png"
    lines = [
        f"run = {run.load_call}",
        f"images = run.sample({arguments})",
        "for i, image in enumerate(images):",
        f"    image.save(f{file!r})",
    ]
    return "\n".join(lines) + "\n"


def compare_passes(run: InteractiveRun, condition: str, seed_text: str, guidance: float) -> Iterator[Answer]:
    """What the same noise becomes in 1, 2, 4 and 50 passes, a row for each mode; of points, many in a scatter.

    A cell that cannot be made says why. All cells together share the run's limit of time. Raises UserError for a
    condition, seed or guidance that the run does not have.
    """
    deadline = time.monotonic() + run.limit
    count = 1 if run.sampler.is_image else picture.SCATTER_POINTS
    c = run.conditions(condition, count)
    noises = run.noises(parse_seed(seed_text), count)
    guide = run.guide(guidance)
    line = ""
    untaught = [taught for letter, taught in TAUGHT_BY_LETTER.items() if letter not in run.modes]
    if untaught:
        line = f"Objective {run.sampler.flow.objective.kind} teaches no {' and no '.join(untaught)}."
    cells = {letter: [AnswerCell(None)] * len(PASSES) for letter in run.modes}
    for letter, mode in run.modes.items():
        for i, nfe in enumerate(PASSES):
            cells[letter][i] = _sample_cell(run, mode, nfe, c, noises, guide, deadline)
            rows = [AnswerRow(_mode_title(run.modes[letter]), list(row)) for letter, row in cells.items()]
            yield Answer(rows, line)


def _mode_title(mode: SamplingMode) -> str:
    """A mode by what it follows, and how: 'jumps: u (Restart)'."""
    return f"{TAUGHT_BY_LETTER[mode.letter]}: {mode.letter} ({solver_title(mode.solver)})"


def _sample_cell(
    run: InteractiveRun, mode: SamplingMode, nfe: int, c: Tensor, noises: Fresh, guide: CFG, deadline: float
) -> AnswerCell:
    """A cell with one picture, its passes and its seconds; where it cannot be made, a cell with the reason alone."""
    try:
        samples = run.sample(mode, nfe, c, noises, guide, deadline)
        note = f"{nfe_text(samples.nfe)}, {_seconds_text(samples.seconds)}"
        return AnswerCell(_pictures(run, samples.x)[0], note)
    except UserError as error:
        return AnswerCell(None, f"{nfe_text(nfe)}: {error}")


def interpolate_seeds(
    run: InteractiveRun,
    condition: str,
    seed_text: str,
    guidance: float,
    other_seed_text: str,
    letter: str,
    nfe: int,
) -> Iterator[Answer]:
    """Samples on the way from the noise of one seed to that of another (`noises_between`).

    Raises UserError where both seeds are equal, and for a condition, seed, guidance, mode or number of passes that the
    run does not have.
    """
    c = run.conditions(condition).expand(NUM_INTERPOLATED)
    seed = parse_seed(seed_text)
    other_seed = parse_seed(other_seed_text)
    if seed == other_seed:
        raise UserError(f"both seeds are {seed}: there is no way between them, give another one")
    noises = noises_between(run.noises(seed), run.noises(other_seed), NUM_INTERPOLATED)
    samples = run.sample(run.mode(letter), nfe, c, noises, run.guide(guidance))
    notes = [f"{k}/{NUM_INTERPOLATED - 1}" for k in range(NUM_INTERPOLATED)]
    notes[0] = f"seed {seed}"
    notes[-1] = f"seed {other_seed}"
    cells = [AnswerCell(image, note) for image, note in zip(_pictures(run, samples.x), notes, strict=True)]
    cost = f"{nfe_text(samples.nfe)} each, {_seconds_text(samples.seconds)} for all."
    meaning = f"Noises at equal angles on the quarter circle from that of seed {seed} to that of seed {other_seed}."
    yield Answer([AnswerRow("", cells)], f"{cost} {meaning}")


def noises_between(a: Fresh, b: Fresh, count: int) -> Fresh:
    """Noises on the way from a's to b's, of one row each: `count` rows at equal angles, both ends among them.

    They lie on a quarter circle, cos(s pi/2) a + sin(s pi/2) b, so that each is N(0, I) as a and b are: ours. Slerp
    (White 2016, Sec. 2.1) measures the angle between a and b instead; between many independent numbers it is nearly a
    right one.
    """
    angles = [pi / 2 * k / (count - 1) for k in range(count)]

    def fresh(k: int) -> Sample:
        return torch.cat([a(k) * cos(angle) + b(k) * sin(angle) for angle in angles])

    return fresh


def find_neighbours(
    run: InteractiveRun, condition: str, seed_text: str, guidance: float, letter: str, nfe: int
) -> Iterator[Answer]:
    """The first samples of a seed, and below each the nearest image of the data; the samples alone without the data.

    Raises UserError for a condition, seed, guidance, mode or number of passes that the run does not have.
    """
    c = run.conditions(condition, NUM_COMPARED)
    noises = run.noises(parse_seed(seed_text), NUM_COMPARED)
    samples = run.sample(run.mode(letter), nfe, c, noises, run.guide(guidance))
    sample_cells = [AnswerCell(image, str(i)) for i, image in enumerate(_pictures(run, samples.x))]
    sample_row = AnswerRow("samples", sample_cells)
    try:
        real, size = run.data
        spacing = run.spacing
    except (UserError, OSError) as error:
        yield Answer([sample_row], f"The data are not here, so no image is compared: {error}")
        return
    distances, indices = nearest(real, samples.x)
    nearest_cells: list[AnswerCell] = []
    for image, distance in zip(_pictures(run, real[indices]), distances.tolist(), strict=True):
        nearest_cells.append(AnswerCell(image, f"distance {distance:.2f}"))
    yield Answer([sample_row, AnswerRow("nearest", nearest_cells)], _distance_text(len(real), size, spacing))


def _distance_text(num_compared: int, size: int | None, spacing: float) -> str:
    """What a distance is, among how many images of the data it was looked for, and how far apart these lie.

    `size` is the number of images in the data; None: they never end.
    """
    if num_compared == size:
        count = f"all {num_compared:,}"
    elif size:
        count = f"{num_compared:,} of {size:,}"
    else:
        count = f"{num_compared:,}"
    return (
        f"Looked for among {count} images of the data, which lie {spacing:.2f} from the nearest other one in the mean. "
        "Distances are Euclidean, between the pixels of images in [-1, 1], not between what they show: an image moved "
        "by a pixel is far from itself. A copy has distance 0."
    )


def _pictures(run: InteractiveRun, x: Sample) -> list[Image.Image]:
    """A picture of each sample; of points, one picture of all. Raises UserError where they are not finite numbers."""
    if run.sampler.is_image:
        return picture.singles(x)
    points, _ = run.data
    return [picture.scatter(points, {"": x})]


def parse_seed(text: str) -> int:
    """The seed in a text that was typed. Raises UserError where it is not a whole number from 0 on."""
    seed = text.strip()
    if not (seed.isascii() and seed.isdecimal() and len(seed) <= MAX_SEED_DIGITS):
        raise UserError(
            f"seed '{brief(seed, 40)}' is none: give a whole number from 0 on, of at most {MAX_SEED_DIGITS} digits"
        )
    return int(seed)


def _seconds_text(seconds: float) -> str:
    """Seconds as text: '12 ms', '3.4 s'."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
