"""A run: one tree of specs, complete, that a YAML file holds and that stands in every run's folder."""

from pydantic import model_validator

from dumo.config.check import check
from dumo.config.tree import Tree


class Run(Tree):
    """All there is to know to make a run again, its parts checked against one another."""

    @model_validator(mode="after")
    def _fits(self) -> "Run":
        check(self)
        return self
