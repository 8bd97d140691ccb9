"""What an evaluation wrote, as it is read back, and how far a run has come by it, in a word.

A file may have been edited, or be of somebody else, so its parts are checked. The word compares scores with baselines,
so that nobody takes noise for a result.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from dumo.evaluation.protocol import Scores as Found
from dumo.evaluation.protocol import rising
from dumo.io.read import brief, read_json
from dumo.types import UserError

FILE = "evaluation.json"
UNTRAINED, FAR = 1 / 2, 1 / 20  # of the distance of noise. Ours
TIMES, SHARE = 20, 0.02  # of the baseline, and of samples among the data, where noise was not measured. Ours
Row = dict[str, Any]
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
    """The first score, real data against real data."""

    __pydantic_extra__: dict[str, Number]  # pyright: ignore[reportIncompatibleVariableOverride], as pydantic has it
    mean: float
    sd: float = Field(ge=0)


class Decoder(Part):
    """The codec of a card."""

    kind: str
    sha256: str | None


class Card(Part):
    """A report card (`dumo.run.evaluation.card`)."""

    solver: dict[str, JsonValue]
    codec: Decoder | None
    nfe: list[int] = []
    contrast: list[int] = []


class Report(Part):
    """An evaluation."""

    step: int
    weights: str = ""
    protocol: str = ""
    results: list[Scores] = Field(min_length=1)
    contrast: list[Scores]
    baselines: dict[str, Baseline] = {}
    state: str | None = None
    card: Card | None = None


def checked(found: Mapping[str, Any], path: Path, way_out: str) -> dict[str, Any]:
    """The same, with all parts of a report, whole numbers among the scores as floats. Raises UserError for another."""
    try:
        report = Report.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, what = ".".join(map(str, first["loc"])), first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{path} is damaged, {brief(where)}: {what}: {way_out}") from error
    return {**found, **report.model_dump(include=Report.model_fields.keys() - {"card", "state"})}


def read_report(path: Path) -> dict[str, Any]:
    """A report with its card. Raises UserError where there is none, or it is damaged."""
    again = f"run dumo evaluate {path.parent} first"
    try:
        found = read_json(path, again)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: {again}") from error
    if not isinstance(found, dict) or found.get("card") is None:
        raise UserError(f"{path} has no report card: {again}")
    report = checked(found, path, again)
    report["card"].setdefault("precision", "fp32")  # of a report from before it could be another
    return report


def state(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, Found]) -> State | None:
    """Where a run stands by the first score, lower being better, of its best row; both as an evaluation has them.

    `like the data`: within two deviations of the first baseline. `untrained`: at least half as far off as noise; where
    `noise` is not among the baselines, `TIMES` as far as data, and with a precision of at most `SHARE`. `far`: over a
    twentieth of noise, or `TIMES` as far as data. None: no baseline tells, or more is better.
    """
    if not baselines:
        return None
    real, noise = next(iter(baselines.values())), baselines.get("noise")
    found = [{key: x for key, x in row.items() if isinstance(x, float)} for row in rows]
    if not any(found) or rising(next(iter(found[0]), "")):
        return None
    scores = min(filter(None, found), key=_first)
    score = _first(scores)
    usual = abs(real["mean"]) + 2 * real["sd"]
    if score <= usual:
        return "like the data"
    if noise:
        return "untrained" if score >= UNTRAINED * noise["mean"] else "far" if score > FAR * noise["mean"] else "near"
    if score <= TIMES * usual:
        return "near"
    return "untrained" if scores.get("precision", 1.0) <= SHARE else "far"


def _first(scores: Found) -> float:
    return next(iter(scores.values()))
