"""Moments of 8 bits and weights of 16: what a step does, what a checkpoint holds, and what rounding leaves as it is."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dumo import runtime
from dumo.flow.precision import round_stochastically
from dumo.runtime.random import philox, random_uint32, stream
from dumo.training import eightbit
from dumo.training.eightbit import BLOCK, AdamW8bitOptimizer, has_8bit_moments
from dumo.training.optim import AdamW, AdamW8bit
from dumo.training.settings import Train
from dumo.training.state import State, begin
from dumo.types import UserError
from unit.training.by_path import restore, save
from unit.training.toy import same, tensors

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
HALF = Train(steps=9, batch=2, optimizer=AdamW8bit(lr=1e-3), weights="bfloat16", precision="bf16")


def net(seed: int = 0) -> nn.Module:
    """A matrix whose moments take 8 bits, one whose rows are of other lengths, and biases."""
    net = nn.Sequential(nn.Linear(BLOCK, 32), nn.Linear(32, 200))
    for p in net.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=stream(seed, "eightbit"))
    return net


def moved(state: State, steps: int) -> State:
    """The state after more steps along gradients that depend on the step alone."""
    for _ in range(steps):
        g = stream("gradient", state.step)
        for p in state.net.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        state.optimizer.step()
        state.step += 1
        for average in state.averages.values():
            average.update(state.net, state.step)
    return state


def test_philox_is_philox() -> None:
    """Random123's known answers for philox2x32 of ten rounds."""
    for (low, high, key), wanted in {
        (0, 0, 0): (0xFF1DAE59, 0x6CD10DF2),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF): (0x2C3F628B, 0xAB4FD7AD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E): (0xDD7CE038, 0xF62A4C12),
    }.items():
        assert tuple(x.item() for x in philox(torch.tensor(low), torch.tensor(high), key)) == wanted


def test_bits_are_those_of_a_place() -> None:
    """For any who draw some; beyond 2^32 numbers, too."""
    whole = random_uint32(7, "a", begin=2**32 - 40, count=100, device=CPU)
    assert torch.equal(random_uint32(7, "a", begin=2**32 + 10, count=30, device=CPU), whole[50:80])
    assert len({*whole.tolist()}) == 100
    assert not torch.equal(random_uint32(8, "a", begin=2**32 - 40, count=100, device=CPU), whole)


@pytest.mark.parametrize("x", [0.1, -3.3, 1e-20, 1.0, -65000.7])
def test_the_mean_of_what_is_rounded_is_the_number(x: float) -> None:
    """It is one of the two neighbours, and within four standard errors in the mean."""
    many = torch.full((2**18,), x)
    found = round_stochastically(many, random_uint32("mean", f"{x}", begin=0, count=len(many), device=CPU)).double()
    exact = float(torch.tensor(x))
    low, high = found.min().item(), found.max().item()
    assert len(found.unique()) <= 2
    assert low <= exact <= high
    assert abs(found.mean().item() - exact) <= 4 * (high - low) / 2 / len(many) ** 0.5
    assert torch.tensor(x).bfloat16().item() in (low, high)


@pytest.mark.slow
def test_small_steps_move_weights_of_16_bits_in_the_mean() -> None:
    """A step of 1e-5 at 1: rounded to the nearest, nothing would move."""
    p = nn.Parameter(torch.ones(64, BLOCK, dtype=torch.bfloat16))
    optimizer = AdamW8bitOptimizer([("p", p)], lr=1e-5, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert 1 - p.detach().double().mean().item() == pytest.approx(1e-3, rel=0.1)


def test_a_step_is_nearly_adamw() -> None:
    """What 8 bits of a moment leave: the weights after some steps differ by a few per cent of how far they moved."""
    one, other = (
        moved(begin(net(), Train(steps=9, batch=2, optimizer=o)), 20) for o in (AdamW(lr=1e-3), AdamW8bit(lr=1e-3))
    )
    start = net().state_dict()
    for name, x in one.net.state_dict().items():
        y = other.net.state_dict()[name]
        assert (x - y).norm() <= (0.05 if name == "0.weight" else 1e-5) * (x - start[name]).norm(), name
    memory = other.optimizer.state[other.net.get_parameter("0.weight")]
    assert {key: (x.dtype, tuple(x.shape)) for key, x in memory.items()} == {
        "step": (torch.float32, ()),
        **{f"{key}_codes": (torch.uint8, (32, BLOCK)) for key in ("exp_avg", "exp_avg_sq")},
        **{f"{key}_scale": (torch.float32, (32, 1)) for key in ("exp_avg", "exp_avg_sq")},
    }


class KernelCalledError(Exception):
    """A kernel was called, and no GPU is there to run it."""


def test_the_kernel_of_a_gpu_has_all_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused one takes no number of a step on the CPU."""
    devices: list[str] = []

    def note_devices(*tensors: list[torch.Tensor], **options: object) -> None:
        devices.extend(x.device.type for part in tensors for x in part)
        raise KernelCalledError

    monkeypatch.setattr(eightbit, "adamw", note_devices)
    with FakeTensorMode() as mode:
        p = nn.Parameter(torch.ones(3, device="cuda"))
        p.grad = torch.ones_like(p)
    optimizer = AdamW8bitOptimizer([("p", p)], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    with mode, pytest.raises(KernelCalledError):
        optimizer.step()
    assert devices == 5 * ["cuda"]
    assert optimizer.state[p]["step"].device == CPU


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_it_goes_on_bit_for_bit(weights: str, tmp_path: Path) -> None:
    spec = Train(**{**HALF.model_dump(), "weights": weights})
    straight, first, second = (begin(net(seed), spec) for seed in (0, 0, 1))
    moved(straight, 4)
    restore(save(tmp_path, moved(first, 2), 1), second)
    assert same(tensors(second), tensors(first))
    assert same(tensors(moved(second, 2)), tensors(straight))
    kinds = {x.dtype for x in second.net.parameters()}, {x.dtype for x in second.sampled_net.parameters()}
    assert kinds == ({getattr(torch, weights)}, {torch.float32})


def test_the_seed_rounds() -> None:
    one, other = (moved(begin(net(), HALF.model_copy(update={"seed": seed})), 2) for seed in (0, 1))
    assert not same(tensors(one), tensors(other))


def test_blocks_lie_in_rows() -> None:
    shapes = {(16, 256): True, (15, 256): False, (64, 100): False, (8, 64, 2, 4): True, (8192,): False}
    assert {shape: has_8bit_moments(torch.empty(shape)) for shape in shapes} == shapes


def test_without_bitsandbytes_there_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "installed_version", lambda package: None)
    with pytest.raises(UserError, match=r"^optimizer 'adamw8bit' needs bitsandbytes, .*install .*"):
        AdamW8bit()(net())


def test_what_is_no_number_stays_one() -> None:
    """Any NaN, whatever its bits, in a weight and in a moment."""
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x00800000], dtype=torch.int32).view(torch.float32)
    found = round_stochastically(odd, torch.full((5,), 0xFFFF))
    assert found.isnan().tolist() == [True, True, True, False, False]
    assert found[3:].tolist() == [float("inf"), -float("inf")]
    p = nn.Parameter(torch.ones(16, BLOCK))
    optimizer = AdamW8bitOptimizer([("p", p)], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    p.grad[3, 5] = float("nan")
    optimizer.step()
    assert optimizer.state[p]["exp_avg_scale"].isnan().flatten().tolist() == [row == 3 for row in range(16)]
