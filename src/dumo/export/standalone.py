"""A run of dumo's own DiT or U-Net as a folder that stock diffusers runs, with its code next to the weights.

pipeline.py        the passes, by the run's solver
net/               dumo_dit.py or dumo_unet.py, its config and weights: every head, of the weights that are shown
text_encoder/ ...  what reads prompts, and tokenizer/, if the net reads texts (`dumo.export.textencoder`)
vae/               the decoder, if the net makes latents: a class of diffusers, or dumo_taef2.py with taef2's licence
model_index.json   which parts there are, and how the run samples
README.md          the model card

The code lies in `shipped`, which is no package of dumo: it is copied as it is. diffusers copies such files into one
flat folder, and of what they import from each other the first level alone, so each stands by itself. That it computes
what dumo does is not taken on trust: before anything is written both make the same samples.

Where magnitudes are preserved, rows of weights have length 1 in each pass of dumo's net. They are written so: dividing
once gives the same numbers, to the bit, and the shipped layers are plain ones.

`write` is the entrance: it refuses runs that the shipped code does not know, compares, and writes.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dumo.data import Latents
from dumo.encoders import PipelineVae, Taef2
from dumo.encoders.autoencoder import KINDS
from dumo.export import card, textencoder
from dumo.export.model import Head
from dumo.export.scheduler import SHIPPED
from dumo.export.textencoder import ShippedTextEncoder
from dumo.flow.solver import Euler, Hermite, Hop, Restart, can_make
from dumo.io import trained
from dumo.io.read import write_json
from dumo.nets import UNet
from dumo.nets.dit import DiT
from dumo.nets.magnitude import UnitRowLinear
from dumo.run.sampler import Sampler
from dumo.runtime import version
from dumo.runtime.random import noise, random_batch
from dumo.types import UserError

_VAE = "dumo_taef2"  # of shipped/dumo_taef2.py
_TAEF2_LICENSE = trained.folder("cifar10-trained") / "LICENSE.taef2"  # MIT: a copy of the weights must have it
_KNOWN_TIMES = ("t", "r")  # the times that the shipped nets embed
_COMPARED_PASSES = (1, 2, 3)  # in which dumo and the shipped code make samples that must be equal: ours
# parts of the names of weights, in dumo's net and in the shipped one
_SHIPPED_NAMES = {"own.heads.": "own.", ".keys.kv.": ".kv.", ".keys.k_norm.": ".key_norm."}
Json = dict[str, Any]
ShippedSolver = Restart | Hop | Hermite | Euler


def write(
    sampler: Sampler,
    spec: DiT | UNet,
    provenance: card.Provenance,
    out: Path,
    name: str,
    *,
    head: Head,
    parts: str,
    dtype: str,
) -> None:
    """Write the net and its code into the empty folder `out`, which will be called `name`.

    `parts`: whether a published text encoder is copied, linked to or left out ("none").

    Raises UserError for an option of the net or a guidance that the shipped code does not know, and where it makes
    other samples than dumo.
    """
    _require_known_run(sampler, spec)
    solver = _shipped_solver(sampler, head)
    settings = _pipeline_settings(sampler, solver)
    net = _shipped_net(sampler, spec)
    encoder = textencoder.text_encoder_of(sampler, spec.texts)
    _require_same_samples(sampler, net, solver, encoder)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    nn.Module.to(net, torch_dtype)  # diffusers' own would warn that no layer stays in float32
    net.save_pretrained(out / "net")
    module = type(net).__module__.rpartition(".")[2]  # not `dit`, for diffusers has a pipeline of this name
    shutil.copy(SHIPPED / f"{module}.py", out / "net")
    shutil.copy(SHIPPED / "pipeline.py", out)
    index: Json = {"_class_name": ["pipeline", "DumoPipeline"], "_dumo_version": version()}
    index["net"] = [module, type(net).__name__]
    if encoder is not None:
        index |= textencoder.write(encoder, out, parts=parts, dtype=torch_dtype)
        settings |= encoder.settings
    index["vae"] = _write_decoder(sampler, out / "vae")
    write_json(out / "model_index.json", index | settings)
    has_encoder = textencoder.TEXT_ENCODER in index
    readme = card.own_card(sampler, provenance, spec.kind, name, solver, encoder, has_encoder=has_encoder)
    (out / "README.md").write_text(readme, encoding="utf-8")


def _require_known_run(sampler: Sampler, spec: DiT | UNet) -> None:
    """Raise UserError for a run that the shipped code does not know."""
    fix = "which the exported code does not know: sample it by dumo sample"
    needs = sampler.flow.objective.needs
    guide = sampler.spec.guide
    known_preconditions = ("none", "edm") if isinstance(spec, DiT) else ("none",)
    if spec.precondition not in known_preconditions:
        raise UserError(f"net.precondition is {spec.precondition}, {fix}")
    for name in needs.names:
        if name not in _KNOWN_TIMES:
            raise UserError(f"its net takes {name}, {fix}")
    if guide.active:
        raise UserError(f"sample.guide.scale is {guide.scale:g}, {fix}")
    data = sampler.data
    if isinstance(data, Latents) and isinstance(data.codec, PipelineVae):
        vae_kind = KINDS[data.codec.class_name]
        if vae_kind.takes_videos or vae_kind.has_patch_norm:
            raise UserError(f"data.codec is an {data.codec.class_name}, {fix}")


def _shipped_solver(sampler: Sampler, head: Head) -> ShippedSolver:
    """The solver of the shipped pipeline: the run's own, or for a head that it does not read the default."""
    if head == "v":
        return Euler()
    solver = sampler.spec.solver
    return solver if isinstance(solver, Restart | Hop | Hermite) else Restart()


