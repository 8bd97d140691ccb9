"""Two ranks that train a net of frozen weights with adapters, taught by its base. See test_frozen_ranks.py."""

from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dumo import dist
from dumo.run.base import Base
from dumo.training import layout
from dumo.training.checkpoint import save
from dumo.training.cut import span
from dumo.training.loop import train
from dumo.training.optim import AdamW
from dumo.training.spec import Train
from dumo.training.state import State, begin
from dumo.training.step import pieces
from dumo.types import Cond, Sample, Time
from meeting import meeting
from unit.training.adapted import Adapted
from unit.training.toy import AVERAGES, TASK, batches

LAYOUTS = [(1, False), (2, False), (2, True)]  # ranks to a copy, and whether weights are given back
SPEC = Train(steps=4, batch=12, ema=AVERAGES, ref=0.99, clip=0.5, optimizer=AdamW(lr=1e-2))


def trained(share: int, reshard: bool) -> State:
    """A state after all steps."""
    spec = SPEC.model_copy(update={"share": share, "reshard": reshard})
    state, make, rows = begin(Adapted(), spec), batches(spec.batch), span(pieces(spec, TASK.objective))
    base = Base(state.net, spec.precision)

    def taught(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
        return v + 0.5 * (base(x, c, t=t)[0] - v)

    train(state, replace(TASK, teacher=taught), lambda step: [part[rows] for part in make(step)], spec)
    return state


def everything(state: State) -> dict[str, Tensor]:
    """Every tensor of a state, whole, by name; moments by parameter."""
    modules = {"net": state.net, **{f"{decay}": average.module for decay, average in state.averages.items()}}
    found = {f"{part}.{name}": x for part, module in modules.items() for name, x in module.state_dict().items()}
    for name, p in state.net.named_parameters():
        found |= {f"optimizer.{key}.{name}": x for key, x in state.optimizer.state.get(p, {}).items()}
    return {name: layout.whole(x.detach()).clone() for name, x in found.items()}


def once(state: State) -> None:
    """Of what is frozen, averages still have the net's own parameters, after passes of both."""
    for average in state.averages.values():
        for name, p in state.net.named_parameters():
            assert (average.module.get_parameter(name) is p) != p.requires_grad, name


def main(rank: str, folder: str) -> None:
    """Train in each layout, save, and leave all numbers beside."""
    torch.set_num_threads(1)
    with meeting(f"{folder}/meet", int(rank)):
        for share, reshard in LAYOUTS:
            state, there = trained(share, reshard), Path(folder) / f"{share}-{reshard}"
            once(state)
            save(there, state, 1)
            found = everything(state)
            piece = layout.gathered(state.net, lambda _: Adapted(seed=1)).state_dict()
            assert all(torch.equal(x, found[f"net.{name}"]) for name, x in piece.items())
            if dist.is_main():
                safetensors.torch.save_file(found, there.with_suffix(".safetensors"))
        dist.barrier()
