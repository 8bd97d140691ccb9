"""A run: one complete tree of specs, as a YAML file in every run's folder has it."""

from pydantic import model_validator

from dumo.config.check import check
from dumo.config.tree import Tree


class Run(Tree):
    """All parts of a run, checked against one another."""

    @model_validator(mode="after")
    def _fits(self) -> "Run":
        check(self)
        return self