def _shipped_net(sampler: Sampler, spec: DiT | UNet) -> Any:  # noqa: ANN401, a model of diffusers
    """The shipped net with the run's weights."""
    from dumo.export.shipped.dumo_dit import DumoDiT
    from dumo.export.shipped.dumo_unet import DumoUNet

    data = sampler.data
    channels, side, _ = data.shape
    state = _shipped_weights(sampler.net)
    needs = sampler.flow.objective.needs
    arguments: Json = {
        "channels": channels,
        "side": side,
        "classes": 0 if spec.texts else data.classes,
        "time_names": [time for time in _KNOWN_TIMES if f"times.embedders.{time}.0.weight" in state],
        "head_names": [*needs.heads],
        "own_time_names": {head: ["t", *names] for head, names in needs.own.items()},
    }
    if isinstance(spec, DiT):
        fields = {"patch", "width", "depth", "attention", "time_scale", "precondition", "magnitude", "late"}
        fields |= {"modern", "qk_norm"}
        arguments |= {field: getattr(spec, field) for field in fields}
        texts = sampler.texts
        if texts is not None:
            arguments |= {"text_width": texts.width, "pooled_width": texts.pooled_width}
        shipped = DumoDiT(**arguments)
    else:
        fields = {"width", "multipliers", "depth", "attend", "time_scale"}
        shipped = DumoUNet(**arguments, **{field: getattr(spec, field) for field in fields})
    shipped.load_state_dict(state)
    return shipped.eval()


