"""Ranks that save and load a state, in groups of two, three and four. See test_ranks.py.

Four processes start; of each group the first ranks take part, and meet the others at the next. Each checks what it
finds itself, and ends with an error where that is wrong.
"""

import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dumo.flow.path import Linear
from dumo.runtime import dist, signals
from dumo.training import agreement
from dumo.training.checkpoint import assign_tensors, parts_of
from dumo.training.duration import Duration
from dumo.training.ema import MovingAverage
from dumo.training.layout import local_tensor
from dumo.training.metrics import StepMetrics
from dumo.training.milestone import save_milestone
from dumo.training.optim import AdamW
from dumo.training.settings import Train
from dumo.training.state import Diverged, State
from dumo.types import Frozen, Net, NoisyBatch, Terms, UserError
from meeting import leave, met
from trained import ToyTrainer
from unit.training.by_path import fault, latest, restore, restore_last_finite, save
from unit.training.toy import AVERAGES, CLASSES, Small, Toy, batches, flow_of, tensors

SHARES = {2: (1, 2), 3: (1, 3), 4: (1, 2, 4)}  # ranks that hold one copy of the weights, by world


def built(seed: int, share: int = 0, width: int = 8) -> State:
    """A state of a net on this rank; 0: whole, as one process has it."""
    net = Small(seed, width)
    averages = {ema.decay: MovingAverage(ema, net) for ema in AVERAGES}
    for module in (net, *(average.module for average in averages.values())):
        if share:
            shard(module, share)
    return State(net, AdamW(lr=1e-2)(net), Duration(9), averages)


