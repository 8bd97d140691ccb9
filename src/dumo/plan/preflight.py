"""Checks of `dumo show SOURCE --check`: du/dt on this machine, the data, the captions and the pretrained network.

`check` is the entry point. It compares the slope with the derivative in float64 (`dumo.run.examination`), counts
captions and the pixels that buckets crop, and hashes all images and latent shards. It evaluates a pretrained network
with its initial weights on random inputs at several times, to check that it agrees with the published model and that
the derivative of its velocity is small enough to be a regression target. Missing or damaged files are findings too.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.collect_env import get_env_info

from dumo.autodiff.dual import accept_duals, pair, primal, tangent
from dumo.config.conditions import Conditions
from dumo.config.spec import Run
from dumo.data import Data, Images, Latents
from dumo.data.cache import read_index
from dumo.data.caption import Templates
from dumo.io.audit import verify
from dumo.io.read import null_nonfinite
from dumo.nets import Net, Pretrained
from dumo.nets.dualized import Dualized
from dumo.run.data import require_images
from dumo.run.examination import Examination, examine
from dumo.run.folder import RunFolder
from dumo.run.net import require_room
from dumo.run.random_net import short_run
from dumo.run.weights import build
from dumo.runtime import version
from dumo.runtime.device import choose_device
from dumo.runtime.random import random_batch
from dumo.types import UserError, lift

# If more than this fraction of the images have no caption, the network learns little from captions.
_MAX_WITHOUT_CAPTION = 0.5
# Times at which a pretrained network is evaluated.
TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
# The largest acceptable relative change of v by the low-pass filter.
_MAX_CHANGE = 0.02
_TRAIN_VELOCITY = "train v first with objective.kind=flow_matching, then set start to that run"
# The cutoff of the low-pass filter in the recipes, in rad.
_LOWPASS = 10.0
# The largest acceptable |t dv/dt| / |v|. Among digits networks it was at most 0.6 if fine-tuning succeeded, and 4.4 in
# one for which it failed.
_MAX_RATE = 3.0


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    state: Literal["ok", "warning", "failing"]
    text: str
    way: str = ""  # the fix for a warning or a failure


@dataclass(frozen=True)
class Check:
    """The results of all checks."""

    environment: dict[str, str]  # software and hardware, from torch.utils.collect_env
    findings: list[Finding]
    examination: Examination | None  # of the slope; None if the slope raised an error

    @property
    def is_ok(self) -> bool:
        """Return whether no check fails."""
        return all(finding.state != "failing" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return all results as plain values, with null for numbers that are not finite."""
        return {
            "ok": self.is_ok,
            "environment": self.environment,
            "findings": [asdict(finding) for finding in self.findings],
            "examination": None if self.examination is None else null_nonfinite(asdict(self.examination)),
        }


def check(run: Run, device: str = "auto", folder: Path | None = None) -> Check:
    """Check a run on this machine. `folder` is the run's folder, if any. Raises UserError for an unknown device."""
    torch_device = choose_device(device)

    def build_net(net: Net) -> nn.Module:
        return build(run.model_copy(update={"net": net}), torch_device)

    # Compare the slope with the derivative. Errors, such as a missing tangent rule, become findings.
    examination = None
    try:
        require_room(short_run(run), torch_device)
        examination = examine(run, torch_device)
    except UserError as error:
        slope = Finding("slope", "failing", "refused", str(error))
    else:
        if examination.passed:
            slope = Finding("slope", "ok", str(examination))
        else:
            slope = Finding("slope", "failing", str(examination), examination.fix)

    findings = [
        slope,
        *weight_findings(run.net, run.data, build_net),
        *data_findings(run.data, folder),
        *caption_findings(run.data),
        *bucket_findings(run.data),
    ]
    return Check(_describe_environment(), findings, examination)


def _describe_environment() -> dict[str, str]:
    """Return the software and hardware that results depend on, as far as torch can determine them."""
    info = get_env_info()
    values: dict[str, str | None] = {
        "dumo": version(),
        "torch": info.torch_version,
        "CUDA of torch": info.cuda_compiled_version,
        "GPUs": info.nvidia_gpu_models,
        "driver": info.nvidia_driver_version,
        "python": info.python_version,
        "system": info.os,
        "packages": info.pip_packages,
    }
    return {name: " ".join(value.split()) for name, value in values.items() if value and value != "N/A"}


def _ok_or_warning(name: str, text: str, way: str) -> Finding:
    """Return a warning if `way` is not empty, otherwise ok."""
    return Finding(name, "warning" if way else "ok", text, way)


def data_findings(data: Data, folder: Path | None) -> list[Finding]:
    """Check whether images or latent shards have changed. Returns [] if there is nothing to compare with.

    Images are compared with those that the run in `folder` read, or with the source of the latent cache.
    """
    try:
        if isinstance(data, Latents):
            index = read_index(data.folder)
            if index is None:
                return [Finding("data", "warning", f"{data.folder} does not exist yet", "dumo encode creates it")]
            verify(data.folder, index.shards)
            data.compare_images(hash_all=True)
            return [Finding("data", "ok", f"{len(index.shards):,} shards and their images are unchanged")]
        if not isinstance(data, Images) or folder is None:
            return []
        last = RunFolder(folder).checkpoints.latest(())
        ledger = data.ledger()
        if last is None or last.facts.ledger is None or ledger is None:
            return []
        require_images(folder, ledger, last)
    except (UserError, OSError) as error:
        return [Finding("data", "failing", "changed or damaged", str(error))]
    return [Finding("data", "ok", f"{len(ledger):,} images are unchanged since the run read them")]


