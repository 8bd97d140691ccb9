"""Ranks that pass a training on: two save it, then one loads, steps and saves it, then three, then two again.

`main(RANK, FOLDER, CASE...)` is one of three processes; the first so many of them meet for each link of the chain. Each
link compares all tensors that it restored with those that the link before had saved, whole and bit for bit. See
test_chain.py.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from dumo.flow.slope import DualSlope
from dumo.io.deferred import Loaders
from dumo.nets.dit import DiT
from dumo.nets.lora import Lora
from dumo.objectives import DuMo
from dumo.runtime import dist
from dumo.runtime.random import stream
from dumo.training.ema import Ema
from dumo.training.layout import shard_like
from dumo.training.optim import AdamW, AdamW8bit, Muon
from dumo.training.settings import Train
from dumo.training.state import State, begin
from meeting import leave, met
from transformers_saved import CLASSES, SHAPE, saved
from unit.training.by_path import restore, save
from unit.training.toy import tensors

# How many ranks hold the training, one after another.
CHAIN = (2, 1, 3, 2)
AVERAGES = (Ema(decay=0.99), Ema(decay=0.9, ramp=False), Ema(decay=0.5))
OBJECTIVE = DuMo(slope=DualSlope())

Built = tuple[nn.Module, Loaders]


def wide(folder: Path, seed: int) -> Built:
    """A network that is trained in full, wide enough for moments of 8 bits."""
    torch.manual_seed(seed)
    net = DiT(patch=2, width=64, depth=2, attention=2).build(OBJECTIVE.needs, SHAPE, CLASSES)
    return net, {}


def adapted(folder: Path, seed: int, **fields: str) -> Built:
    """A published network of which adapters are trained; its base is read from a folder by each rank."""
    spec = saved(folder, "sd3")
    lora = Lora(rank=256, **fields)
    torch.manual_seed(seed)
    return spec.model_copy(update={"lora": lora, "lowpass": 10.0}).build_deferred(OBJECTIVE.needs, SHAPE, CLASSES)


def coded(folder: Path, seed: int) -> Built:
    """The same over a base in int8."""
    return adapted(folder, seed, frozen="int8")


NETS: dict[str, Callable[[Path, int], Built]] = {"full": wide, "lora": adapted, "int8": coded}
OPTIMIZERS = {"adamw": AdamW(lr=1e-2), "adamw8bit": AdamW8bit(lr=1e-2), "muon": Muon(lr=1e-2)}
# Every network with every optimizer, in replicas and in shards.
CASES = [f"{net}-{optimizer}-{share}" for net, optimizer, share in product(NETS, OPTIMIZERS, ("replicas", "shards"))]


def built(case: str, folder: Path, seed: int) -> State:
    """The state of a case before its first step, on this number of ranks; adapters are those of the seed."""
    net, optimizer, share = case.split("-")
    spec = Train(
        steps=len(CHAIN),
        batch=6,
        ema=AVERAGES,
        optimizer=OPTIMIZERS[optimizer],
        share=1 if share == "replicas" else dist.world(),
    )
    place = folder / f"rank-{dist.rank()}"
    place.mkdir(exist_ok=True)
    module, loaders = NETS[net](place, seed)
    return begin(module, spec, torch.device("cpu"), loaders)


def step(state: State) -> None:
    """Take a step along gradients that depend on the number of the step and the name of the parameter alone."""
    state.step += 1
    state.images += 6
    for name, p in state.net.named_parameters():
        if p.requires_grad:
            gradient = torch.randn(p.shape, generator=stream("chain", state.step, name))
            p.grad = shard_like(gradient.to(p.dtype), p)
    state.optimizer.step()
    for average in state.averages.values():
        average.update(state.net, state.step)


def require_same(saved_file: Path, state: State) -> None:
    """Compare all tensors of a state with those of a file, bit for bit."""
    found = tensors(state)
    expected = safetensors.torch.load_file(saved_file)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, x in expected.items():
        assert x.dtype == found[name].dtype, name
        assert torch.equal(x, found[name]), name


def pass_on(case: str, folder: Path, link: int) -> None:
    """Restore what the link before has saved, compare it, take a step and save."""
    state = built(case, folder, seed=link)
    checkpoints = folder / "checkpoints"
    if link > 0:
        restore(checkpoints / f"step-{link:08d}", state)
        assert (state.step, state.images) == (link, 6 * link)
        require_same(folder / f"{link}.safetensors", state)
    step(state)
    save(checkpoints, state, keep=len(CHAIN))
    whole = tensors(state)
    if dist.is_main():
        safetensors.torch.save_file(whole, folder / f"{state.step}.safetensors")
    dist.barrier()


def main(number: str, folder: str, *cases: str) -> None:
    """Pass on the training of each case."""
    torch.set_num_threads(1)
    rank = int(number)
    for link, world in enumerate(CHAIN):
        # Who has no part in this link waits for the next.
        if rank < world:
            with met(f"{folder}/meeting-{link}", rank, world):
                for case in cases:
                    place = Path(folder) / case
                    place.mkdir(exist_ok=True)
                    pass_on(case, place, link)
                print(f"{world} agree", flush=True)
    leave()
