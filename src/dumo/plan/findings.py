"""What `dumo doctor` finds of captions, of the table of texts that a net reads, and of a pretrained net.

`caption_findings`, `bucket_findings`, `text_findings` and `weight_findings` each return lines, `Finding`s, or [] where
a run has nothing of the kind. They raise nothing: what is missing or damaged is a line.

A model of one pass has no later pass in which to resolve what a text leaves open. Such models learned from encoders
that separate captions, and failed on weaker ones (EMF, arXiv 2604.18168). So captions are compared by the Euclidean
distance of their embeddings, which are pooled ones or else the mean of the tokens (`measure_separability`):

    accuracy    where images or classes have several captions: how often the nearest other caption is of the same one
    gap         the distance to the nearest other caption over the mean distance, the median of all
    twins       captions with the embedding of another, and its tokens' mean: the net cannot tell them apart

A pretrained net is called with the weights that training starts from, at several times, on random numbers in place of
images: does it compute what the published model does, and can the derivative of its velocity be regressed on?
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dumo.autodiff.dual import pair, primal, tangent, teach_others
from dumo.config.conditions import Conditions
from dumo.data import Data, Images, Latents
from dumo.data.caption import Templates
from dumo.encoders.texttable import EncodedTexts
from dumo.nets import Net, Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.table import EmbeddedTexts, PipelineTexts
from dumo.nets.text import DrawnTexts, drawn_if_missing
from dumo.plan.machine import Finding, ok_or_warning
from dumo.runtime.random import random_batch, stream
from dumo.types import UserError, lift

_MAX_WITHOUT_CAPTION = 0.5  # share of the images: where more have none, a net learns little of words. Ours
MAX_COMPARED = 4096  # captions that are compared, drawn by key: ours
_ROWS_AT_A_TIME = 64  # of a table of texts: ours
_TWIN_DISTANCE = 1e-4  # of the mean distance: nearer ones are twins. Ours, above the rounding of half precision
MIN_ACCURACY = 0.5  # below it every second caption is nearest to one of another image: ours
_MIN_GAP = 0.05  # below it nearest captions differ by a twentieth of what any two differ by: ours
TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)  # at which a pretrained net is called: ours
_MAX_CHANGE = 0.02  # of v, relative to it: a low-pass that moves it more has cut what the model uses. Ours
_TEACH_AGAIN = (
    "teach it v again, first by objective.kind=flow_matching, then from that run by start; net.lowpass=30 keeps more "
    "waves, but such a net was too quick for DuMo on digits"
)
_LOWPASS = 10.0  # rad, of the recipes' nets
# Ours, of |t dv/dt| / |v|: in nets of digits that could be tuned it was at most 0.6, in one that could not 4.4.
_MAX_RATE = 3.0


def caption_findings(data: Data) -> list[Finding]:
    """How many captions there are, and how many images have none; [] of data without captions, or not counted yet."""
    conditions = Conditions(data)
    if conditions.captions is None or not conditions.are_known:
        return []
    if isinstance(conditions.captions, Templates):
        templates = conditions.captions.templates
        held_out = conditions.captions.held
        text = f"{data.classes:,}, of {data.labels} classes by {len(templates)} templates"
        if held_out:
            text += f", and {len(held_out)} that are held out of training"
        return [Finding("captions", "ok", text)]
    assert isinstance(data, Images | Latents)
    try:
        captions = data.all_captions()
    except UserError as error:
        return [Finding("captions", "failing", "not there, or others than the run was made with", str(error))]
    num_images = len(captions.ends)
    max_per_image = int(captions.counts.max())
    no_caption = len(captions)  # the number that stands for none
    without_caption = int((captions.first_of(torch.arange(num_images)) == no_caption).sum())
    per_image = f"up to {max_per_image}" if max_per_image > 1 else "one"
    text = f"{len(captions):,} different ones of {num_images:,} images, {per_image} each"
    if without_caption == 1:
        text += "; 1 image has none"
    elif without_caption:
        text += f"; {without_caption:,} images have none"
    way = ""
    if without_caption > _MAX_WITHOUT_CAPTION * num_images:
        way = "write captions of more images, or leave out those without"
    return [ok_or_warning("captions", text, way)]


def bucket_findings(data: Data) -> list[Finding]:
    """What buckets cut off the images; [] of data without buckets."""
    if not isinstance(data, Images | Latents):
        return []
    try:
        crops = data.crops()
    except UserError as error:
        return [Finding("buckets", "warning", "the images are not there", str(error))]
    return [Finding("buckets", "ok", str(crops))] if crops else []


def text_findings(net: Net, data: Data, seed: int) -> list[Finding]:
    """How well a table of texts separates captions; [] of nets that read no texts."""
    texts = net.texts
    if not isinstance(texts, EmbeddedTexts):
        return []
    if texts.is_online(data.classes):
        return [Finding("texts", "ok", "encoded in training, without a table")]
    if isinstance(drawn_if_missing(texts), DrawnTexts):
        return [Finding("texts", "warning", "not encoded yet", "dumo encode RECIPE, and the same overrides")]
    try:
        table = texts.open_table(data.classes)
        separability = _measure_table(table, data, seed)
    except UserError as error:
        return [Finding("texts", "failing", "not there, or not those of this run", str(error))]
    if separability is None:
        return []
    way = ""
    if separability.is_low and isinstance(texts, PipelineTexts):  # whose encoders are those of the pipeline
        way = "write captions that say more of how the images differ"
    elif separability.is_low:
        way = "take an encoder that tells these captions apart, such as a larger one, or one of language"
    return [ok_or_warning("texts", str(separability), way)]


@dataclass(frozen=True)
class Separability:
    """How well the embeddings of captions can be separated, as this file's header defines it."""

    captions: int  # that were compared
    gap: float
    twins: int
    accuracy: float | None  # None: no image or class has several captions
    chance: float | None  # the accuracy of embeddings that say nothing; None: as for `accuracy`

    @property
    def is_low(self) -> bool:
        """Whether captions are so alike that a one-pass model may fail."""
        if self.twins > 0:
            return True
        if self.accuracy is None:
            return self.gap < _MIN_GAP
        return self.accuracy < MIN_ACCURACY

    def __str__(self) -> str:
        """The measures, in a line."""
        text = f"{self.captions:,} captions, the nearest other at {self.gap:.2g} of the mean distance"
        if self.accuracy is not None:
            text += f", of the same class or image for {self.accuracy:.0%} (by chance {self.chance:.1%})"
        if self.twins:
            text += f"; {self.twins:,} have the embedding of another"
        return text