def _shipped_weights(net: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of dumo's net under the names of the shipped one, without those that no sample depends on."""
    weights = {name: buffer for name, buffer in net.named_buffers() if name in ("cos", "sin")}  # of rotary positions
    weights |= net.state_dict()
    for path, layer in net.named_modules():
        if isinstance(layer, UnitRowLinear):
            weights[f"{path}.weight"] = F.normalize(layer.weight.detach(), dim=1)
    shipped: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if name.startswith(("gauges.", "augment.", "text.texts.")):
            continue
        shipped_name = name.replace("scalars.", "times.", 1) if name.startswith("scalars.") else name
        for part, shipped_part in _SHIPPED_NAMES.items():
            shipped_name = shipped_name.replace(part, shipped_part, 1)
        shipped[shipped_name] = weight
    return shipped


@torch.no_grad()
def _require_same_samples(
    sampler: Sampler,
    net: Any,  # noqa: ANN401, a model of diffusers
    solver: ShippedSolver,
    encoder: ShippedTextEncoder | None,
) -> None:
    """Raise UserError where the shipped code's samples are not dumo's to the bit, in as many passes as it can make.

    Of a net that reads texts, samples are compared on the same rows, and rows on the same prompts.
    """
    from dumo.export.shipped.pipeline import DumoPipeline

    passes = [n for n in _COMPARED_PASSES if can_make(solver, sampler.taught, n)]
    if not passes:
        raise UserError(f"solver '{solver.kind}' makes none of {_COMPARED_PASSES} passes, so nothing can be compared")
    data = sampler.data
    flow = sampler.flow
    settings = _solver_settings(solver)
    if encoder is not None:
        settings |= {"tokenizer": encoder.tokenizer, "text_encoder": encoder.model, **encoder.settings}
    pipeline = DumoPipeline(net, **settings)
    pipeline.to(sampler.device)
    _, c = random_batch("export", 2, data.shape, data.classes)
    condition: Json = {"class_labels": c.tolist()}
    if encoder is not None:
        textencoder.require_same_embeddings(encoder, pipeline)
        assert sampler.texts is not None
        tokens, mask, pooled = sampler.texts(c)
        condition = {"prompt_embeds": tokens, "prompt_attention_mask": mask, "pooled_prompt_embeds": pooled}
    draws = [noise(0, range(2), k, data.shape) for k in range(max(passes))]
    for n in passes:
        samples = solver(sampler.reads, flow.path, draws[0], c, n, draws.__getitem__)
        shipped: Any = pipeline(
            num_inference_steps=n, latents=draws[0], noises=draws[1:], output_type="latent", **condition
        )
        if not torch.equal(samples, shipped.images):
            raise UserError(
                f"objective '{flow.objective.kind}' reads its heads in another way than the exported code, x_t - (t - "
                "r) u or the velocity v: sample it by dumo sample"
            )


def _write_decoder(sampler: Sampler, folder: Path) -> list[str | None]:
    """Write the decoder, if there is one; return its entry in model_index.json. Raises as `Sampler.codec`."""
    data = sampler.data
    if not isinstance(data, Latents):
        return [None, None]
    codec = sampler.codec
    assert codec is not None
    net: Any = codec.net
    if not isinstance(data.codec, Taef2):
        net.net.save_pretrained(folder)
        return ["diffusers", type(net.net).__name__]
    from dumo.export.shipped.dumo_taef2 import DumoTaef2

    tiny = DumoTaef2(data.codec.channels)
    tiny.load_state_dict({name: w for name, w in net.state_dict().items() if name.startswith("decoder.")})
    tiny.save_pretrained(folder)
    shutil.copy(SHIPPED / f"{_VAE}.py", folder)
    shutil.copy(_TAEF2_LICENSE, folder / "LICENSE")
    return [_VAE, "DumoTaef2"]


def _pipeline_settings(sampler: Sampler, solver: ShippedSolver) -> Json:
    """The fields of the shipped pipeline's `__init__`: solver, its times, and shift and scale of what is learned."""
    settings = _solver_settings(solver)
    data = sampler.data
    scale: float | tuple[float, ...] = 1.0
    if isinstance(data, Latents):
        settings["shift"] = data.codec.published.shift
        scale = data.codec.published.scale
    sd = sampler.flow.path.sd  # the net learned x / sd
    if isinstance(scale, tuple):
        settings["scale"] = [of_channel / sd for of_channel in scale]
    else:
        settings["scale"] = scale / sd
    return settings


def _solver_settings(solver: ShippedSolver) -> Json:
    """The solver as fields of the shipped pipeline's `__init__`."""
    return {"solver": solver.kind, **solver.model_dump(mode="json", exclude={"kind"})}
