"""`Run`: all parts of a run, which fit one another. The run.yaml of every run's folder holds one.

The fields are those of `dumo.config.parts.RunParts`, and what must fit is in `dumo.config.check`. `RunParts` has a file
of its own because the checks take it: its parts need not fit yet.
"""

from pydantic import model_validator

from dumo.config.check import check
from dumo.config.parts import RunParts


class Run(RunParts):
    """All parts of a run. Raises pydantic's ValidationError where a field is wrong, or two parts do not fit."""

    @model_validator(mode="after")
    def _require_parts_fit(self) -> "Run":
        check(self)
        return self
