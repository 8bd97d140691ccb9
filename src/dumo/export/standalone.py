"""A run of dumo's own DiT as a folder that stock diffusers runs, with the code that it takes next to the weights.

pipeline.py        the jumps, or Euler steps
transformer/       dumo_dit.py, its config and weights: every head, of the weights that are shown
vae/               the decoder, if the net makes latents: a class of diffusers, or dumo_taef2.py
model_index.json   which parts there are, and how the run samples
README.md          the model card

The code lies in `shipped`, which is no package of dumo: it is copied as it is. diffusers copies such files into one
flat folder, and of what they import from each other the first level alone, so each stands by itself. That it computes
what dumo does is not taken on trust: before anything is written both nets are compared.
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
from dumo.export.scheduler import restart
from dumo.flow.solver import Euler
from dumo.io.read import write_json
from dumo.nets.dit import PUBLISHED, DiT
from dumo.run.sampler import Sampler
from dumo.runtime import version
from dumo.runtime.random import random_batch
from dumo.types import Sample, UserError

SHIPPED = Path(__file__).parent / "shipped"
TRANSFORMER, VAE = "dumo_dit", "dumo_taef2"  # files, and not `dit`: diffusers has a pipeline of this name
TIMES = ("t", "r")  # embeddings that it has
PROBED = (0.3, 0.9)  # times at which both nets are compared: ours
Json = dict[str, Any]


def write(
    sampler: Sampler,
    spec: DiT,
    made: card.Provenance,
    out: Path,
    name: str,
    *,
    head: Head,
    dtype: str = "float32",
) -> None:
    """Write the folder `out`, which is there and empty, and will be called `name`.

    Raises UserError for an option of the net or a guidance that the shipped code does not know, and where it computes
    anything else than dumo.
    """
    check(sampler, spec)
    net = transformer(sampler, spec)
    agree(sampler, net, head)
    nn.Module.to(net, getattr(torch, dtype))  # diffusers' own would warn that no layer stays in float32
    net.save_pretrained(out / "transformer")
    shutil.copy(SHIPPED / f"{TRANSFORMER}.py", out / "transformer")
    shutil.copy(SHIPPED / "pipeline.py", out)
    index: Json = {"_class_name": ["pipeline", "DumoPipeline"], "_dumo_version": version()}
    index |= {"transformer": [TRANSFORMER, "DumoDiT"], "vae": decoder(sampler, out / "vae")}
    write_json(out / "model_index.json", index | sampling(sampler, head))
    (out / "README.md").write_text(card.of_own(sampler, made, spec.kind, name, head), encoding="utf-8")


def check(sampler: Sampler, spec: DiT) -> None:
    """Raise UserError for a run that the shipped code does not know."""
    needs, guide = sampler.flow.objective.needs, sampler.spec.guide
    wrong = [f"net.{field} is {value}" for field in PUBLISHED if (value := getattr(spec, field)) != PUBLISHED[field]]
    wrong += ["net.texts is set"] if spec.texts else []
    wrong += [f"its net takes {name}" for name in needs.names if name not in TIMES]
    wrong += [f"its head {name} takes more than the others" for name in needs.own]
    wrong += [f"sample.guide.scale is {guide.scale:g}"] if guide.active else []
    if wrong:
        raise UserError(f"{wrong[0]}, which the exported code does not know: sample it by dumo sample")


def transformer(sampler: Sampler, spec: DiT) -> Any:  # noqa: ANN401, a model of diffusers
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
    times = [time for time in TIMES if f"times.{time}.0.weight" in state]
    heads = [*sampler.flow.objective.needs.heads]
    shipped = DumoDiT(channels, side, data.classes, **fields, time_names=times, head_names=heads)
    shipped.load_state_dict(state)
    return shipped.eval()


@torch.no_grad()
def agree(sampler: Sampler, net: Any, head: Head) -> None:  # noqa: ANN401
    """Raise UserError where the shipped net and dumo's reading of its own are not the same to the bit."""
    data, reads = sampler.data, sampler.reads
    x, c = random_batch("export", 2, data.shape, data.classes)
    for t in (x.new_full((2,), t) for t in PROBED):
        theirs: Sample = net(x, t, c, head)
        if head == "u":
            ours, theirs = reads.endpoint and reads.endpoint(x, t, c), x - t[:, None, None, None] * theirs
        else:
            ours = reads.velocity and reads.velocity(x, t, c)
        if ours is None or not torch.equal(ours, theirs):
            raise UserError(
                f"objective '{sampler.flow.objective.kind}' reads its head {head} in another way than "
                "the exported code, x_t - t u or the velocity v: sample it by dumo sample"
            )


def decoder(sampler: Sampler, folder: Path) -> list[str | None]:
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
    shutil.copy(SHIPPED / f"{VAE}.py", folder)
    return [VAE, "DumoTaef2"]


def sampling(sampler: Sampler, head: Head) -> Json:
    """How the pipeline samples, and what becomes of it: the fields of its `__init__`. Raises as `restart`."""
    data, solver = sampler.data, sampler.spec.solver
    chosen = restart(solver) if head == "u" else Euler()
    said: Json = {"head": head, **chosen.model_dump(mode="json", exclude={"kind"})}
    if isinstance(data, Latents):
        said |= {"shift": data.codec.published.shift, "scale": data.codec.published.scale}
    return said
