"""A report card: all that the numbers of an evaluation depend on; and reports as they are read back.

`card` makes the card of a run that is judged. `read_report` reads a report with its card: the file may have been
edited, or be of somebody else, so its parts are checked. What the scores in it say is in `dumo.report.score`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from dumo.config.conditions import Conditions
from dumo.config.tree import Evaluation
from dumo.data import Data
from dumo.data.caption import CaptionFiles
from dumo.evaluation import LikelihoodProtocol, MetricProtocol
from dumo.flow.solver import Euler, Heun, Solver
from dumo.io.read import brief, read_json
from dumo.io.weights import title
from dumo.run.resolve import as_given
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.runtime import dist, typed
from dumo.types import UserError

FILE = "evaluation.json"
Row = dict[str, Any]  # of an evaluation: passes, solver and scores
Card = dict[str, Any]
Number = float | None  # null: it was no finite number


class _ReportPart(BaseModel):
    """A part of a report; what is not looked at here stays as it is."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _ScoreRow(_ReportPart):
    """Samples of one number of passes, and their scores by name."""

    __pydantic_extra__: dict[str, Number]  # pyright: ignore[reportIncompatibleVariableOverride], as pydantic has it
    nfe: int
    solver: str


class _Baseline(_ReportPart):
    """The first score, and others, of what is no sample: new real data, or noise."""

    __pydantic_extra__: dict[str, Number]  # pyright: ignore[reportIncompatibleVariableOverride], as pydantic has it
    mean: float
    sd: float = Field(ge=0)


class _CodecFacts(_ReportPart):
    """The codec of a card."""

    kind: str
    sha256: str | None


class _CardFacts(_ReportPart):
    """A report card, as it is read back."""

    solver: dict[str, JsonValue]
    codec: _CodecFacts | None
    nfe: list[int] = []
    contrast: list[int] = []


class _AnyReport(_ReportPart):
    """An evaluation, of whatever."""

    protocol: str = ""
    baselines: dict[str, _Baseline] = {}
    state: str | None = None


class _RunReport(_AnyReport):
    """An evaluation of a run."""

    step: int
    weights: str = ""
    results: list[_ScoreRow] = Field(min_length=1)
    contrast: list[_ScoreRow]
    card: _CardFacts | None = None


class _ImagesReport(_AnyReport):
    """An evaluation of images that others made (`dumo.report.images`)."""

    images: str  # where they are
    results: list[dict[str, Number]] = Field(min_length=1, max_length=1)
    card: dict[str, JsonValue]


def card(opened: RunFolder, facts: Mapping[str, str], samples: int) -> Card:
    """The card of a run that is judged as its spec says, by an evaluator of these facts."""
    run = opened.run
    codec = opened.sampler.codec
    codec_facts = None
    if codec is not None:
        codec_facts = codec.codec.facts() | {"sha256": codec.sha256}
    return {
        "protocol": run.evaluate.protocol.name,
        "samples": samples,
        **facts,
        "data": as_given(run).images.model_dump(mode="json"),
        "data_sd": opened.data_sd,  # None: of a run from before it was measured
        "path": run.path.model_dump(mode="json"),
        "codec": codec_facts,
        "weights": opened.weights,
        "weights_sha256": opened.sha256,
        "step": opened.step,
        "ema": _ema_decay(opened.file),
        **settings(opened.sampler, run.evaluate),
        "device": opened.device.type,
        "versions": dist.versions(),
    }


def _ema_decay(weights: Path) -> float | None:
    """The decay of the average that a file of weights has, by its title; None: no average, or not known."""
    _, ema, decay = title(weights).partition("ema-")
    is_number = decay.replace(".", "", 1).isdecimal()
    return float(decay) if ema and is_number else None


def labels(data: Data, evaluation: Evaluation) -> str:
    """Of which class, or caption, sample i is."""
    captions = Conditions(data).captions
    if isinstance(evaluation.protocol, LikelihoodProtocol):
        return "those of the data"
    if isinstance(captions, CaptionFiles):
        return "captions of images, from end to end"
    in_turn = f"i mod {data.labels}" if data.labels else "none"
    return f"{in_turn}, by {evaluation.captions} templates in turn" if captions else in_turn


def settings(sampler: Sampler, evaluation: Evaluation) -> Card:
    """What a spec says of how samples are made and judged."""
    objective = sampler.flow.objective
    spec = sampler.spec
    card: Card = {}
    if objective.kind == "drift":
        card["trained_on"] = "numbers"
    return card | {
        "labels": labels(sampler.data, evaluation),  # of sample i; others draw at random
        "solver": spec.solver.model_dump(mode="json"),
        "guide": spec.guide.model_dump(mode="json"),
        "knobs": {**objective.needs.knobs, **spec.knobs},
        "precision": sampler.precision,
        "nfe": sorted(set(evaluation.nfe)),
        "contrast": contrast_passes(sampler, evaluation),
        "seed": evaluation.seed,
    }


def contrast_passes(sampler: Sampler, evaluation: Evaluation) -> list[int]:
    """Passes of the solver of the contrast."""
    if isinstance(evaluation.protocol, LikelihoodProtocol):
        return [evaluation.protocol.passes]
    if not evaluation.contrast or not sampler.taught.velocity or sampler.spec.solver.kind == "euler":
        return []
    return sorted({*evaluation.contrast, *evaluation.nfe})


def contrast_solver(protocol: MetricProtocol) -> Solver:
    """The solver of the contrast: Euler; of likelihoods Heun, at passes that leave no error to speak of."""
    return Heun() if isinstance(protocol, LikelihoodProtocol) else Euler()


def validate_report(
    report: Mapping[str, Any], path: Path, fix: str, model: type[_AnyReport] = _RunReport
) -> dict[str, Any]:
    """The same, with all parts of a report, whole numbers among the scores as floats. Raises UserError for another."""
    try:
        validated = model.model_validate(report)
    except ValidationError as error:
        raise UserError(f"{path} is damaged, {_first_fault(error)}: {fix}") from error
    return {**report, **validated.model_dump(include=model.model_fields.keys() - {"card", "state"})}


def _first_fault(error: ValidationError) -> str:
    """The first fault, and where it is, in words."""
    first = error.errors(include_url=False)[0]
    place = brief(".".join(map(str, first["loc"])))
    fault = first["msg"][0].lower() + first["msg"][1:]
    return f"{place}: {fault}" if place else fault


def read_report(path: Path, *, images: bool = False) -> dict[str, Any]:
    """A run's report with its card, or one of `images`. Raises UserError where there is none, or it is damaged."""
    fix = f"run dumo evaluate {typed(path.parent)} first"
    report = read_json(path, fix)
    if not isinstance(report, dict) or report.get("card") is None:
        raise UserError(f"{path} has no report card: {fix}")
    if images and "images" in report:
        return validate_report(report, path, "judge the images again, dumo evaluate --images", _ImagesReport)
    report = validate_report(report, path, fix)
    report["card"].setdefault("precision", "fp32")  # of a report from before it could be another
    return report