def caption_findings(data: Data) -> list[Finding]:
    """Count captions and images without one. Returns [] without captions, or if they are not counted yet."""
    conditions = Conditions(data)
    if conditions.captions is None or not conditions.are_known:
        return []
    if isinstance(conditions.captions, Templates):
        templates = conditions.captions.templates
        held_out = conditions.captions.held
        text = f"{data.classes:,}, from {data.labels} classes and {len(templates)} templates"
        if held_out:
            text += f"; {len(held_out)} more templates are held out"
        return [Finding("captions", "ok", text)]
    assert isinstance(data, Images | Latents)
    try:
        captions = data.all_captions()
    except UserError as error:
        return [Finding("captions", "failing", "missing, or different from those the run was created with", str(error))]
    num_images = len(captions.ends)
    max_per_image = int(captions.counts.max())
    # The index of images without a caption is the number of captions.
    no_caption = len(captions)
    without_caption = int((captions.first_of(torch.arange(num_images)) == no_caption).sum())
    per_image = f"up to {max_per_image}" if max_per_image > 1 else "one"
    text = f"{len(captions):,} different captions for {num_images:,} images, {per_image} each"
    if without_caption == 1:
        text += "; 1 image has none"
    elif without_caption:
        text += f"; {without_caption:,} images have none"
    way = ""
    if without_caption > _MAX_WITHOUT_CAPTION * num_images:
        way = "write captions for more images, or remove images without captions"
    return [_ok_or_warning("captions", text, way)]


def bucket_findings(data: Data) -> list[Finding]:
    """Describe the pixels that buckets crop. Returns [] without buckets."""
    if not isinstance(data, Images | Latents):
        return []
    try:
        crops = data.crops()
    except UserError as error:
        return [Finding("buckets", "warning", "images are missing", str(error))]
    return [Finding("buckets", "ok", str(crops))] if crops else []


def weight_findings(spec: Net, data: Data, build: Callable[[Net], nn.Module]) -> list[Finding]:
    """Check the dual pass, the low-pass filter and dv/dt of a pretrained network. Returns [] for other networks.

    `build` creates a network from a spec, on the device.
    """
    if not (isinstance(spec, Pretrained) and spec.weights == "source"):
        return []
    try:
        return _pretrained_findings(spec, data, build)
    except UserError as error:
        return [Finding("weights", "failing", "missing, or not differentiable", str(error))]


def _pretrained_findings(spec: Pretrained, data: Data, build: Callable[[Net], nn.Module]) -> list[Finding]:
    """Return the findings of `weight_findings`. Raises UserError if the network cannot be created or differentiated."""
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
    findings = [Finding("pipeline", "ok", pipeline.class_name or "a transformer without a pipeline")]
    accept_duals()
    with torch.no_grad():
        v = net(x, c, t=t, **other_times)[head]
        # The derivative along v itself.
        dual = net(pair(x, v), c, t=pair(t, torch.ones_like(t)), **other_times)[head]
        dv_dt = tangent(dual)
        assert isinstance(dv_dt, Tensor)
        if torch.equal(primal(dual), v):
            findings.append(Finding("dual pass", "ok", "bit-identical to the plain pass"))
        else:
            findings.append(Finding("dual pass", "failing", "differs from the plain pass", "objective.slope.kind=jvp"))
        if net.lowpass_fits:
            # Without the low-pass filter, use this model with its adapters disabled, or build the model again.
            if spec.lora:
                original_model = net.base()
            else:
                original_model = nullcontext(build(spec.model_copy(update={"lowpass": None})).eval())
            with original_model as original:
                original_v = original(x, c, t=t, **other_times)[head]
            change = float((v - original_v).norm() / v.norm())
            fits = "; ".join(map(str, net.lowpass_fits))
            way = _TRAIN_VELOCITY if change > _MAX_CHANGE else ""
            findings.append(_ok_or_warning("low-pass", f"{fits}; |dv| / |v| = {100 * change:.2g} %", way))
    findings.append(rate_finding(t, v, dv_dt, spec.lowpass))
    return findings


def velocity_index(heads: Sequence[str]) -> int:
    """Return the index of head v, or 0 without v, in which case u at r = t is the velocity."""
    return heads.index("v") if "v" in heads else 0


def rate_finding(t: Tensor, v: Tensor, dv_dt: Tensor, lowpass: float | None) -> Finding:
    """Check |t dv/dt| / |v| for velocities v (n, *d) at the times t (n,) of TIMES.

    `lowpass` is the network's `net.lowpass` in rad; if the ratio is too large, the fix is a lower cutoff.
    """
    change_norms = (lift(t, v) * dv_dt).flatten(1).norm(dim=1)
    rates: list[float] = (change_norms / v.flatten(1).norm(dim=1)).tolist()
    text = ", ".join(f"{rate:.2g} at {time:g}" for time, rate in zip(TIMES, rates, strict=True))
    way = ""
    if max(rates) > _MAX_RATE:
        lower = _LOWPASS if lowpass is None or lowpass > _LOWPASS else lowpass / 2
        way = f"net.lowpass={lower:g}, or less: u may diverge if v changes this quickly"
    return _ok_or_warning("|t dv/dt| / |v|", text, way)
