"""A report card: all that the numbers of an evaluation depend on; and reports as they are read back.

To write, `make_card` makes the card of a run that is judged. `judging_settings` is the part of it that a spec alone
decides, with `labels_text`, `contrast_passes` and `contrast_solver`; `protocol_settings` says what the protocol's name
does not.

`is_card_of` says whether a card is of what a run samples now.

To read, `read_report` reads a report with its card, and `validate_report` checks one that is read already: the file may
have been edited, or be of somebody else. What the scores in it say is in `dumo.report.score`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from dumo.config.conditions import Conditions
from dumo.config.place import EVALUATION_FILE, OTHER_EVALUATIONS
from dumo.config.spec import Evaluation, Run
from dumo.data import Data
from dumo.data.caption import CaptionFiles
from dumo.evaluation import LikelihoodProtocol, MetricProtocol
from dumo.evaluation.metric import SAMPLE_SPACE
from dumo.flow.solver import Euler, Heun, Solver
from dumo.io.read import brief, read_json
from dumo.io.weights import title
from dumo.run.resolve import as_given
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder, sampled_part
from dumo.runtime import shell_path
from dumo.runtime.device import software_versions
from dumo.types import UserError

Row = dict[str, Any]  # of an evaluation: passes, solver and scores
Card = dict[str, Any]  # values of JSON, by name
Score = float | None  # null: it was no finite number


class _ReportPart(BaseModel):
    """A part of a report. Fields that it does not name are not checked."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _ScoreRow(_ReportPart):
    """The scores, by name, of samples at one number of passes."""

    __pydantic_extra__: dict[str, Score]  # pyright: ignore[reportIncompatibleVariableOverride], as pydantic has it
    nfe: int
    solver: str


class _Baseline(_ReportPart):
    """The scores of something else than samples, such as new real data or noise."""

    __pydantic_extra__: dict[str, Score]  # pyright: ignore[reportIncompatibleVariableOverride], as pydantic has it
    mean: float  # of the first score
    sd: float = Field(ge=0)


class _CodecFacts(_ReportPart):
    """What a card says of a codec."""

    kind: str
    sha256: str | None


class _CardFacts(_ReportPart):
    """A run's report card, as it is read back."""

    solver: dict[str, JsonValue]
    codec: _CodecFacts | None
    nfe: list[int] = []
    contrast: list[int] = []


class _AnyReport(_ReportPart):
    """What evaluations of runs and of images share."""

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
    results: list[dict[str, Score]] = Field(min_length=1, max_length=1)
    card: dict[str, JsonValue]


def make_card(opened: RunFolder, facts: Mapping[str, str], samples: int) -> Card:
    """The card of a run that is judged as its spec says, by this many samples and an evaluator of these facts."""
    run = opened.run
    codec = opened.sampler.codec
    codec_facts = None
    if codec is not None:
        codec_facts = codec.codec.facts() | {"sha256": codec.sha256}
    return {
        "protocol": run.evaluate.protocol.name,
        "samples": samples,
        **facts,
        "data": as_given(run).shown_data.model_dump(mode="json"),
        "data_sd": opened.data_sd,  # None: of a run from before it was measured
        "path": run.path.model_dump(mode="json"),
        "codec": codec_facts,
        "weights": opened.weights,
        "weights_sha256": opened.sha256,
        "step": opened.step,
        "ema": _ema_decay(opened),
        **judging_settings(opened.sampler, run.evaluate),
        "device": opened.device.type,
        "versions": software_versions(),
    }


def _ema_decay(opened: RunFolder) -> float | None:
    """The decay of the average that the weights are, by its part of a checkpoint; None: no average, or not known."""
    part = title(opened.file) if opened.given_weights else sampled_part(opened.run.train)
    _, prefix, decay = part.partition("ema-")
    is_number = decay.replace(".", "", 1).isdecimal()
    return float(decay) if prefix and is_number else None


def labels_text(data: Data, evaluation: Evaluation) -> str:
    """The class or caption of sample i, in words."""
    captions = Conditions(data).captions
    if isinstance(evaluation.protocol, LikelihoodProtocol):
        return "those of the data"
    if isinstance(captions, CaptionFiles):
        return "captions of images, from end to end"
    in_turn = f"i mod {data.labels}" if data.labels else "none"
    if captions:
        return f"{in_turn}, by {evaluation.captions} templates in turn"
    return in_turn


