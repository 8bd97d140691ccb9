"""How well an encoder tells captions apart: asked before a model that makes images in one pass is trained on them.

A pass that is the only one cannot repair what the text left open, and one-pass models learned from encoders that
separate captions, and failed on weaker ones (EMF, arXiv 2604.18168). So captions are compared by their embeddings,
pooled ones or else the mean of the tokens, in Euclidean distance:

    accuracy    where images or classes have several captions: how often the nearest other caption is of the same one
    gap         the distance to the nearest other caption over the mean distance, the median of all
    twins       captions whose embedding is another's too: the net cannot tell them apart
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dumo.data import Images, Latents
from dumo.data.caption import Templates
from dumo.encoders.texttable import Table
from dumo.nets.table import TextTable
from dumo.nets.text import Drawn, or_drawn
from dumo.run.config.spec import Run
from dumo.run.plan.machine import Finding
from dumo.runtime.random import stream
from dumo.types import UserError

MOST = 4096  # captions that are compared, drawn by key: ours
SAME = 1e-4  # of the mean distance: nearer ones are twins. Ours, above the rounding of half precision
LOW = 0.5  # accuracy: every second caption is nearest to one of another image. Ours
NARROW = 0.05  # gap: nearest captions differ by a twentieth of what any two differ by. Ours


@dataclass(frozen=True)
class Separability:
    """How captions lie among one another."""

    captions: int
    gap: float
    twins: int
    accuracy: float | None  # None: nothing has several captions
    chance: float | None  # the accuracy of embeddings that say nothing

    @property
    def low(self) -> bool:
        """Whether a one-pass model is in doubt."""
        return self.twins > 0 or (self.gap < NARROW if self.accuracy is None else self.accuracy < LOW)

    def __str__(self) -> str:
        """What was measured, in a line."""
        told = f"{self.captions:,} captions, the nearest other at {self.gap:.2g} of the mean distance"
        if self.accuracy is not None:
            told += f", of the same class or image for {self.accuracy:.0%} (by chance {self.chance:.1%})"
        return told + (f"; {self.twins:,} have the embedding of another" if self.twins else "")


def measure(x: Float[Tensor, "n d"], group: Int64[Tensor, " n"] | None = None) -> Separability:
    """Of embeddings, and the image or class that each caption is of; at least 2."""
    far = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    mean = far.sum() / (len(x) * (len(x) - 1))
    near, other = far.fill_diagonal_(torch.inf).min(1)
    gap, twins = float(near.median() / mean), int((near <= SAME * mean).sum())
    if group is None:
        return Separability(len(x), gap, twins, None, None)
    counts = group.bincount()[group] - 1
    asked = counts > 0  # of which there is another caption at all
    if not bool(asked.any()):
        return Separability(len(x), gap, twins, None, None)
    accuracy, chance = (group[other] == group)[asked].double().mean(), counts[asked].double().mean() / (len(x) - 1)
    return Separability(len(x), gap, twins, float(accuracy), float(chance))


def findings(run: Run) -> list[Finding]:
    """Of a run whose net reads a table that an encoder made; of others nothing."""
    texts: object = getattr(run.net, "texts", None)
    if not isinstance(texts, TextTable):
        return []
    if isinstance(or_drawn(texts), Drawn):
        return [Finding("texts", "warning", "not encoded yet", "dumo encode RECIPE makes the table that the net reads")]
    try:
        found = measured(texts.table(run.data.classes), run)
    except UserError as error:
        return [Finding("texts", "failing", "not there, or not those of this run", str(error))]
    if found is None:
        return []
    way = (
        "take an encoder that tells these captions apart, such as a larger one, or one of language" if found.low else ""
    )
    return [Finding("texts", "warning" if way else "ok", str(found), way)]


def measured(table: Table, run: Run) -> Separability | None:
    """Some of the captions of a table, drawn by key; None where there are fewer than two."""
    n = run.data.classes
    some = torch.randperm(n, generator=stream(run.train.seed, "separability"))[:MOST].sort().values
    if len(some) < 2:
        return None
    return measure(embedded(table, some.tolist()), groups(run)[some])


def embedded(table: Table, rows: Sequence[int]) -> Float[Tensor, "n d"]:
    """The pooled embedding of these rows, or the mean of their tokens."""
    found: list[Tensor] = []
    for i in range(0, len(rows), 64):
        tokens, mask, pooled = table.padded(rows[i : i + 64])
        there = mask[..., None]
        mean = (tokens.double() * there).sum(1) / there.sum(1)
        found.append(mean if pooled is None else pooled.double())
    return torch.cat(found).float()


def groups(run: Run) -> Int64[Tensor, " n"]:
    """The class, or the first image, that each caption is of."""
    n = run.data.classes
    if isinstance(run.conditions.captions, Templates):
        seen, held = len(run.conditions.captions.templates), len(run.conditions.captions.held)
        labels = torch.arange(run.data.labels)
        return torch.cat([labels.repeat_interleave(seen), labels.repeat_interleave(held)])
    assert isinstance(run.data, Images | Latents)
    told = run.data.all_captions()
    images = torch.repeat_interleave(torch.arange(len(told.ends)), told.counts)
    first = torch.full((n + 1,), len(told.ends)).scatter_reduce(0, told.ids, images, "amin")
    return first[:n]
