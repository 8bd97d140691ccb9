"""A report card: all that a number depends on; and several runs in one table, if they were judged alike.

Two numbers may stand in one table if what measured them is the same (`MEASURED`); what made the samples, the weights,
the solver and its settings, may differ, for that is what is compared. A codec counts to the measure: who decodes in
another way shows other pixels for the same latent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dumo.data.caption import Files
from dumo.evaluation import LikelihoodProtocol
from dumo.evaluation.protocol import trained_on
from dumo.flow.solver import Euler, Heun, Solver
from dumo.io.weights import title
from dumo.objectives import Drift
from dumo.run import deviation
from dumo.run.config.spec import Run
from dumo.run.evaluation.record import FILE, Row, read_report
from dumo.run.folder import RunFolder
from dumo.runtime import dist
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
    if isinstance(run.conditions.captions, Files):
        return "captions of images, from end to end"
    turn = f"i mod {run.data.labels}" if run.data.labels else "none"
    return f"{turn}, by {run.evaluate.captions} templates in turn" if run.conditions.captions else turn


def settings(run: Run) -> Card:
    """What a run's spec says of how samples are made and judged."""
    return {
        **({"trained_on": "numbers"} if isinstance(run.objective, Drift) else {}),
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
    """Passes of the solver of the contrast."""
    if isinstance(run.evaluate.protocol, LikelihoodProtocol):
        return [run.evaluate.protocol.passes]
    if not run.evaluate.contrast or not run.reads.velocity or run.sample.solver.kind == "euler":
        return []
    return sorted({*run.evaluate.contrast, *run.evaluate.nfe})


def contrast_solver(run: Run) -> Solver:
    """The solver of the contrast: Euler; of likelihoods Heun, at passes that leave no error to speak of."""
    return Heun() if isinstance(run.evaluate.protocol, LikelihoodProtocol) else Euler()


def seen(row: Mapping[str, Any], card: Card) -> list[str]:
    """The scores of a row that are by what the run of this card was trained on, without their spreads."""
    scores = [key for key, value in row.items() if isinstance(value, float) and not key.endswith("_sd")]
    return [score for score in scores if trained_on(score, card)]


def differing(cards: Sequence[Card]) -> dict[str, list[Any]]:
    """What measured otherwise: the fields that are not the same on all cards, each with its value on every card."""
    measured = [_measured(one) for one in cards]
    fields = dict.fromkeys(field for one in measured for field in one)
    found = {field: [one.get(field) for one in measured] for field in fields}
    return {field: values for field, values in found.items() if any(value != values[0] for value in values)}


def alike(cards: Mapping[str, Card]) -> None:
    """Refuse cards, by name, that were measured otherwise. Raises UserError with the fields side by side."""
    if differs := differing(list(cards.values())):
        lines = [f"{field}: {_side_by_side(cards, values)}" for field, values in differs.items()]
        raise UserError(
            "\n  ".join(["these were not measured alike, so no table holds them both:", *lines])
            + "\nJudge them alike, or print the table with what differs: --anyway"
        )


def compare(sources: Sequence[str], *, anyway: bool = False) -> dict[str, Any]:
    """The evaluations of runs' folders, or files of them, as `rows` of one table.

    A setting of the solver that differs, such as m, has a column, and scores that a run was trained on stand under
    `trained_on`, where there are any: they are no judges of it. Raises UserError where an evaluation is missing, or
    they were measured otherwise, with what differs; `anyway` has the table all the same, what differs in columns of
    their own, and in `differs` the whole of it.
    """
    reports = {source: read_report(_file(source)) for source in sources}
    cards = {source: report["card"] for source, report in reports.items()}
    if not anyway:
        alike(cards)
    differs = differing(list(cards.values()))
    settings = {name for one in cards.values() for name in one["solver"] if name != "kind"}
    varied = [name for name in sorted(settings) if len({str(one["solver"].get(name)) for one in cards.values()}) > 1]
    rows, trained = list[Row](), any("trained_on" in one for one in cards.values())
    for i, (source, report) in enumerate(reports.items()):
        head = {"run": source, "step": report["step"], **{field: brief(found[i]) for field, found in differs.items()}}
        own = {name: report["card"]["solver"].get(name) for name in varied}
        on = {"trained_on": ", ".join(seen(report["results"][0], report["card"])) or None} if trained else {}
        rows += [head | own | scores | on for scores in report["results"]]
        rows += [head | dict.fromkeys(varied) | scores | on for scores in report["contrast"]]
    columns = dict.fromkeys(key for row in rows for key in row)
    return {
        "rows": [{key: row.get(key) for key in columns} for row in rows],
        "differs": {field: dict(zip(cards, found, strict=True)) for field, found in differs.items()},
    }


def brief(value: object) -> str:
    """A value of a card in a table: hashes cut short."""
    return " ".join(word[:8] if len(word) == 64 else word for word in str(value).split())


def _side_by_side(cards: Mapping[str, Card], values: Sequence[Any]) -> str:
    """'0 in a, b; 1 in c'."""
    names: dict[str, list[str]] = {}
    for name, value in zip(cards, values, strict=True):
        names.setdefault(str(value), []).append(name)
    return "; ".join(f"{value} in {', '.join(which)}" for value, which in names.items())


def _measured(one: Card) -> Card:
    """What of a card is measure. Where the reference has no hash, the data are in its place."""
    found = {field: one[field] for field in MEASURED if field in one}
    if codec := found["codec"]:
        found["codec"] = f"{codec['kind']} {codec['sha256']}"
    return found if "reference_sha256" in found else found | {"data": one.get("data")}


def _codec(opened: RunFolder) -> dict[str, Any] | None:
    """The codec that decodes, with the hash of its weights."""
    codec = opened.sampler.codec
    return codec and codec.codec.model_dump(exclude={"weights"}) | {"sha256": codec.sha256}


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


def _file(source: str) -> Path:
    """The evaluation that a run's folder holds, or the file itself. Raises UserError for neither."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"there is no run's folder or evaluation {source}: give folders such as runs/digits")
    if path.is_dir() and not (path / FILE).exists() and (others := sorted(map(str, path.glob("evaluation-*.json")))):
        raise UserError(
            f"{source} was not judged as its own spec says: name {' or '.join(others)}, or run dumo evaluate {source}"
        )
    return path / FILE if path.is_dir() else path
