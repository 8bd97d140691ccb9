"""Bits per dimension: the negative log-likelihood of data under the network's flow, usually held-out data.

`LikelihoodProtocol` is the spec. Its `evaluator` reads the data and dequantises them. The caller
(`dumo.report.evaluation`) computes log p(x) of the evaluator's data `x` with its `directions`, and passes it in nats to
`LikelihoodEvaluator.score`, in place of samples.

Levels k of L are dequantised by uniform noise U in [0, 1): x = 2 (k + U) / L - 1 (Theis et al. 2016; F2D2's code). By
Jensen's inequality, the log probability of the levels is at least the expected log density plus the log volume of a
cell, (2 / L)^D. So a sample with D dimensions takes at most

    -log2 p(x) / D + log2(L / 2)    bits per dimension:    7 are added for 256 levels, 3.09 for the 17 of digits.

Points have no levels: their bits are those of the density and may be negative.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, log2, prod
from typing import Literal

import torch
from pydantic import Field

from dumo.error import NotFiniteError
from dumo.evaluation.protocol import Context, NumberedSamples, Protocol, Scores, name_of_data
from dumo.evaluation.wholeset import Reference, choose_rows, collect
from dumo.flow.likelihood import signs
from dumo.runtime import limits
from dumo.runtime.random import keyed_normal
from dumo.types import Cond, Sample, UserError

# The largest distance of a value from its level, in levels (our choice).
MAX_LEVEL_ERROR = 1e-2


class LikelihoodProtocol(Protocol):
    """Evaluate the flow's density on the data held out of training, or on all data if none are held out."""

    kind: Literal["likelihood"] = "likelihood"
    # The number of levels in [-1, 1]. None means 256 for images and no levels for points.
    levels: int | None = Field(default=None, ge=2, le=2**16)
    # The number of random directions of div v (FFJORD: 1). 0 means all axes.
    probes: int = Field(default=1, ge=0, le=limits.PASSES)
    # The NFE of Heun's method (our choice).
    passes: int = Field(default=256, ge=2, multiple_of=2, le=limits.PASSES)

    @property
    def standard_samples(self) -> int:
        """1,000 (our choice)."""
        return 1000

    def find_problem(self, shape: tuple[int, ...], classes: int) -> str:
        """Refuse levels for points."""
        if len(shape) == 1 and self.levels:
            return "has no levels for points: set evaluate.protocol.levels=null"
        return ""

    def evaluator(self, context: Context) -> "LikelihoodEvaluator":
        """Return an evaluator with dequantised data.

        Raises UserError if there are fewer data than the protocol's samples, or if they have different levels.
        """
        total = self.total
        seed = context.seed
        reference = Reference.of(context.data(), total, seed)
        if len(reference.x) < total:
            raise UserError(
                f"protocol {self.name} needs {total} samples of the data, got {len(reference.x)}: set "
                f"evaluate.protocol.samples={len(reference.x)} or fewer"
            )
        rows = choose_rows(len(reference.x), total, self.kind, "rows")
        x = reference.x[rows]
        levels = self.levels
        if levels is None and x.ndim > 2:
            levels = 256
        reference_text = f"{total:,} samples of {name_of_data(context.split)}"
        if reference.trained is not None:
            reference_text += ", never trained on"
        directions = f"{self.probes} random signs" if self.probes else "all axes"
        noise = f"uniform noise on {levels} levels" if levels else "as they are"
        facts = {
            **reference.facts(seed, context.split),
            "reference": reference_text,
            "features": f"none: log density, div v by {directions}; {noise}",
        }
        if levels:
            x = dequantise(x, levels, seed)
        return LikelihoodEvaluator(protocol=self, x=x, c=reference.c[rows], levels=levels, seed=seed, facts=facts)


@dataclass(frozen=True)
class LikelihoodEvaluator:
    """Computes bits per dimension from log-likelihoods of its data.

    x: (n, *d), the dequantised data.
    c: (n,), the classes of the data.
    levels: the number of levels; None for continuous data.
    facts: entries of the report's card.
    """

    protocol: LikelihoodProtocol
    x: Sample
    c: Cond
    levels: int | None
    seed: int
    facts: dict[str, str]

    def directions(self, numbers: Sequence[int]) -> list[Sample]:
        """Return the directions of div v for these row numbers, each (rows, *d); [] means all axes.

        They do not depend on time.
        """
        return signs(
            self.seed,
            "likelihood",
            "probe",
            numbers=numbers,
            shape=self.x.shape[1:],
            probes=self.protocol.probes,
        )

    def score(self, samples: NumberedSamples) -> Scores:
        """Return `bits` per dimension, the mean over the data, and its standard error `bits_sd`.

        `samples` yields batches of row numbers and log p(x) in nats, both (n,). Raises UserError unless each row occurs
        once and is finite.
        """
        nats = collect(samples, len(self.x)).double()
        d = prod(self.x.shape[1:])
        if not nats.isfinite().all():
            raise NotFiniteError(
                "some likelihoods are not finite: increase evaluate.protocol.passes, or lower the learning rate"
            )
        bits = -nats / (d * log(2))
        if self.levels:
            bits = bits + log2(self.levels / 2)
        return {"bits": bits.mean().item(), "bits_sd": bits.std().item() / len(bits) ** 0.5}

    def baselines(self) -> dict[str, Scores]:
        """Return {}, since the likelihood of real data is unknown."""
        return {}


def dequantise(x: Sample, levels: int, seed: int) -> Sample:
    """Add uniform noise, keyed by seed and row, to samples x (n, *d) with `levels` levels from -1 to 1.

    Raises UserError if x has different levels.
    """
    k = (x + 1) / 2 * (levels - 1)
    if (k - k.round()).abs().max() > MAX_LEVEL_ERROR:
        raise UserError(
            f"the data do not have {levels} levels from -1 to 1: set evaluate.protocol.levels (17 for digits)"
        )
    u = torch.special.ndtr(keyed_normal(seed, "likelihood", "noise", rows=range(len(x)), shape=x.shape[1:]))
    return 2 * (k.round() + u) / levels - 1
