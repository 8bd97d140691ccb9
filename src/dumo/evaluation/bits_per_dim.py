"""How likely a net finds data that it may never have seen: bits per number of a sample, lower being better.

`LikelihoodProtocol` is the spec; its `evaluator` reads the data and puts noise on their levels (`dequantise`). The
caller takes log p(x) of the evaluator's own data `x` (`dumo.report.evaluation`), in the `directions` that it names, and
hands them to `LikelihoodEvaluator.score` in nats, in place of samples.

Grey levels k of L are made continuous by noise U, uniform in [0, 1): x = 2 (k + U) / L - 1, as is usual (Theis et al.
2016; F2D2's code). By Jensen's inequality the levels have at least the probability that p says of their cells, of
volume (2 / L)^D, so that a sample of D numbers takes at most

    -log2 p(x) / D + log2(L / 2)    bits a number:    7 to be added for 256 levels, 3.09 for the 17 of digits.

Points have no levels: bits of their density, which may be negative.
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

MAX_LEVEL_ERROR = 1e-2  # of a level, by which data may be off their levels: ours


class LikelihoodProtocol(Protocol):
    """Data held out of training, where some are, by the density of the net's flow."""

    kind: Literal["likelihood"] = "likelihood"
    levels: int | None = Field(default=None, ge=2, le=2**16)  # of grey in [-1, 1]; None: 256 of images, none of points
    probes: int = Field(default=1, ge=0, le=limits.PASSES)  # random directions of div v (FFJORD: 1); 0: all axes
    passes: int = Field(default=256, ge=2, multiple_of=2, le=limits.PASSES)  # of Heun, for comparison: ours

    @property
    def standard_samples(self) -> int:
        """1,000 of the data: ours."""
        return 1000

    def why_unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Why samples of this shape are not judged: points have no levels."""
        if len(shape) == 1 and self.levels:
            return "knows no levels of points: set evaluate.protocol.levels=null"
        return ""

    def evaluator(self, context: Context) -> "LikelihoodEvaluator":
        """The evaluator, with the data that it judges by.

        Raises UserError where the data are fewer than the protocol's samples, or have other levels.
        """
        total = self.total
        seed = context.seed
        reference = Reference.of(context.data(), total, seed)
        if len(reference.x) < total:
            raise UserError(
                f"protocol {self.name} judges by {total} samples, here are {len(reference.x)}: set "
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
    """Scores the log-likelihoods of its own data."""

    protocol: LikelihoodProtocol
    x: Sample  # the data (n, *d), with noise on their levels
    c: Cond  # (n,), their classes
    levels: int | None  # of grey; None: they have none
    seed: int
    facts: dict[str, str]  # for the report's card

    def directions(self, numbers: Sequence[int]) -> list[Sample]:
        """The directions in which div v is taken for the rows of these numbers, the same at every time.

        Each is (rows, *d); [] is all axes.
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
        """`bits` per number, the mean over the data, and `bits_sd`, its standard error.

        `samples` are the rows' numbers and their log p(x) in nats, (n,) each, in batches. Raises UserError unless each
        row comes once, and all are finite.
        """
        nats = collect(samples, len(self.x)).double()
        d = prod(self.x.shape[1:])
        if not nats.isfinite().all():
            raise NotFiniteError(
                "some likelihoods are not finite numbers: ask for more passes, or train with a lower rate"
            )
        bits = -nats / (d * log(2))
        if self.levels:
            bits = bits + log2(self.levels / 2)
        return {"bits": bits.mean().item(), "bits_sd": bits.std().item() / len(bits) ** 0.5}

    def baselines(self) -> dict[str, Scores]:
        """{}: nobody knows how likely real data are."""
        return {}


def dequantise(x: Sample, levels: int, seed: int) -> Sample:
    """Put noise on samples x (n, *d) of `levels` levels from -1 to 1, each row its own, keyed by the seed.

    Raises UserError where x has other levels.
    """
    k = (x + 1) / 2 * (levels - 1)
    if (k - k.round()).abs().max() > MAX_LEVEL_ERROR:
        raise UserError(
            f"the data have other levels than {levels} from -1 to 1: set evaluate.protocol.levels, for digits 17"
        )
    u = torch.special.ndtr(keyed_normal(seed, "likelihood", "noise", rows=range(len(x)), shape=x.shape[1:]))
    return 2 * (k.round() + u) / levels - 1
