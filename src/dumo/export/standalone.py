"""A run of dumo's own DiT as a folder that stock diffusers runs, with the code that it takes next to the weights.

pipeline.py        the jumps, or Euler steps
transformer/       dumo_dit.py, its config and weights: every head, of the weights that are shown
vae/               the decoder, if the net makes latents: a class of diffusers, or dumo_taef2.py
model_index.json   which parts there are, and how the run samples
README.md          the model card

The code lies in `shipped`, which is no package of dumo: it is copied as it is. diffusers copies such files into one
flat folder, and of what they import from each other the first level alone, so each stands by itself. That it computes
what dumo does is not taken on trust: before anything is written both nets are compared.

`write` is the entrance: it refuses runs that the shipped code does not know, compares, and writes.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dumo.data import Latents
from dumo.encoders import Taef2
from dumo.export import card
from dumo.export.model import Head
from dumo.export.scheduler import SHIPPED, restart_for_scheduler
from dumo.flow.solver import Euler
from dumo.io.read import write_json
from dumo.nets.dit import DiT
from dumo.nets.dit_convert import PUBLISHED_FIELDS
from dumo.run.sampler import Sampler
from dumo.runtime import version
from dumo.runtime.random import random_batch
from dumo.types import Sample, UserError

_TRANSFORMER = "dumo_dit"  # of shipped/dumo_dit.py; not `dit`, for diffusers has a pipeline of this name
_VAE = "dumo_taef2"  # of shipped/dumo_taef2.py
_KNOWN_TIMES = ("t", "r")  # the times that the shipped net embeds
_COMPARED_TIMES = (0.3, 0.9)  # at which both nets are compared: ours
Json = dict[str, Any]


def write(
    sampler: Sampler,
    spec: DiT,
    provenance: card.Provenance,
    out: Path,
    name: str,
    *,
    head: Head,
    dtype: str = "float32",
) -> None:
    """Write the net and its code into the empty folder `out`, which will be called `name`.

    Raises UserError for an option of the net or a guidance that the shipped code does not know, and where it computes
    anything else than dumo.
    """
    _require_known_run(sampler, spec)
    net = _shipped_net(sampler, spec)
    _require_same_output(sampler, net, head)
    nn.Module.to(net, getattr(torch, dtype))  # diffusers' own would warn that no layer stays in float32
    net.save_pretrained(out / "transformer")
    shutil.copy(SHIPPED / f"{_TRANSFORMER}.py", out / "transformer")
    shutil.copy(SHIPPED / "pipeline.py", out)
    index: Json = {"_class_name": ["pipeline", "DumoPipeline"], "_dumo_version": version()}
    index["transformer"] = [_TRANSFORMER, "DumoDiT"]
    index["vae"] = _write_decoder(sampler, out / "vae")
    write_json(out / "model_index.json", index | _pipeline_settings(sampler, head))
    (out / "README.md").write_text(card.of_own(sampler, provenance, spec.kind, name, head), encoding="utf-8")


def _require_known_run(sampler: Sampler, spec: DiT) -> None:
    """Raise UserError for a run that the shipped code does not know."""
    way_out = "which the exported code does not know: sample it by dumo sample"
    needs = sampler.flow.objective.needs
    guide = sampler.spec.guide
    for field, known in PUBLISHED_FIELDS.items():
        value = getattr(spec, field)
        if value != known:
            raise UserError(f"net.{field} is {value}, {way_out}")
    if spec.texts:
        raise UserError(f"net.texts is set, {way_out}")
    for name in needs.names:
        if name not in _KNOWN_TIMES:
            raise UserError(f"its net takes {name}, {way_out}")
    for name in needs.own:
        raise UserError(f"its head {name} takes more than the others, {way_out}")
    if guide.active:
        raise UserError(f"sample.guide.scale is {guide.scale:g}, {way_out}")


def _shipped_net(sampler: Sampler, spec: DiT) -> Any:  # noqa: ANN401, a model of diffusers
    """The shipped net with the run's weights."""
    from dumo.export.shipped.dumo_dit import DumoDiT

    data = sampler.data
    channels, side, _ = data.shape
    state = {
        name.replace("scalars.embedders.", "times."): tensor
        for name, tensor in sampler.net.state_dict().items()
        if not name.startswith("gauges.")
    }
    fields = spec.model_dump(include={"patch", "width", "depth", "attention", "time_scale"})
    times = [time for time in _KNOWN_TIMES if f"times.{time}.0.weight" in state]
    heads = [*sampler.flow.objective.needs.heads]
    shipped = DumoDiT(channels, side, data.classes, **fields, time_names=times, head_names=heads)
    shipped.load_state_dict(state)
    return shipped.eval()


@torch.no_grad()
def _require_same_output(sampler: Sampler, net: Any, head: Head) -> None:  # noqa: ANN401
    """Raise UserError where the shipped net and dumo's reading of its own are not the same to the bit."""
    data = sampler.data
    reading = sampler.reads.endpoint if head == "u" else sampler.reads.velocity
    x, c = random_batch("export", 2, data.shape, data.classes)
    for time in _COMPARED_TIMES:
        t = x.new_full((2,), time)
        shipped: Sample = net(x, t, c, head)
        if head == "u":  # to the point that the flow map jumps to
            shipped = x - t[:, None, None, None] * shipped
        if reading is None or not torch.equal(reading(x, t, c), shipped):
            raise UserError(
                f"objective '{sampler.flow.objective.kind}' reads its head {head} in another way than "
                "the exported code, x_t - t u or the velocity v: sample it by dumo sample"
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
    return [_VAE, "DumoTaef2"]


def _pipeline_settings(sampler: Sampler, head: Head) -> Json:
    """The fields of the shipped pipeline's `__init__`: head, times, and the latents' shift and scale.

    Raises UserError for a solver whose jumps the pipeline does not make.
    """
    solver = restart_for_scheduler(sampler.spec.solver) if head == "u" else Euler()
    settings: Json = {"head": head, **solver.model_dump(mode="json", exclude={"kind"})}
    data = sampler.data
    if isinstance(data, Latents):
        settings["shift"] = data.codec.published.shift
        settings["scale"] = data.codec.published.scale
    return settings