def judging_settings(sampler: Sampler, evaluation: Evaluation) -> Card:
    """The fields of a card that say how samples are made and judged, as the spec alone decides."""
    fields: Card = {}
    if sampler.flow.objective.needs.compares_rows:
        fields["trained_on"] = SAMPLE_SPACE  # its loss compares them with data, so their distances are no judges of it
    return fields | {
        "labels": labels_text(sampler.data, evaluation),  # elsewhere labels are often drawn at random
        **_sampling_settings(sampler),
        "nfe": sorted(set(evaluation.nfe)),
        "contrast": contrast_passes(sampler, evaluation),
        "seed": evaluation.seed,
    }


def _sampling_settings(sampler: Sampler) -> Card:
    """The fields of a card that say how samples of a given number of passes are made."""
    spec = sampler.spec
    return {
        "solver": spec.solver.model_dump(mode="json"),
        "guide": spec.guide.model_dump(mode="json"),
        "knobs": {**sampler.flow.objective.needs.knobs, **spec.knobs},
        "precision": sampler.precision,
    }


def is_card_of(card: Mapping[str, Any], opened: RunFolder) -> bool:
    """Whether a card is of the weights of an opened run, sampled as it samples now."""
    for field, value in _sampling_settings(opened.sampler).items():
        if card.get(field) != value:
            return False
    return card.get("weights_sha256") == opened.sha256


def protocol_settings(run: Run) -> Card:
    """What a run is judged by that its protocol's name leaves out: the split, and fields that are not as by default.

    A model or a reference is named as the user typed it, by an absolute path's last part.
    """
    evaluation = as_given(run).evaluate
    settings = evaluation.protocol.model_dump(mode="json", exclude={"kind", "samples"}, exclude_defaults=True)
    if evaluation.split is not None:
        settings["split"] = evaluation.split
    return settings


def contrast_passes(sampler: Sampler, evaluation: Evaluation) -> list[int]:
    """The numbers of passes of the contrast; [] where there is none."""
    if isinstance(evaluation.protocol, LikelihoodProtocol):
        return [evaluation.protocol.passes]
    if not evaluation.contrast or not sampler.taught.velocity or sampler.spec.solver.kind == "euler":
        return []
    return sorted({*evaluation.contrast, *evaluation.nfe})


def contrast_solver(protocol: MetricProtocol) -> Solver:
    """The solver of the contrast: Euler; for likelihoods Heun, in passes enough that its error does not count."""
    return Heun() if isinstance(protocol, LikelihoodProtocol) else Euler()


def validate_report(
    report: Mapping[str, Any], path: Path, fix: str, model: type[_AnyReport] = _RunReport
) -> dict[str, Any]:
    """A report of this model, with fields that older ones lack, and with whole numbers among the scores as floats.

    Raises UserError, with `fix`, where the report, which was read from `path`, does not have the model's form.
    """
    try:
        validated = model.model_validate(report)
    except ValidationError as error:
        raise UserError(f"{path} is damaged, {_first_fault(error)}: {fix}") from error
    return {**report, **validated.model_dump(include=model.model_fields.keys() - {"card", "state"})}


def _first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found, and where it is, in words."""
    first = error.errors(include_url=False)[0]
    place = brief(".".join(map(str, first["loc"])))
    fault = first["msg"][0].lower() + first["msg"][1:]
    return f"{place}: {fault}" if place else fault


def read_report(path: Path, *, images: bool = False) -> dict[str, Any]:
    """Read a run's report with its card; with `images` it may also be a report of images that others made.

    Raises UserError where there is none, or it is damaged.
    """
    fix = "name a run's folder, or a file that dumo evaluate wrote"
    if path.name == EVALUATION_FILE or path.match(OTHER_EVALUATIONS):
        fix = f"run dumo evaluate {shell_path(path.parent)} first"
    report = read_json(path, fix)
    if not isinstance(report, dict) or report.get("card") is None:
        raise UserError(f"{path} has no report card: {fix}")
    if images and "images" in report:
        return validate_report(report, path, "judge the images again, dumo evaluate --images", _ImagesReport)
    report = validate_report(report, path, fix)
    # of a report from before these fields
    report["card"].setdefault("precision", "fp32")
    report["card"].setdefault("protocol_settings", {})
    return report
