"""A report card: all that a number depends on, beside the number.

Two numbers may stand in one table if what measured them is the same (`MEASURED`); what made the samples, the weights,
the solver and its settings, may differ, for that is what is compared. A codec counts to the measure: who decodes in
another way shows other pixels for the same latent. Its scale and shift do not, they belong to the net.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dumo import dist
from dumo.config.spec import Run
from dumo.data.caption import Files
from dumo.io.weights import title
from dumo.protocols import LikelihoodProtocol
from dumo.protocols.evaluator import trained_on
from dumo.run import deviation
from dumo.run.folder import RunFolder
from dumo.sampling.solver import Euler, Heun, Solver
from dumo.types import UserError

Card = dict[str, Any]

MEASURED = (
    "protocol",
    "samples",
    "features",
    "features_sha256",
    "reference",
    "reference_sha256",
    "resize",
    "rounding",
    "codec",
    "seed",
)


def card(opened: RunFolder, facts: Mapping[str, str], samples: int) -> Card:
    """The card of a run that is judged as its spec says, by an evaluator of these facts."""
    run, file = opened.run, opened.file
    _, mark, decay = title(file).partition("ema-")
    return {
        "protocol": run.evaluate.protocol.name,
        "samples": samples,
        **facts,
        "data": run.images.model_dump(mode="json"),
        "data_sd": deviation.noted(opened.folder),  # None: of a run from before it was measured
        "path": run.path.model_dump(mode="json"),
        "codec": _codec(opened),
        "weights": opened.weights,
        "weights_sha256": opened.sha256,
        "step": opened.step,
        "ema": float(decay) if mark and _is_number(decay) else None,  # None: no average, or not known
        **settings(run),
        "device": opened.device.type,
        "versions": dist.versions(),
    }


def labels(run: Run) -> str:
    """Of which class, or caption, sample i is."""
    if isinstance(run.evaluate.protocol, LikelihoodProtocol):
        return "those of the data"
    if isinstance(run.captions, Files):
        return "captions of images, from end to end"
    told = f"i mod {run.data.labels}" if run.data.labels else "none"
    return f"{told}, by {run.evaluate.captions} templates in turn" if run.captions else told


def settings(run: Run) -> Card:
    """What a run's spec says of how samples are made and judged."""
    on = run.objective.needs.trained_on
    return {
        **({"trained_on": on} if on else {}),
        "labels": labels(run),  # of sample i; others draw at random
        "solver": run.sample.solver.model_dump(mode="json"),
        "guide": run.sample.guide.model_dump(mode="json"),
        "knobs": run.knobs,
        "precision": run.precision,
        "nfe": sorted(set(run.evaluate.nfe)),
        "contrast": contrast(run),
        "seed": run.evaluate.seed,
    }


def contrast(run: Run) -> list[int]:
    """Passes of the solver that stands beside the results."""
    if isinstance(run.evaluate.protocol, LikelihoodProtocol):
        return [run.evaluate.protocol.passes]
    if not run.evaluate.contrast or not run.reads.velocity or run.sample.solver.kind == "euler":
        return []
    return sorted({*run.evaluate.contrast, *run.evaluate.nfe})


def beside(run: Run) -> Solver:
    """The solver of the contrast: Euler; of likelihoods Heun, at passes that leave no error to speak of."""
    return Heun() if isinstance(run.evaluate.protocol, LikelihoodProtocol) else Euler()


def seen(row: Mapping[str, Any], card: Card) -> list[str]:
    """The scores of a row that are by what the run of this card was trained on, without their spreads."""
    scores = [key for key, value in row.items() if isinstance(value, float) and not key.endswith("_sd")]
    return [score for score in scores if trained_on(score, card)]


def differing(cards: Sequence[Card]) -> dict[str, list[Any]]:
    """What measured otherwise: the fields that are not the same on all cards, each with its value on every card."""
    told = [_measured(one) for one in cards]
    fields = dict.fromkeys(field for one in told for field in one)
    found = {field: [one.get(field) for one in told] for field in fields}
    return {field: values for field, values in found.items() if any(value != values[0] for value in values)}


def alike(cards: Mapping[str, Card]) -> None:
    """Refuse cards, by name, that were measured otherwise. Raises UserError with the fields side by side."""
    if differs := differing(list(cards.values())):
        lines = [f"{field}: {_beside(cards, values)}" for field, values in differs.items()]
        raise UserError(
            "\n  ".join(["these were not measured alike, so no table holds them both:", *lines])
            + "\nJudge them alike, or print the table with what differs: --anyway"
        )


def brief(value: object) -> str:
    """A value of a card in a table: hashes cut short."""
    return " ".join(word[:8] if len(word) == 64 else word for word in str(value).split())


def _beside(cards: Mapping[str, Card], values: Sequence[Any]) -> str:
    """'0 in a, b; 1 in c'."""
    names: dict[str, list[str]] = {}
    for name, value in zip(cards, values, strict=True):
        names.setdefault(str(value), []).append(name)
    return "; ".join(f"{value} in {', '.join(which)}" for value, which in names.items())


def _measured(one: Card) -> Card:
    """What of a card is measure. Where the reference has no hash, the data are in its place."""
    told = {field: one[field] for field in MEASURED if field in one}
    if codec := told["codec"]:
        told["codec"] = f"{codec['kind']} {codec['sha256']}"
    return told if "reference_sha256" in told else told | {"data": one.get("data")}


def _codec(opened: RunFolder) -> dict[str, Any] | None:
    """The codec that decodes, with the hash of its weights."""
    if (codec := opened.codec) is None:
        return None
    named = codec.codec.model_dump(mode="json")
    return {"kind": named["kind"], "scale": named["scale"], "shift": named["shift"], "sha256": codec.sha256}


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()
