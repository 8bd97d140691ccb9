"""What an evaluation wrote, as it is read back: a file may have been edited, or be of somebody else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from dumo.io.text import brief
from dumo.types import UserError

Number = float | None  # null: it was no finite number


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
    """A report card (`dumo.evaluation.card`)."""

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
