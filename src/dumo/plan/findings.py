"""What doctor says of captions, of the table of texts that a net reads, and of a pretrained net, before training.

A pass that is the only one cannot repair what the text left open, and one-pass models learned from encoders that
separate captions, and failed on weaker ones (EMF, arXiv 2604.18168). So captions are compared by their embeddings,
pooled ones or else the mean of the tokens, in Euclidean distance:

    accuracy    where images or classes have several captions: how often the nearest other caption is of the same one
    gap         the distance to the nearest other caption over the mean distance, the median of all
    twins       captions with the embedding of another: the net cannot tell them apart

A pretrained net is asked, with the weights of its source, at several times, on random numbers instead of images: is it
what it was, and can its derivative be regressed on.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dumo.autodiff.dual import pair, primal, tangent
from dumo.config.conditions import Conditions
from dumo.data import Data, Images, Latents
from dumo.data.caption import Templates
from dumo.encoders.texttable import EncodedTexts
from dumo.nets import Net, Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.table import Embedded
from dumo.nets.text import Drawn, or_drawn
from dumo.plan.machine import Finding, judged
from dumo.runtime.random import random_batch, stream
from dumo.types import UserError, lift

LACK = 0.5  # of the images: with more that have no caption a net learns little of words. Ours
MOST = 4096  # captions that are compared, drawn by key: ours
SAME = 1e-4  # of the mean distance: nearer ones are twins. Ours, above the rounding of half precision
LOW = 0.5  # accuracy: every second caption is nearest to one of another image. Ours
NARROW = 0.05  # gap: nearest captions differ by a twentieth of what any two differ by. Ours
TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
CHANGE = 0.02  # ours: a low-pass that moves v by more has cut what the model uses
AGAIN = (
    "teach it v again, first by objective.kind=flow_matching, then from that run by start; net.lowpass=30 keeps more "
    "waves, but such a net was too quick for DuMo on digits"
)
ROUGH = 3.0  # ours: |t dv/dt| / |v| of digits nets that could be tuned was at most 0.6, of one that could not, 4.4


def of_captions(data: Data) -> list[Finding]:
    """How many captions there are, and how many images have none; nothing of data without, or not counted yet."""
    there = Conditions(data)
    if there.captions is None or not there.known:
        return []
    if isinstance(there.captions, Templates):
        seen, held = there.captions.templates, there.captions.held
        out = f", and {len(held)} that are held out of training" if held else ""
        return [Finding("captions", "ok", f"{data.classes:,}, of {data.labels} classes by {len(seen)} templates{out}")]
    assert isinstance(data, Images | Latents)
    try:
        written = data.all_captions()
    except UserError as error:
        return [Finding("captions", "failing", "not there, or others than the run was made with", str(error))]
    images, most = len(written.ends), int(written.counts.max())
    lacking = int((written.first(torch.arange(images)) == len(written)).sum())
    text = f"{len(written):,} of {images:,} images, {f'up to {most}' if most > 1 else 'one'} each"
    text += f"; {lacking:,} {'image has' if lacking == 1 else 'images have'} none" if lacking else ""
    way = "write captions of more images, or leave out those without" if lacking > LACK * images else ""
    return [judged("captions", text, way)]


def of_buckets(data: Data) -> list[Finding]:
    """What buckets cut off the images; nothing of data without them."""
    if not isinstance(data, Images | Latents):
        return []
    try:
        found = data.crops()
    except UserError as error:
        return [Finding("buckets", "warning", "the images are not there", str(error))]
    return [Finding("buckets", "ok", str(found))] if found else []


def of_texts(net: Net, data: Data, seed: int) -> list[Finding]:
    """How well a table of texts separates captions; nothing of nets that read none."""
    texts = net.texts
    if not isinstance(texts, Embedded):
        return []
    if texts.is_online(data.classes):
        return [Finding("texts", "ok", "encoded in training, without a table")]
    if isinstance(or_drawn(texts), Drawn):
        return [Finding("texts", "warning", "not encoded yet", "dumo encode RECIPE makes the table that the net reads")]
    try:
        found = measured(texts.table(data.classes), data, seed)
    except UserError as error:
        return [Finding("texts", "failing", "not there, or not those of this run", str(error))]
    way = "take an encoder that tells these captions apart, such as a larger one, or one of language"
    return [judged("texts", str(found), way if found.low else "")] if found else []


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
        text = f"{self.captions:,} captions, the nearest other at {self.gap:.2g} of the mean distance"
        if self.accuracy is not None:
            text += f", of the same class or image for {self.accuracy:.0%} (by chance {self.chance:.1%})"
        return text + (f"; {self.twins:,} have the embedding of another" if self.twins else "")


def measure(x: Float[Tensor, "n d"], group: Int64[Tensor, " n"] | None = None) -> Separability:
    """Of embeddings, and the image or class that each caption is of; at least 2."""
    far = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    mean = far.sum() / (len(x) * (len(x) - 1))
    near, other = far.fill_diagonal_(torch.inf).min(1)
    gap, twins = float(near.median() / mean), int((near <= SAME * mean).sum())
    if group is None:
        return Separability(len(x), gap, twins, None, None)
    counts = group.bincount()[group] - 1
    several = counts > 0  # of which there is another caption at all
    if not bool(several.any()):
        return Separability(len(x), gap, twins, None, None)
    accuracy, chance = (group[other] == group)[several].double().mean(), counts[several].double().mean() / (len(x) - 1)
    return Separability(len(x), gap, twins, float(accuracy), float(chance))


def measured(table: EncodedTexts, data: Data, seed: int) -> Separability | None:
    """Some of the captions of a table, drawn by key; None where there are fewer than two."""
    some = torch.randperm(data.classes, generator=stream(seed, "separability"))[:MOST].sort().values
    return measure(embedded(table, some.tolist()), groups(data)[some]) if len(some) >= 2 else None


def embedded(table: EncodedTexts, rows: Sequence[int]) -> Float[Tensor, "n d"]:
    """The pooled embedding of these rows, or the mean of their tokens."""
    found: list[Tensor] = []
    for i in range(0, len(rows), 64):
        tokens, mask, pooled = table.padded(rows[i : i + 64])
        there = mask[..., None]
        mean = (tokens.double() * there).sum(1) / there.sum(1)
        found.append(mean if pooled is None else pooled.double())
    return torch.cat(found).float()


def groups(data: Data) -> Int64[Tensor, " n"]:
    """The class, or the first image, that each caption is of."""
    n, captions = data.classes, Conditions(data).captions
    if isinstance(captions, Templates):
        labels = torch.arange(data.labels)
        return torch.cat([labels.repeat_interleave(len(of)) for of in (captions.templates, captions.held)])
    assert isinstance(data, Images | Latents)
    written = data.all_captions()
    images = torch.repeat_interleave(torch.arange(len(written.ends)), written.counts)
    first = torch.full((n + 1,), len(written.ends)).scatter_reduce(0, written.ids, images, "amin")
    return first[:n]


def of_weights(spec: Net, data: Data, build: Callable[[Net], nn.Module]) -> list[Finding]:
    """The low-pass of a pretrained net, its dual pass, and how quickly v changes; nothing of nets without weights yet.

    `build` makes a net, on the device where it is examined.
    """
    if not (isinstance(spec, Pretrained) and spec.weights == "source"):
        return []
    try:
        return pretrained(spec, data, build)
    except UserError as error:
        return [Finding("weights", "failing", "not there, or not to be differentiated", str(error))]


def pretrained(spec: Pretrained, data: Data, build: Callable[[Net], nn.Module]) -> list[Finding]:
    """As `of_weights`. Raises UserError as the net's `build`."""
    net = build(spec).eval()
    assert isinstance(net, Dualized)
    net.refit()
    here = next(net.parameters()).device
    x, c = (part.to(here) for part in random_batch("pretrained", len(TIMES), data.shape, data.classes))
    t = torch.tensor(TIMES, device=here)
    with torch.no_grad():
        rest = dict.fromkeys(net.names[1:], t)
        v = net(x, c, t=t, **rest)[0]
        dual = net(pair(x, v), c, t=pair(t, torch.ones_like(t)), **rest)[0]  # along v itself
        rate, same = tangent(dual), torch.equal(primal(dual), v)
        assert isinstance(rate, Tensor)
        found = [Finding("dual pass", "ok", "has the bits of the plain one")]
        if not same:
            found = [Finding("dual pass", "failing", "is not the plain one", "objective.slope.kind=jvp")]
        if net.fits:
            # the model that it was: the same with its adapters off, or built again
            again = None if spec.lora else build(spec.model_copy(update={"lowpass": None})).eval()
            with net.base() if again is None else nullcontext(again) as before:
                change = float((v - before(x, c, t=t, **rest)[0]).norm() / v.norm())
            text = "; ".join(map(str, net.fits)) + f"; |dv| / |v| = {100 * change:.2g} %"
            found.append(judged("low-pass", text, AGAIN if change > CHANGE else ""))
    ratios = [float(r) for r in (lift(t, v) * rate).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)]
    text = ", ".join(f"{r:.2g} at {s:g}" for s, r in zip(TIMES, ratios, strict=True))
    way = "net.lowpass=10, or less: u may diverge where v changes so quickly" if max(ratios) > ROUGH else ""
    of = spec.pipeline
    whose = Finding("pipeline", "ok", f"{of.class_name or 'a transformer alone'}, {of.hint}")
    return [whose, *found, judged("|t dv/dt| / |v|", text, way)]
