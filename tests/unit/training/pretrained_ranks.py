"""Two ranks that tune an SD3, in full and by adapters taught by its base. See test_pretrained_ranks.py."""

from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from dumo import dist
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope
from dumo.nets import Pretrained
from dumo.nets.adapter import Lora
from dumo.nets.text import TextFile
from dumo.objectives import DuMo
from dumo.run.base import Base
from dumo.training.cut import span
from dumo.training.ema import Ema
from dumo.training.loop import train
from dumo.training.optim import AdamW
from dumo.training.spec import Train
from dumo.training.state import State, begin
from dumo.training.step import Batch, Task, pieces
from dumo.types import Cond, Sample, Time
from meeting import meeting
from transformers_saved import CLASSES, SHAPE
from unit.training.frozen_ranks import everything

OBJECTIVE = DuMo(slope=DualSlope(), drop=0.2).model_copy(
    update={"guide": DuMo().guide.model_copy(update={"zeta": 0.5})}
)
# Of tiny gradients Adam with a tiny eps takes the sign, and rounding decides it.
SPEC = Train(steps=3, batch=8, ema=(Ema(decay=0.9),), clip=1.0, optimizer=AdamW(lr=1e-2, eps=1e-3))
WAYS = {"full": None, "lora": Lora(rank=4), "half": Lora(rank=4, frozen="bfloat16")}
LAYOUTS = [(1, False), (2, True)]  # ranks to a copy, and whether weights are given back


def tuned(source: str, way: str, share: int, *, reshard: bool, rows: int | None = None) -> State:
    """A state after all steps, by passes of so many rows; None: of all that a rank has."""
    torch.manual_seed(0)  # as `Run.build` does, for adapters
    net = Pretrained(source=source, lora=WAYS[way], texts=TextFile(source=f"{source}.safetensors")).build(
        OBJECTIVE.needs, SHAPE, CLASSES
    )
    spec = SPEC.model_copy(update={"share": share, "reshard": reshard, "micro_batch": rows})
    state, task = begin(net, spec), Task(OBJECTIVE, Linear(), CLASSES)
    if WAYS[way]:
        base = Base(state.net, spec.precision)

        def taught(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
            return base(x, c, t=t)[0]

        task = replace(task, teacher=taught)
    mine = span(pieces(spec, OBJECTIVE))
    train(state, task, lambda step: [part[mine] for part in batch(step)], spec)
    return state


def batch(step: int) -> Batch:
    """Data of a step."""
    g = torch.Generator().manual_seed(step)
    return [torch.randn(SPEC.batch, *SHAPE, generator=g), torch.arange(SPEC.batch) % CLASSES]


def main(rank: str, folder: str, source: str) -> None:
    """Tune in each way and layout, and leave all numbers."""
    torch.set_num_threads(1)
    with meeting(f"{folder}/meet", int(rank)):
        for way in WAYS:
            for share, reshard in LAYOUTS:
                found = everything(tuned(source, way, share, reshard=reshard))
                if dist.is_main():
                    safetensors.torch.save_file(found, Path(folder) / f"{way}-{share}-{reshard}.safetensors")
        dist.barrier()
