"""Recipes as they are shipped, each read once for all tests of a process: a run is a frozen value."""

from functools import cache

from dumo.config.load import load
from dumo.config.spec import Run


@cache
def recipe(name: str) -> Run:
    """The recipe of this name."""
    return load(name)
