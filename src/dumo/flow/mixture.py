"""Laws of one time t of which rows, chosen by their place, have another; r = 0."""

from typing import Literal

import torch
from pydantic import Field
from torch import Generator

from dumo.flow.density import Alike, Beta, LogitNormal, ToData, Uniform
from dumo.place import split_by_step, spread
from dumo.types import Time


class Atom(ToData):
    """One law, but t = `at` on a share of the rows; r = 0 (ours).

    Laws with a density teach one-step sampling, which starts at t = 1 exactly, by its neighbours. The rows are chosen
    by their place, evenly spread.
    """

    kind: Literal["atom"] = "atom"
    of: Alike = Beta()
    share: float = Field(default=0.15, ge=0, le=1)
    at: float = Field(default=1.0, ge=0, le=1)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t, r = self.of(n, g)
        return t.masked_fill(torch.tensor(spread(n, self.share), dtype=torch.bool), self.at), r


class Mixture(ToData):
    """Two laws of one time: `other` on a share of the rows, `of` on the rest; r = 0 (ours).

    So a law that hardly ever reaches the noise, as the logit-normal, has a tail there. The rows are chosen by their
    place, evenly spread.
    """

    kind: Literal["mixture"] = "mixture"
    of: Alike = LogitNormal()
    other: Alike = Uniform()
    share: float = Field(default=0.1, ge=0, le=1)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t = torch.zeros(n)
        for law, place in zip((self.other, self.of), split_by_step(spread(n, self.share)), strict=True):
            t[place] = law(len(place), g)[0]
        return t, torch.zeros_like(t)
