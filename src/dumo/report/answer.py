"""What the demo answers: rows of pictures with their words, of one run or of several.

`make`, `passes`, `interpolation` and `neighbours` answer for one run; `answer_runs` asks several, one after the other.
What takes long is answered in parts: each answer holds what there was before, and more. Nothing here knows a browser
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
from dumo.report.gallery import POINTS, TAUGHT_BY_LETTER, SamplingMode, solver_title
from dumo.report.live import InteractiveRun
from dumo.report.sample import sheet
from dumo.run.prompt import names
from dumo.runtime.progress import passes_text
from dumo.types import Sample, UserError

PASSES = (1, 2, 4, 50)  # side by side: what few-step models take, and what flow models do
STEPS = 9  # from one noise to another, both ends among them
SAMPLES = 8  # with their nearest images
MAX_SEED_DIGITS = 18  # ours


def noises_between(a: Fresh, b: Fresh, steps: int) -> Fresh:
    """Noises from that of a to that of b, one row each, at equal angles, both ends among them.

    They lie on a quarter circle, cos(s pi/2) a + sin(s pi/2) b, so that each is N(0, I) as a and b are: ours. Slerp
    (White 2016, Sec. 2.1) takes the angle between a and b for the right one: of many independent numbers it is nearly
    that.
    """
    angles = [pi / 2 * k / (steps - 1) for k in range(steps)]

    def fresh(k: int) -> Sample:
        return torch.cat([a(k) * cos(angle) + b(k) * sin(angle) for angle in angles])

    return fresh


@dataclass(frozen=True)
class AnswerCell:
    """A picture and the words below it; None: there is none, and the words say why."""

    picture: Image.Image | None
    note: str = ""


@dataclass(frozen=True)
class AnswerRow:
    """Pictures side by side, and what they have in common; `across`: how many to a line, all if 0."""

    title: str
    cells: Sequence[AnswerCell]
    across: int = 0

    @property
    def width(self) -> int:
        """How many pictures stand in its longest line."""
        return self.across or len(self.cells)


@dataclass(frozen=True)
class Answer:
    """Rows of pictures, and a line about them all; of samples to keep, their sheet, and the Python that makes them."""

    rows: Sequence[AnswerRow]
    line: str = ""
    sheet: Image.Image | None = None
    script: str = ""


Answers = Callable[..., Iterator[Answer]]  # of a run, and what a person chose


def answer_runs(lives: Sequence[InteractiveRun], answers: Answers, *chosen: object) -> Iterator[dict[str, Answer]]:
    """The answer of each run by its name, one run after the other, each as far as it is.

    Where a run cannot answer and another can, its line says why. Raises UserError where none can.
    """
    done: dict[str, Answer] = {}
    refusals: list[UserError] = []
    for live in lives:
        answer = Answer([])
        try:
            for answer in answers(live, *chosen):
                yield {**done, live.name: answer}
        except UserError as error:
            answer = replace(answer, line=str(error))
            refusals.append(error)
        done[live.name] = answer
    if len(refusals) == len(lives):
        raise refusals[0]
    if refusals:
        yield done


def make(
    live: InteractiveRun, what: str, seed: str, guidance: float, n: int, nfe: int, letter: str
) -> Iterator[Answer]:
    """Samples 0 to n - 1 of a seed, as `dumo sample` and `run.sample` make them. Raises UserError as `passes`."""
    c = live.conditions(what, n)
    seed_number = parse_seed(seed)
    mode = live.mode(letter)
    made = live.make(mode, nfe, c, live.fresh(seed_number, n), live.guide(guidance))
    conditions = live.sampler.conditions
    condition_names = names(live.sampler, c)
    notes = [str(i) for i in range(n)]
    if conditions.count and len(set(condition_names)) > 1:
        notes = condition_names
    cells = [AnswerCell(image, note) for image, note in zip(_pictures(live, made.x), notes, strict=True)]
    images = "1 image" if n == 1 else f"{n} images"
    yield Answer(
        [AnswerRow("", cells, across=1 + isqrt(n - 1))],
        f"{images}, {passes_text(made.nfe)} each, {_seconds_text(made.seconds)} for all.",
        sheet(made.x, c, conditions, condition_names),
        script(live, what, seed_number, guidance, n, nfe, mode),
    )


def script(live: InteractiveRun, what: str, seed: int, guidance: float, n: int, nfe: int, mode: SamplingMode) -> str:
    """The Python that makes the same images, and writes them to files."""
    conditions = live.sampler.conditions
    options: dict[str, object] = {}
    if conditions.count and what.strip():
        options["prompts" if conditions.captions else "classes"] = what.strip()
    options["n"] = n
    options["nfe"] = nfe
    options["seed"] = seed
    if mode.solver.kind != live.sampler.spec.solver.kind:
        options["solver"] = mode.solver.kind
    if not live.unguided:
        options["guidance"] = guidance
    options["output"] = "pil"
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    file = live.name.replace("{", "{{").replace("}", "}}") + "-{i:06d}.png"
    lines = [
        f"run = {live.load}",
        f"images = run.sample({arguments})",
        "for i, image in enumerate(images):",
        f"    image.save(f{file!r})",
    ]
    return "\n".join(lines) + "\n"


def passes(live: InteractiveRun, what: str, seed: str, guidance: float) -> Iterator[Answer]:
    """The same noise by 1, 2, 4 and 50 passes, a row for each mode; of points, many in a scatter.

    What a mode cannot make says why. Raises UserError for a class, seed or guidance that is none.
    """
    until = time.monotonic() + live.limit
    n = 1 if live.sampler.is_image else POINTS
    c = live.conditions(what, n)
    fresh = live.fresh(parse_seed(seed), n)
    guide = live.guide(guidance)
    line = ""
    untaught = [taught for letter, taught in TAUGHT_BY_LETTER.items() if letter not in live.modes]
    if untaught:
        line = f"Objective {live.sampler.flow.objective.kind} teaches no {' and no '.join(untaught)}."
    cells = {letter: [AnswerCell(None)] * len(PASSES) for letter in live.modes}
    for letter, mode in live.modes.items():
        for i, nfe in enumerate(PASSES):
            cells[letter][i] = _sample_cell(live, mode, nfe, c, fresh, guide, until)
            rows = [AnswerRow(_mode_title(live.modes[letter]), list(row)) for letter, row in cells.items()]
            yield Answer(rows, line)


def _mode_title(mode: SamplingMode) -> str:
    """A mode by what it follows, and how: 'jumps: u (Restart)'."""
    return f"{TAUGHT_BY_LETTER[mode.letter]}: {mode.letter} ({solver_title(mode.solver)})"


def _sample_cell(
    live: InteractiveRun, mode: SamplingMode, nfe: int, c: Tensor, fresh: Fresh, guide: CFG, until: float
) -> AnswerCell:
    """One sample as a cell, with its passes and seconds; where it cannot be made, the reason alone."""
    try:
        made = live.make(mode, nfe, c, fresh, guide, until)
        return AnswerCell(_pictures(live, made.x)[0], f"{passes_text(made.nfe)}, {_seconds_text(made.seconds)}")
    except UserError as error:
        return AnswerCell(None, f"{passes_text(nfe)}: {error}")


def interpolation(
    live: InteractiveRun, what: str, seed: str, guidance: float, other: str, letter: str, nfe: int
) -> Iterator[Answer]:
    """Samples along the way from the noise of a seed to that of another. Raises UserError as `passes`, and for one."""
    c = live.conditions(what).expand(STEPS)
    a = parse_seed(seed)
    b = parse_seed(other)
    if a == b:
        raise UserError(f"both seeds are {a}: there is no way between them, give another one")
    noises = noises_between(live.fresh(a), live.fresh(b), STEPS)
    made = live.make(live.mode(letter), nfe, c, noises, live.guide(guidance))
    notes = [f"seed {a}", *(f"{k}/{STEPS - 1}" for k in range(1, STEPS - 1)), f"seed {b}"]
    cells = [AnswerCell(image, note) for image, note in zip(_pictures(live, made.x), notes, strict=True)]
    cost = f"{passes_text(made.nfe)} each, {_seconds_text(made.seconds)} for all."
    meaning = f"Noises at equal angles on the quarter circle from that of seed {a} to that of seed {b}."
    yield Answer([AnswerRow("", cells)], f"{cost} {meaning}")


def neighbours(live: InteractiveRun, what: str, seed: str, guidance: float, letter: str, nfe: int) -> Iterator[Answer]:
    """The first samples of a seed, and below each the nearest image of the data. Raises UserError as `passes`."""
    c = live.conditions(what, SAMPLES)
    noises = live.fresh(parse_seed(seed), SAMPLES)
    made = live.make(live.mode(letter), nfe, c, noises, live.guide(guidance))
    samples = AnswerRow("samples", [AnswerCell(image, str(i)) for i, image in enumerate(_pictures(live, made.x))])
    try:
        real, size = live.data
        spacing = live.spacing
    except (UserError, OSError) as error:
        yield Answer([samples], f"The data are not here, so no image is compared: {error}")
        return
    distances, places = nearest(real, made.x)
    cells: list[AnswerCell] = []
    for image, distance in zip(_pictures(live, real[places]), distances.tolist(), strict=True):
        cells.append(AnswerCell(image, f"distance {distance:.2f}"))
    yield Answer([samples, AnswerRow("nearest", cells)], _distance_text(len(real), size, spacing))


def _distance_text(rows: int, size: int | None, spacing: float) -> str:
    """What a distance is, among how many images, and how far these lie from one another."""
    if rows == size:
        among = f"all {rows:,}"
    elif size:
        among = f"{rows:,} of {size:,}"
    else:
        among = f"{rows:,}"
    return (
        f"Looked for among {among} images of the data, which lie {spacing:.2f} from the nearest other one in the mean. "
        "Distances are Euclidean, between the pixels of images in [-1, 1], not between what they show: an image moved "
        "by a pixel is far from itself. A copy has distance 0."
    )


def _pictures(live: InteractiveRun, x: Sample) -> list[Image.Image]:
    """Samples as pictures: one each, of points one for all. Raises UserError where they are no finite numbers."""
    if live.sampler.is_image:
        return picture.singles(x)
    points, _ = live.data
    return [picture.scatter(points, {"": x})]


def parse_seed(text: str) -> int:
    """A seed as it was typed. Raises UserError for what is none."""
    seed = text.strip()
    if not (seed.isascii() and seed.isdecimal() and len(seed) <= MAX_SEED_DIGITS):
        raise UserError(
            f"seed '{brief(seed, 40)}' is none: give a whole number from 0 on, of at most {MAX_SEED_DIGITS} digits"
        )
    return int(seed)


def _seconds_text(seconds: float) -> str:
    """Seconds as text: '12 ms', '3.4 s'."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