def shard(net: nn.Module, share: int) -> None:
    """In place: copies of the net, each held by `share` ranks."""
    mesh = init_device_mesh("cpu", (dist.world() // share, share), mesh_dim_names=("replicate", "shard"))
    for module in (net.get_submodule("first"), net):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)


def moved(state: State) -> State:
    """The state after two steps along made-up gradients; `label` gets none at all, and so has no memory."""
    for n in (1, 2):
        for name, p in state.net.named_parameters():
            p.grad = None if name.startswith("label") else (p * n).detach() + 0.1
        state.optimizer.step()
        state.net.get_buffer("passes").fill_(n)
        state.step, state.images = n, 12 * n
        for average in state.averages.values():
            average.update(state.net, n)
    return state


@torch.no_grad()
def passed(state: State) -> None:
    """A pass without a gradient, after which each rank still has all weights."""
    for net in (state.net, state.sampled_net):
        net(torch.ones(2, 2, dtype=torch.float64), torch.tensor([0, 1]), t=torch.ones(2))


def same(state: State, file: Path) -> None:
    """Assert that a state is, bit for bit, the one of a file."""
    there, here = safetensors.torch.load_file(file), tensors(state)
    assert there.keys() == here.keys()
    wrong = [name for name, value in there.items() if not torch.equal(value, here[name])]
    assert not wrong, wrong
    assert (state.step, state.images) == (2, 24)


def refusal(work: Callable[[], object], kind: type[Exception] = UserError) -> str:
    """What an error says, the same on all ranks."""
    with pytest.raises(kind) as refused:
        work()
    said = agreement.gather_results(lambda: str(refused.value))
    assert len(set(said)) == 1, said
    return said[0]


def two(folder: Path) -> None:
    """Save by each share, and what a rank meets on the way."""
    for share in SHARES[2]:
        state, there = moved(built(0, share)), folder / f"share-{share}"
        (there / ".step-00000009.tmp").mkdir(parents=True, exist_ok=True)
        dist.barrier()
        passed(state)
        assert save(there, state, 1, "a run" if dist.is_main() else "") == there / "step-00000002"
        shared_out(state)
        whole = tensors(state)
        save_milestone(folder / f"milestones-{share}", state)
        if dist.is_main():
            safetensors.torch.save_file(whole, folder / f"share-{share}.safetensors")
        guarded(share)
    full(folder, state)
    fails(folder)
    unsaved(folder, state)
    damaged(folder, state)


def shared_out(state: State) -> None:
    """All ranks together copy what is saved once, each about as much."""
    parts = parts_of(state)
    here = sum(local_tensor(parts[part][name]).nbytes for part in parts for name in assign_tensors(parts[part]))
    each = agreement.gather_results(lambda: here)
    assert sum(each) == sum(x.nbytes for named in parts.values() for x in named.values())
    assert max(each) < 1.2 * min(each), each


class Spoilt(Toy):
    """Not finite in the rows of one rank, from t = 0.3 on."""

    rank: int

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        terms, late = super().loss(net, ref, b), (b.t > 0.3) & torch.tensor(self.rank == dist.rank())
        return Terms(terms.loss.where(~late, torch.nan), terms.parts)


def guarded(share: int) -> None:
    """What is not finite on one rank is skipped on both, and known to both; so is what one was asked."""
    spec, state = Train(steps=20, batch=12, ema=AVERAGES, optimizer=AdamW(lr=1e-2)), built(0, share)

    def step(objective: Toy, *, checkpoint_due: bool = False) -> StepMetrics:
        trainer = ToyTrainer(state, flow_of(state, spec, objective, Linear(), CLASSES), spec)
        return trainer.step([part[trainer.rows] for part in batches()(state.step)], checkpoint_due=checkpoint_due)

    assert step(Toy()).skipped is None
    before = tensors(state)
    for rank in (0, 1):
        skipped, (_, labels) = step(Spoilt(rank=rank)).skipped, batches()(state.step - 1)
        assert skipped
        assert len(set(agreement.gather_results(partial(repr, skipped)))) == 1
        assert {row["rank"] for row in skipped.rows} == {rank}
        for row in skipped.rows:
            place = int(row["place"] or 0)
            assert 6 * rank <= place < 6 * rank + 6
            assert row["class"] == labels[place]
    assert (state.step, state.skips) == (3, 2)
    after = tensors(state)
    assert [name for name in before if not name.endswith("passes") and not torch.equal(before[name], after[name])] == []

    with patch.object(signals, "received_signal", signal.SIGUSR1 if dist.rank() else None):
        metrics = step(Toy(), checkpoint_due=not dist.is_main())
    assert (metrics.received_signal, metrics.checkpoint_due, metrics.skipped) == (signal.SIGUSR1, False, None)
    assert step(Toy(), checkpoint_due=dist.is_main()).checkpoint_due
    assert state.skips == 0


def full(folder: Path, state: State) -> None:
    """A disk that is full for one rank only stops both, and so does one that will be; nothing is left."""
    there = folder / "share-2"
    state.step = 3
    no_space = OSError(28, "No space left on device")
    with patch("os.fsync", side_effect=no_space if dist.rank() == 1 else None):
        said = refusal(lambda: save(there, state, 1), OSError)
    assert "No space left" in said, said
    with patch("os.fsync", side_effect=no_space if dist.rank() == 0 else None):
        said = refusal(lambda: save_milestone(there, state), OSError)
    assert "No space left" in said, said
    assert [path.name for path in there.iterdir()] == ["step-00000002"]
    state.step = 2


def fails(folder: Path) -> None:
    """What goes wrong on one rank goes wrong on all."""

    def work(error: Exception) -> None:
        if dist.rank() == 1:
            raise error

    odd = (ValueError, "odd") if dist.rank() == 1 else (RuntimeError, "rank 1: ValueError: odd")
    for error, kind, said in ((FileNotFoundError(2, "gone"), OSError, "gone"), (ValueError("odd"), *odd)):
        with pytest.raises(kind, match=said):
            agreement.gather_results(partial(work, error))
    assert agreement.gather_results(dist.rank) == [0, 1]
    assert agreement.on_main_rank(lambda: 5 + dist.rank()) == 5

    other = built(1, 2, width=9)
    before = tensors(other)
    said = refusal(lambda: restore(folder / "share-2/step-00000002", other))
    assert "share-2/step-00000002/net: first.bias is (8,) float64 in the file, (9,) float64 in the run" in said, said
    assert all(torch.equal(value, before[name]) for name, value in tensors(other).items())


def unsaved(folder: Path, state: State) -> None:
    """A number that is none, in the part that one rank holds, is not saved by either; and where it is, not loaded."""
    there, part = folder / "share-2", local_tensor(state.net.get_parameter("last.bias").detach())
    was, state.step = part.clone(), 9
    if dist.rank():
        part.view(-1)[-1:] = torch.nan
    with pytest.raises(Diverged, match=r"step 9: net: last.bias is not finite"):
        save(there, state, 1)
    assert [path.name for path in there.iterdir()] == ["step-00000002"]
    with patch("dumo.training.checkpoint.find_nonfinite", return_value=None):
        save(there, state, 2)
    part.copy_(was)
    with pytest.warns(UserWarning, match="previous checkpoint step-00000002") if dist.is_main() else nullcontext():
        assert restore_last_finite(there / "step-00000009", state) == there / "step-00000002"
    same(state, folder / "share-2.safetensors")
    dist.barrier()
    if dist.is_main():
        shutil.rmtree(there / "step-00000009")
    dist.barrier()


def damaged(folder: Path, state: State) -> None:
    """What one rank finds, all know; a damaged step is replaced."""
    there = folder / "damaged"
    target = save(there, state, 1)
    broken = sorted(target.glob("net/*"))[1]
    whole = broken.read_bytes()
    dist.barrier()
    if dist.is_main():
        broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    dist.barrier()
    assert str(fault(target, together=True)).startswith(f"{broken} is damaged")
    assert str(broken) in refusal(lambda: latest(there, together=True))
    assert save(there, state, 1) == latest(there, together=True) == target
    same(state, folder / "share-2.safetensors")


def load(folder: Path, world: int) -> None:
    """What two ranks saved, and one, by each share."""
    for share in SHARES[world]:
        for kind in ("share-1", "share-2", "one"):
            state = built(1, share)
            found = latest(folder / kind, together=True)
            assert found == folder / kind / "step-00000002"
            restore(found, state)
            same(state, folder / f"{kind}.safetensors")
            for p, memory in state.optimizer.state.items():
                assert memory["exp_avg"].placements == p.placements
    assert agreement.gather_results(lambda: (folder / "share-1").is_dir()) == [True] * world


def main(folder: str, number: str) -> None:
    """Meet in twos, threes and fours."""
    rank = int(number)
    torch.set_num_threads(1)
    for world in SHARES:
        if rank < world:
            with met(f"{folder}/meeting-{world}", rank, world):
                if world == 2:
                    two(Path(folder))
                load(Path(folder), world)
                print(f"{world} agree", flush=True)
    leave()
