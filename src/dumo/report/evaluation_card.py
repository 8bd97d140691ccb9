"""The card of an evaluation: a dictionary of everything that its scores depend on.

`make_card` creates the card of a run. `measure` returns the entries that describe how samples were measured: scores are
comparable if these are equal. `sample_settings` returns the entries that identify the samples, and `is_card_of`
compares them with the run's current settings. `read_report` reads a report with its card.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dumo.config.conditions import Conditions
from dumo.config.spec import Evaluation, Run
from dumo.data import Data
from dumo.data.caption import CaptionFiles
from dumo.evaluation import LikelihoodProtocol, MetricProtocol
from dumo.evaluation.metric import CLASS_MMD, CLASSES_SHA256, SAMPLE_SPACE
from dumo.flow.solver import Euler, Heun, Solver
from dumo.io.read import read_json
from dumo.io.tensor_files import title
from dumo.run.resolve import without_paths
from dumo.run.trained import TrainedRun
from dumo.run.weights import sampled_part
from dumo.runtime.device import software_versions
from dumo.types import UserError

# Passes, solver and scores of an evaluation, by name.
Row = dict[str, Any]
# Values of JSON, by name.
Card = dict[str, Any]

# Matches the split in the name of a reference, such as "50,000 images of split test".
SPLIT_NAME = re.compile(r"\bsplit [^,]+")
MEASURE_FIELDS = (
    "protocol",
    "samples",
    "features",
    "features_sha256",
    "reference_sha256",
    CLASSES_SHA256,
    "resize",
    "rounding",
    "colours",
    CLASS_MMD,
    "codec",
    "seed",
)


def make_card(trained: TrainedRun, run: Run, facts: Mapping[str, str], samples: int) -> Card:
    """Return the card of an evaluation with the settings of `run`, this number of samples and these evaluator facts."""
    codec = trained.codec
    return {
        "protocol": run.evaluate.protocol.name,
        "protocol_settings": protocol_settings(run),
        "samples": samples,
        **facts,
        "data": without_paths(run).shown_data.model_dump(mode="json"),
        "data_sd": trained.data_sd,
        "path": run.path.model_dump(mode="json"),
        "codec": None if codec is None else codec.codec.facts() | {"sha256": codec.sha256},
        "weights": trained.weights,
        "step": trained.step,
        "ema": _ema_decay(trained),
        **sample_settings(trained, run),
        **judging_settings(run),
        "device": trained.device.type,
        "versions": software_versions(),
    }


def measure(card: Card) -> Card:
    """Return the entries of a card that describe how samples were measured. Scores are comparable if they are equal.

    Weights, solver and guidance are omitted, because they are what is compared. The codec is included, because another
    codec decodes the same latent to other pixels.
    """
    fields: Card = {field: card[field] for field in MEASURE_FIELDS if field in card}
    codec = card.get("codec")
    if codec:
        fields["codec"] = f"{codec['kind']} {codec['sha256']}"
    # The name of the reference tells whether a run was trained on it. The hash replaces the name of the split.
    if "reference_sha256" in card:
        fields["reference"] = SPLIT_NAME.sub("the data", str(card.get("reference")))
    else:
        fields |= {"reference": card.get("reference"), "data": card.get("data")}
    if str(card.get("protocol")).startswith("clip-score"):
        # The captions of the samples are the reference.
        fields["labels"] = card.get("labels")
    return fields


def sample_settings(trained: TrainedRun, run: Run) -> Card:
    """Return the entries of a card that identify the samples of `run` for a given NFE."""
    spec = run.sample
    return {
        "weights_sha256": trained.sha256,
        "solver": spec.solver.model_dump(mode="json"),
        "guide": spec.guide.model_dump(mode="json"),
        "knobs": run.knobs,
        "precision": run.precision,
    }


def is_card_of(card: Mapping[str, Any], trained: TrainedRun) -> bool:
    """Return whether a card describes samples of the opened run with its current settings."""
    return all(card.get(field) == value for field, value in sample_settings(trained, trained.spec).items())


def judging_settings(run: Run) -> Card:
    """Return the entries of a card that depend on the config of the evaluation."""
    evaluation = run.evaluate
    fields: Card = {
        "labels": labels_text(run.data, evaluation),
        "nfe": sorted(set(evaluation.nfe)),
        "contrast": contrast_passes(run),
        "seed": evaluation.seed,
    }
    if run.objective.needs.compares_rows:
        # The loss compares samples with data, so scores on their distances are biased.
        fields["trained_on"] = SAMPLE_SPACE
    return fields


def protocol_settings(run: Run) -> Card:
    """Return the protocol settings that its name omits: the split, and fields that differ from their defaults.

    Paths of models and references are shortened to their last component.
    """
    evaluation = without_paths(run).evaluate
    settings = evaluation.protocol.model_dump(mode="json", exclude={"kind", "samples"}, exclude_defaults=True)
    if evaluation.split is not None:
        settings["split"] = evaluation.split
    return settings


def labels_text(data: Data, evaluation: Evaluation) -> str:
    """Describe the class or caption of sample i. Other programs often draw labels at random."""
    captions = Conditions(data).captions
    if isinstance(evaluation.protocol, LikelihoodProtocol):
        return "those of the data"
    if isinstance(captions, CaptionFiles):
        return "captions of images, from end to end"
    in_turn = f"i mod {data.labels}" if data.labels else "none"
    if captions:
        return f"{in_turn}, by {evaluation.captions} templates in turn"
    return in_turn


def contrast_passes(run: Run) -> list[int]:
    """Return the NFE of the contrast, or [] if there is none."""
    evaluation = run.evaluate
    if isinstance(evaluation.protocol, LikelihoodProtocol):
        return [evaluation.protocol.passes]
    if not evaluation.contrast or not run.readings.velocity or run.sample.solver.kind == "euler":
        return []
    return sorted({*evaluation.contrast, *evaluation.nfe})


def contrast_solver(protocol: MetricProtocol) -> Solver:
    """Return the solver of the contrast: Euler, or Heun for likelihoods, with enough passes for a negligible error."""
    return Heun() if isinstance(protocol, LikelihoodProtocol) else Euler()


def read_report(path: Path) -> dict[str, Any]:
    """Read the report of an evaluation. Raises UserError if there is none."""
    report = read_json(path)
    if not isinstance(report, dict) or "card" not in report:
        raise UserError(f"{path} is not the report of an evaluation: run dumo evaluate")
    return report


def _ema_decay(trained: TrainedRun) -> float | None:
    """Return the EMA decay of the weights, from their name in a checkpoint, or None if they are not such an EMA."""
    part = title(trained.file) if trained.given_weights else sampled_part(trained.spec.train)
    _, prefix, decay = part.partition("ema-")
    is_number = decay.replace(".", "", 1).isdecimal()
    return float(decay) if prefix and is_number else None
