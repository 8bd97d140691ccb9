"""`Run`: one complete tree of specs, whose parts fit one another. The run.yaml of every run's folder holds one.

The fields are those of `dumo.config.tree.Tree`, and what must fit is in `dumo.config.check`. They are apart because
checks take a tree whose parts need not fit yet.
"""

from pydantic import model_validator

from dumo.config.check import check
from dumo.config.tree import Tree


class Run(Tree):
    """All parts of a run. Raises pydantic's ValidationError where a field is wrong, or two parts do not fit."""

    @model_validator(mode="after")
    def _require_parts_fit(self) -> "Run":
        check(self)
        return self
