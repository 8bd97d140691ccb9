"""A report card: all that a number depends on; and reports as they are read back.

A file of a report may have been edited, or be of somebody else, so its parts are checked. Its `state` compares scores
with baselines, so that nobody takes noise for a result.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from dumo.config.conditions import Conditions
from dumo.config.tree import Evaluation
from dumo.data import Data
from dumo.data.caption import CaptionFiles
from dumo.evaluation import LikelihoodProtocol, MetricProtocol
from dumo.evaluation.protocol import CLASS_MMD, rising, trained_on
from dumo.evaluation.protocol import Scores as Found
from dumo.flow.solver import Euler, Heun, Solver
from dumo.io.read import brief, read_json
from dumo.io.weights import title
from dumo.run import deviation
from dumo.run.resolve import as_given
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.runtime import dist, typed
from dumo.types import UserError

FILE = "evaluation.json"
UNTRAINED, FAR = 1 / 2, 1 / 20  # of the distance of noise. Ours
TIMES, SHARE = 20, 0.02  # of a perfect sampler, and of samples among the data, where noise was not measured. Ours
AREAS = ("auc", "auc_features")  # under the curve of a two-sample test
WORSE = {CLASS_MMD: 1, "accuracy": -1, "nearest": -1, "copies": 1}  # which way
Row = dict[str, Any]
Card = dict[str, Any]
Number = float | None  # null: it was no finite number
State = Literal["untrained", "far", "near", "like the data"]


class Part(BaseModel):
    """A part of a report; what is not looked at here stays as it is."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Scores(Part):
    """Samples of one number of passes, and their scores by name."""

    __pydantic_extra__: dict[str, Number]  # pyright: ignore[reportIncompatibleVariableOverride], as pydantic has it
    nfe: int
    solver: str


class Baseline(Part):
    """The first score, and others, of what is no sample: new real data, or noise."""

    __pydantic_extra__: dict[str, Number]  # pyright: ignore[reportIncompatibleVariableOverride], as pydantic has it
    mean: float
    sd: float = Field(ge=0)


class Decoder(Part):
    """The codec of a card."""

    kind: str
    sha256: str | None


class OfCard(Part):
    """A report card, as it is read back."""

    solver: dict[str, JsonValue]
    codec: Decoder | None
    nfe: list[int] = []
    contrast: list[int] = []


class Judged(Part):
    """An evaluation, of whatever."""

    protocol: str = ""
    baselines: dict[str, Baseline] = {}
    state: str | None = None


class Report(Judged):
    """An evaluation of a run."""

    step: int
    weights: str = ""
    results: list[Scores] = Field(min_length=1)
    contrast: list[Scores]
    card: OfCard | None = None


class OfImages(Judged):
    """An evaluation of images that others made (`dumo.report.images`)."""

    images: str  # where they are
    results: list[dict[str, Number]] = Field(min_length=1, max_length=1)
    card: dict[str, JsonValue]


def card(opened: RunFolder, facts: Mapping[str, str], samples: int) -> Card:
    """The card of a run that is judged as its spec says, by an evaluator of these facts."""
    run, file, codec = opened.run, opened.file, opened.sampler.codec
    _, mark, decay = title(file).partition("ema-")
    number = decay.replace(".", "", 1).isdecimal()
    return {
        "protocol": run.evaluate.protocol.name,
        "samples": samples,
        **facts,
        "data": as_given(run).images.model_dump(mode="json"),
        "data_sd": deviation.noted(opened.folder),  # None: of a run from before it was measured
        "path": run.path.model_dump(mode="json"),
        "codec": codec and codec.codec.facts() | {"sha256": codec.sha256},
        "weights": opened.weights,
        "weights_sha256": opened.sha256,
        "step": opened.step,
        "ema": float(decay) if mark and number else None,  # None: no average, or not known
        **settings(opened.sampler, run.evaluate),
        "device": opened.device.type,
        "versions": dist.versions(),
    }


def labels(data: Data, evaluation: Evaluation) -> str:
    """Of which class, or caption, sample i is."""
    captions = Conditions(data).captions
    if isinstance(evaluation.protocol, LikelihoodProtocol):
        return "those of the data"
    if isinstance(captions, CaptionFiles):
        return "captions of images, from end to end"
    turn = f"i mod {data.labels}" if data.labels else "none"
    return f"{turn}, by {evaluation.captions} templates in turn" if captions else turn


def settings(sampler: Sampler, evaluation: Evaluation) -> Card:
    """What a spec says of how samples are made and judged."""
    objective, spec = sampler.flow.objective, sampler.spec
    return {
        **({"trained_on": "numbers"} if objective.kind == "drift" else {}),
        "labels": labels(sampler.data, evaluation),  # of sample i; others draw at random
        "solver": spec.solver.model_dump(mode="json"),
        "guide": spec.guide.model_dump(mode="json"),
        "knobs": {**objective.needs.knobs, **spec.knobs},
        "precision": sampler.precision,
        "nfe": sorted(set(evaluation.nfe)),
        "contrast": contrast(sampler, evaluation),
        "seed": evaluation.seed,
    }