def measure_separability(
    x: Float[Tensor, "n d"],
    group: Int64[Tensor, " n"] | None = None,
    token_means: Float[Tensor, "n e"] | None = None,
) -> Separability:
    """The separability of n >= 2 embeddings x.

    group: the image or class of each caption; None: not known.
    token_means: of the tokens that the net reads next to pooled embeddings x. They may be of another encoder, which
        reads on where that of x has cut a caption off.
    """
    distances = _relative_distances(x)
    nearest, neighbour = distances.min(1)
    gap = float(nearest.median())
    are_twins = distances <= _TWIN_DISTANCE
    if token_means is not None:
        are_twins &= _relative_distances(token_means) <= _TWIN_DISTANCE
    twins = int(are_twins.any(1).sum())
    if group is None:
        return Separability(len(x), gap, twins, None, None)
    siblings = group.bincount()[group] - 1  # other captions of the same image or class
    has_siblings = siblings > 0
    if not bool(has_siblings.any()):
        return Separability(len(x), gap, twins, None, None)
    accuracy = (group[neighbour] == group)[has_siblings].double().mean()
    chance = siblings[has_siblings].double().mean() / (len(x) - 1)
    return Separability(len(x), gap, twins, float(accuracy), float(chance))


def _relative_distances(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """The distances of embeddings over their mean, inf of each to itself; where all embeddings are equal, 0."""
    distances = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (len(x) * (len(x) - 1))
    if mean > 0:
        distances /= mean
    return distances.fill_diagonal_(torch.inf)


def _measure_table(table: EncodedTexts, data: Data, seed: int) -> Separability | None:
    """The separability of up to MAX_COMPARED captions of a table, drawn by key; None of fewer than two."""
    order = torch.randperm(data.classes, generator=stream(seed, "separability"))
    rows = order[:MAX_COMPARED].sort().values
    if len(rows) < 2:
        return None
    pooled, token_means = _embeddings(table, rows.tolist())
    group = _groups(data)[rows]
    if pooled is None:
        return measure_separability(token_means, group)
    return measure_separability(pooled, group, token_means)


def _embeddings(table: EncodedTexts, rows: Sequence[int]) -> tuple[Float[Tensor, "n d"] | None, Float[Tensor, "n e"]]:
    """The pooled embeddings of these rows of a table, None where it has none, and the means of their tokens."""
    all_pooled: list[Tensor] = []
    token_means: list[Tensor] = []
    for i in range(0, len(rows), _ROWS_AT_A_TIME):
        tokens, mask, pooled = table.read_rows(rows[i : i + _ROWS_AT_A_TIME])
        is_token = mask[..., None]
        token_means.append((tokens.double() * is_token).sum(1) / is_token.sum(1))
        if pooled is not None:
            all_pooled.append(pooled.double())
    return torch.cat(all_pooled).float() if all_pooled else None, torch.cat(token_means).float()


def _groups(data: Data) -> Int64[Tensor, " n"]:
    """The class, or the first image, of each caption, (n,)."""
    captions = Conditions(data).captions
    if isinstance(captions, Templates):
        labels = torch.arange(data.labels)
        trained = labels.repeat_interleave(len(captions.templates))
        held_out = labels.repeat_interleave(len(captions.held))
        return torch.cat([trained, held_out])
    assert isinstance(data, Images | Latents)
    n = data.classes
    annotations = data.all_captions()
    num_images = len(annotations.ends)
    images = torch.repeat_interleave(torch.arange(num_images), annotations.counts)
    first_image = torch.full((n + 1,), num_images).scatter_reduce(0, annotations.ids, images, "amin")
    return first_image[:n]  # without the last, which stands for no caption


def weight_findings(spec: Net, data: Data, build: Callable[[Net], nn.Module]) -> list[Finding]:
    """A pretrained net's low-pass, its dual pass, and how quickly its velocity changes; [] of other nets.

    `build` makes a net of a spec, on the device where it is examined.
    """
    if not (isinstance(spec, Pretrained) and spec.weights == "source"):
        return []
    try:
        return _pretrained_findings(spec, data, build)
    except UserError as error:
        return [Finding("weights", "failing", "not there, or not to be differentiated", str(error))]


def _pretrained_findings(spec: Pretrained, data: Data, build: Callable[[Net], nn.Module]) -> list[Finding]:
    """The findings of `weight_findings`. Raises UserError where the net cannot be made or differentiated."""
    net = build(spec).eval()
    assert isinstance(net, Dualized)
    net.refit()
    device = next(net.parameters()).device
    x, c = random_batch("pretrained", len(TIMES), data.shape, data.classes)
    x = x.to(device)
    c = c.to(device)
    t = torch.tensor(TIMES, device=device)
    other_times = dict.fromkeys(net.time_names[1:], t)
    head = velocity_index(list(net.heads))
    pipeline = spec.pipeline
    findings = [
        Finding("pipeline", "ok", f"{pipeline.class_name or 'a transformer alone'}, {pipeline.distillation_text}")
    ]
    teach_others()
    with torch.no_grad():
        v = net(x, c, t=t, **other_times)[head]
        dual = net(pair(x, v), c, t=pair(t, torch.ones_like(t)), **other_times)[head]  # along v itself
        dv_dt = tangent(dual)
        assert isinstance(dv_dt, Tensor)
        if torch.equal(primal(dual), v):
            findings.append(Finding("dual pass", "ok", "has the bits of the plain one"))
        else:
            findings.append(Finding("dual pass", "failing", "is not the plain one", "objective.slope.kind=jvp"))
        if net.lowpass_fits:
            # the model before the low-pass: this one with its adapters off, or built again
            if spec.lora:
                original_model = net.base()
            else:
                original_model = nullcontext(build(spec.model_copy(update={"lowpass": None})).eval())
            with original_model as original:
                original_v = original(x, c, t=t, **other_times)[head]
            change = float((v - original_v).norm() / v.norm())
            fits = "; ".join(map(str, net.lowpass_fits))
            way = _TEACH_AGAIN if change > _MAX_CHANGE else ""
            findings.append(ok_or_warning("low-pass", f"{fits}; |dv| / |v| = {100 * change:.2g} %", way))
    findings.append(rate_finding(t, v, dv_dt, spec.lowpass))
    return findings


def velocity_index(heads: Sequence[str]) -> int:
    """The index, among the names of a net's heads, of the one that is its velocity: v, or the first without a v.

    A few-step net lists its jump u first, or has no other head: then u at r = t is the velocity.
    """
    return heads.index("v") if "v" in heads else 0


def rate_finding(t: Tensor, v: Tensor, dv_dt: Tensor, lowpass: float | None) -> Finding:
    """How quickly the velocity v (n, *d) changes at the times t (n,) of TIMES, relative to its length.

    `lowpass` is the net's (`net.lowpass`, in rad): what to do where v is too quick is to set a lower one.
    """
    change_norms = (lift(t, v) * dv_dt).flatten(1).norm(dim=1)
    rates: list[float] = (change_norms / v.flatten(1).norm(dim=1)).tolist()
    text = ", ".join(f"{rate:.2g} at {time:g}" for time, rate in zip(TIMES, rates, strict=True))
    way = ""
    if max(rates) > _MAX_RATE:
        lower = _LOWPASS if lowpass is None or lowpass > _LOWPASS else lowpass / 2
        way = f"net.lowpass={lower:g}, or less: u may diverge where v changes so quickly"
    return ok_or_warning("|t dv/dt| / |v|", text, way)
