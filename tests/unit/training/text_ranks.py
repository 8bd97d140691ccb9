"""Two ranks that train nets which read texts, given ones and by an encoder that learns too. See test_text_ranks.py."""

from pathlib import Path

import safetensors.torch
import torch

from dumo import dist
from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope
from dumo.nets.dit import DiT
from dumo.nets.text import Learned
from dumo.objectives import DuMo
from dumo.texts.encode import encode
from dumo.texts.tokens import Tokenizer
from dumo.training.cut import span
from dumo.training.ema import Ema
from dumo.training.loop import train
from dumo.training.optim import AdamW
from dumo.training.spec import Train
from dumo.training.state import State, begin
from dumo.training.step import Batch, Task, pieces
from meeting import meeting
from unit.nets.given import Given
from unit.training.frozen_ranks import everything

CAPTIONS, SHAPE = ("one", "two", "a three"), (1, 8, 8)
OBJECTIVE = DuMo(slope=DualSlope(), drop=0.2, guide=Guide(zeta=0.5))
# Of tiny gradients Adam with a tiny eps takes the sign, and rounding decides it.
SPEC = Train(steps=3, batch=8, ema=(Ema(decay=0.9),), clip=1.0, optimizer=AdamW(lr=1e-2, eps=1e-3))
WAYS = ("cross", "joint")
LAYOUTS = [(1, False), (2, True)]  # ranks to a copy, and whether weights are given back


def written(folder: Path) -> Learned:
    """An encoder to be trained, over the bytes of CAPTIONS."""
    encode(CAPTIONS, Tokenizer(length=8), folder)
    return Learned(root=str(folder), tokenizer=Tokenizer(length=8), width=8, depth=1, attention=2, drop=0.2)


def trained(way: str, learned: Learned, share: int, *, reshard: bool, rows: int | None = None) -> State:
    """A state after all steps, by passes of so many rows; None: of all that a rank has."""
    torch.manual_seed(0)  # as `Run.build` does
    net = DiT(patch=2, width=8, depth=3, attention=2, qk_norm=True)
    net = net.model_copy(update={"text": way, "texts": learned if way == "cross" else Given()})
    spec = SPEC.model_copy(update={"share": share, "reshard": reshard, "micro_batch": rows})
    state = begin(net.build(OBJECTIVE.needs, SHAPE, len(CAPTIONS)), spec)
    mine = span(pieces(spec, OBJECTIVE))
    task = Task(OBJECTIVE, Linear(), len(CAPTIONS))
    train(state, task, lambda step: [part[mine] for part in batch(step)], spec)
    return state


def batch(step: int) -> Batch:
    """Data of a step."""
    g = torch.Generator().manual_seed(step)
    return [torch.randn(SPEC.batch, *SHAPE, generator=g), torch.arange(SPEC.batch) % len(CAPTIONS)]


def main(rank: str, folder: str) -> None:
    """Train in each way and layout, and leave all numbers."""
    torch.set_num_threads(1)
    learned = written(Path(folder) / f"texts-{rank}")
    with meeting(f"{folder}/meet", int(rank)):
        for way in WAYS:
            for share, reshard in LAYOUTS:
                found = everything(trained(way, learned, share, reshard=reshard))
                if dist.is_main():
                    safetensors.torch.save_file(found, Path(folder) / f"{way}-{share}-{reshard}.safetensors")
        dist.barrier()