def contrast(sampler: Sampler, evaluation: Evaluation) -> list[int]:
    """Passes of the solver of the contrast."""
    if isinstance(evaluation.protocol, LikelihoodProtocol):
        return [evaluation.protocol.passes]
    if not evaluation.contrast or not sampler.taught.velocity or sampler.spec.solver.kind == "euler":
        return []
    return sorted({*evaluation.contrast, *evaluation.nfe})


def contrast_solver(protocol: MetricProtocol) -> Solver:
    """The solver of the contrast: Euler; of likelihoods Heun, at passes that leave no error to speak of."""
    return Heun() if isinstance(protocol, LikelihoodProtocol) else Euler()


def seen(row: Mapping[str, Any], card: Card) -> list[str]:
    """The scores of a row that are by what the run of this card was trained on, without their spreads."""
    scores = [key for key, value in row.items() if isinstance(value, float) and not key.endswith("_sd")]
    return [score for score in scores if trained_on(score, card)]


def checked(found: Mapping[str, Any], path: Path, way_out: str, what: type[Judged] = Report) -> dict[str, Any]:
    """The same, with all parts of a report, whole numbers among the scores as floats. Raises UserError for another."""
    try:
        report = what.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{path} is damaged, {first_fault(error)}: {way_out}") from error
    return {**found, **report.model_dump(include=what.model_fields.keys() - {"card", "state"})}


def first_fault(error: ValidationError) -> str:
    """The first fault, and where it is, in words."""
    first = error.errors(include_url=False)[0]
    where, what = brief(".".join(map(str, first["loc"]))), first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: {what}" if where else what


def read_report(path: Path, *, images: bool = False) -> dict[str, Any]:
    """A run's report with its card, or one of `images`. Raises UserError where there is none, or it is damaged."""
    again = f"run dumo evaluate {typed(path.parent)} first"
    found = read_json(path, again)
    if not isinstance(found, dict) or found.get("card") is None:
        raise UserError(f"{path} has no report card: {again}")
    if images and "images" in found:
        return checked(found, path, "judge the images again, dumo evaluate --images", OfImages)
    report = checked(found, path, again)
    report["card"].setdefault("precision", "fp32")  # of a report from before it could be another
    return report


def first_of(row: Mapping[str, Any]) -> str:
    """The first score of a row, which a baseline's `mean` is of."""
    return next(key for key in row if key not in ("nfe", "solver"))


def state(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, Found]) -> State | None:
    """Where a run stands by its best row; rows and baselines as an evaluation has them.

    `like the data`: the first score, lower being better, is at most two deviations above a perfect sampler's, and so is
    what else tells, `class_mmd` among it (`apart`).
    `untrained`: by the first score at least half as far off as noise; where `noise` is not among the baselines, `TIMES`
    as far as a perfect sampler, and with a precision of at most `SHARE`. `far`: by the first score or by `class_mmd`
    over a twentieth of noise, or `TIMES` as far as a perfect sampler. None: no baseline tells, or more is better.
    """
    real = baselines.get("perfect") or baselines.get("null")
    noise = baselines.get("noise")
    scores = best_scores(rows)
    if not real or not scores or rising(next(iter(scores))):
        return None
    score = _first(scores)
    if is_as_perfect(score, real) and not apart(scores, real):
        return "like the data"
    if noise:
        if score >= UNTRAINED * noise["mean"]:
            return "untrained"
        return "far" if is_far(score, noise) or lacks_classes(scores, noise) else "near"
    if score <= TIMES * (abs(real["mean"]) + 2 * real["sd"]):
        return "near"
    return "untrained" if scores.get("precision", 1.0) <= SHARE else "far"


def best_scores(rows: Sequence[Mapping[str, Any]]) -> Found:
    """The scores of the row with the least `class_mmd`, or, where a row has none, the least first score; {} of none."""
    found = [{key: x for key, x in row.items() if isinstance(x, float)} for row in rows]
    found = [scores for scores in found if scores]
    if not found:
        return {}
    if all(CLASS_MMD in scores for scores in found):
        return min(found, key=lambda scores: scores[CLASS_MMD])
    return min(found, key=_first)


def is_as_perfect(score: float, real: Found) -> bool:
    """Whether the first score is at most two deviations above a perfect sampler's."""
    return score <= real["mean"] + 2 * real["sd"]


def is_far(score: float, noise: Found) -> bool:
    """Whether by the first score samples are over a twentieth as far off as noise."""
    return score > FAR * noise["mean"]


def lacks_classes(scores: Found, noise: Found) -> bool:
    """Whether by `class_mmd` samples are over a twentieth as far off as noise in place of each class."""
    return CLASS_MMD in scores and CLASS_MMD in noise and scores[CLASS_MMD] > FAR * noise[CLASS_MMD]


def apart(scores: Found, real: Found) -> list[str]:
    """The scores that are over two deviations worse than those of a perfect sampler, where these are known.

    An area under the curve of a two-sample test that is off either way: below 0.5 are copies, too.
    """
    known = [name for name in (*AREAS, *WORSE) if name in scores and f"{name}_sd" in real]
    away = {name: scores[name] - real[name] for name in known}
    off = {name: abs(by) if name in AREAS else WORSE[name] * by for name, by in away.items()}
    return [name for name, by in off.items() if by > 2 * real[f"{name}_sd"]]


def _first(scores: Found) -> float:
    return next(iter(scores.values()))
