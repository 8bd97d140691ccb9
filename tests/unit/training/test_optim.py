"""Optimizers carry their numbers to torch; schedules are the curves they say; Muon moves matrices as torch's does."""

import copy
import pickle
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp

from dumo.config.load import load
from dumo.nets.embed import SLOPE_TIMES, Scalars
from dumo.run.memory import held_bytes
from dumo.run.net import make_flow, meta_net
from dumo.run.weights import build
from dumo.runtime.random import random_batch, stream
from dumo.training.duration import Duration
from dumo.training.muon import STACK_KEY, block_matrices, orthogonalize
from dumo.training.optim import Adam, AdamW, AdamW8bit, Muon, Optimizer
from dumo.training.schedule import WSD, Constant, Cosine, LearningRateSchedule
from dumo.training.state import begin
from trained import ToyTrainer, train


def net_of(*params: nn.Parameter) -> nn.Module:
    """A net of these parameters."""
    return nn.ParameterList(params)


@pytest.mark.parametrize(("spec", "kind"), [(AdamW, "AdamW"), (Adam, "Adam")])
def test_numbers_reach_torch(spec: type[AdamW | Adam], kind: str) -> None:
    optimizer = spec(lr=0.1, betas=(0.2, 0.3), weight_decay=0.4, eps=0.5)(
        nn.ParameterList([nn.Parameter(torch.ones(1))])
    )
    (group,) = optimizer.param_groups
    assert type(optimizer) is getattr(torch.optim, kind)
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"], group["eps"]) == (0.1, (0.2, 0.3), 0.4, 0.5)


class OnGpu(nn.Parameter):
    """A parameter that says it is on a GPU."""

    is_cuda = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def test_a_gpu_steps_in_one_kernel_and_a_cpu_as_ever() -> None:
    """In one kernel the rounding is another: runs on a CPU keep their bits."""
    for spec in (AdamW(), Adam()):
        kinds = [spec(net_of(kind(torch.ones(3)))).param_groups[0].get("fused") for kind in (OnGpu, nn.Parameter)]
        assert kinds == [True, None]


HALF = 2**0.5 / 4
CURVES = [  # schedule, its steps, some of them, factors of the rate
    (Constant(), 10, range(4), [1, 1, 1, 1]),
    (Constant(warmup=4), 10, range(6), [0.25, 0.5, 0.75, 1, 1, 1]),
    (Cosine(), 4, range(5), [1, 0.5 + HALF, 0.5, 0.5 - HALF, 0]),
    (Cosine(warmup=2), 4, range(5), [0.5, 1, 1, 0.5, 0]),
    (WSD(warmup=2), 20, (0, 1, 16, 17, 20), [0.5, 1, 1, 0.5, 0]),
    (WSD(warmup=18), 20, (17,), [1]),  # the warm-up is waited for
]


@pytest.mark.parametrize(("schedule", "steps", "some", "factors"), CURVES)
def test_curves(schedule: LearningRateSchedule, steps: int, some: Iterable[int], factors: list[float]) -> None:
    assert [schedule(step, steps) for step in some] == pytest.approx(factors)


def test_what_has_fallen_stays_there() -> None:
    assert [schedule(step, 10) for schedule in (Cosine(), WSD()) for step in (10, 11, 400)] == [0] * 6


@pytest.mark.parametrize("warmup", [0, 1, 5, 40])
@pytest.mark.parametrize("steps", [1, 2, 6, 30])
def test_schedules_climb_then_fall_within_bounds(warmup: int, steps: int) -> None:
    for schedule in (Constant(warmup=warmup), Cosine(warmup=warmup), WSD(warmup=warmup)):
        factors = [schedule(step, steps) for step in range(steps)]
        top = min(warmup, steps)
        assert all(0 < factor <= 1 for factor in factors)
        assert all(a <= b for a, b in pairwise(factors[:top]))
        assert all(a >= b for a, b in pairwise(factors[max(0, top - 1) :]))


def test_wsd_of_more_steps_is_the_same_until_it_falls() -> None:
    """So a run goes on from a checkpoint before its decay as if it had been longer from the start."""
    short, steps = WSD(warmup=3), 20
    assert [short(step, steps) for step in range(17)] == [short(step, 4 * steps) for step in range(17)]
    assert short(17, steps) < 1 == short(17, 4 * steps)


TINY = ["net.width=8", "net.depth=2", "train.batch=4", "train.schedule.kind=wsd", "train.optimizer.kind=muon"]


def drawn(*shape: int, name: str = "muon", dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=stream(0, name), dtype=dtype)


class Blocks(nn.Module):
    """A net whose blocks are these layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)


def stepped(optimizer: torch.optim.Optimizer, net: nn.Module, steps: int = 3) -> nn.Module:
    """The net after some steps along gradients that are drawn."""
    for step in range(steps):
        for i, p in enumerate(net.parameters()):
            p.grad = drawn(*p.shape, name=f"{step} {i}").to(p.dtype)
        optimizer.step()
    return net


@pytest.mark.parametrize("shape", [(1, 12, 5), (2, 5, 12), (3, 8, 8)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    m = drawn(*shape)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    turned = u.mT @ orthogonalize(m) @ vh.mT
    found = turned.diagonal(dim1=1, dim2=2)
    assert torch.allclose(turned, found.diag_embed(), rtol=0, atol=1e-12)
    large = s / s.square().sum(1, keepdim=True).sqrt() > 2e-3
    assert large.float().mean() > 0.9
    assert 0.6 < found[large].min() < found[large].max() < 1.3


def test_a_whole_matrix_moves_as_torchs_does() -> None:
    """To the bit in bf16, in which torch iterates."""
    ours, theirs = (Blocks(nn.Linear(6, 20, bias=False)).bfloat16() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    spec = Muon(lr=0.02, momentum=0.9, weight_decay=0.1, adamw_lr=0.1)
    torchs = torch.optim.Muon(theirs.parameters(), 0.02, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    for optimizer, net in ((spec(ours), ours), (torchs, theirs)):
        stepped(optimizer, net)
    assert torch.equal(next(ours.parameters()), next(theirs.parameters()))


def test_a_matrix_moves_as_far_as_by_adamw() -> None:
    """In the root mean square .2 lr, about what AdamW's step is in training (Moonlight, Sec. 2.2)."""
    for rows, columns in ((64, 16), (16, 64), (32, 32)):
        net = Blocks(nn.Linear(columns, rows, bias=False))
        before = next(net.parameters()).detach().clone()
        stepped(Muon(lr=0.5)(net), net, 1)
        assert (next(net.parameters()) - before).square().mean().sqrt().item() == pytest.approx(0.1, rel=0.2)


class Fused(nn.Module):
    """A layer that is two in one."""

    fused = {"both": 2}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(6, 8, bias=False, dtype=torch.float64)


def test_layers_that_are_two_in_one_move_one_by_one() -> None:
    net = Blocks(Fused())
    two = Blocks(*(nn.Linear(6, 4, bias=False, dtype=torch.float64) for _ in range(2)))
    both = net.get_parameter("blocks.0.both.weight")
    both.data = torch.cat([p.detach() for p in two.parameters()])
    one, other = Muon(lr=0.1)(net), Muon(lr=0.1)(two)
    for step in range(2):
        both.grad = drawn(8, 6, name=f"{step}")
        for p, grad in zip(two.parameters(), both.grad.chunk(2), strict=True):
            p.grad = grad.clone()
        one.step()
        other.step()
    assert torch.allclose(both, torch.cat([*two.parameters()]), rtol=1e-12, atol=0)


def test_filters_are_rows() -> None:
    conv, flat = Blocks(nn.Conv2d(4, 6, 3, bias=False)), Blocks(nn.Linear(36, 6, bias=False))
    (k,), (w,) = conv.parameters(), flat.parameters()
    w.data = k.detach().flatten(1).clone()
    k.grad = drawn(6, 4, 3, 3, dtype=torch.float32)
    w.grad = k.grad.flatten(1).clone()
    Muon()(conv).step()
    Muon()(flat).step()
    assert torch.equal(k.flatten(1), w)


@pytest.mark.parametrize(
    ("recipe", "more", "taken"),
    [
        ("digits", [], {"modulation": 6, "qkv": 3, "out": 1, "up": 1, "down": 1}),
        ("digits", ["net.modern=true"], {"modulation": 6, "qkv": 3, "out": 1, "up": 2, "down": 1}),
        ("moons", [], {"0": 1, "1": 1}),
        ("cifar10-small", [], {"conv_1": 1, "conv_2": 1, "skip": 1, "shift": 1, "qkv": 3, "out": 1}),
    ],
)
def test_matrices_are_those_of_blocks(recipe: str, more: list[str], taken: dict[str, int]) -> None:
    net = meta_net(load(recipe, ["net.width=16", *(["net.depth=2"] if recipe != "cifar10-small" else []), *more]))
    names = {p: name for name, p in net.named_parameters()}
    found = {names[p]: n for p, n in block_matrices(net).items()}
    assert all(name.startswith(("blocks.", "layers.")) for name in found)
    assert {name.split(".")[-2]: n for name, n in found.items()} == taken
    groups = Muon()(net).param_groups
    held = [names[p] for group in groups for p in group["params"]]
    assert sorted(held) == sorted(names.values())
    assert {names[p] for group in groups for p in group["params"] if STACK_KEY in group} == found.keys()


def test_all_else_moves_by_adamw() -> None:
    nets = [build(load("moons", ["net.width=8", "net.depth=2"])) for _ in range(2)]
    muon = stepped(Muon(lr=0.1, adamw_lr=0.01, weight_decay=0.1)(nets[0]), nets[0])
    adamw = stepped(AdamW(lr=0.01, weight_decay=0.1)(nets[1]), nets[1])
    same = {name for name, p in muon.named_parameters() if torch.equal(p, adamw.get_parameter(name))}
    assert {name for name, _ in muon.named_parameters()} - same == {"layers.0.weight", "layers.1.weight"}


RATES = ["train.optimizer.lr=0.02", "train.optimizer.adamw_lr=0.005", "train.optimizer.time_lr=0.001"]


@pytest.mark.parametrize(("rates", "expected"), [(RATES[:2], [0.01, 0.0025]), (RATES, [0.01, 0.0025, 0.0005])])
def test_the_schedule_scales_all_rates(
    rates: list[str], expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Duration, "rate_factor", lambda *_: 0.5)
    run = load("moons", [*TINY, *rates])
    state = begin(build(run), run.train)
    batch = random_batch("rates", run.train.batch, run.data.shape, run.data.classes)
    ToyTrainer(state, make_flow(run, state), run.train).step(batch)
    assert [group["lr"] for group in state.optimizer.param_groups] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recipe", "more", "embedded"),
    [
        ("moons", [], {"t"}),
        ("cifar10-small", [], {"t"}),
        ("digits", ["objective.kind=dumo_any"], {"t", "r"}),  # r is an input of one head alone
        ("digits-meanflow", [], {"t", "r"}),
    ],
)
def test_embedders_of_times_have_a_rate_of_their_own(recipe: str, more: list[str], embedded: set[str]) -> None:
    """Those of every net, and nothing else; all weights are held once."""
    net = build(load(recipe, ["net.width=16", "net.depth=1", *more]))
    names = {p: name for name, p in net.named_parameters()}
    *groups, own = [[names[p] for p in group["params"]] for group in Muon(time_lr=1e-4)(net).param_groups]
    assert {name.partition("embedders.")[2].partition(".")[0] for name in own} == embedded
    others = [name for group in groups for name in group]
    assert not any("embedders." in name for name in others)
    assert sorted([*own, *others]) == sorted(names.values())


def test_an_embedder_that_is_marked_has_a_rate_of_its_own() -> None:
    class Embedder(nn.Linear):
        embeds_times = True

    net = Block()
    net.head = Embedder(16, 3)
    assert [group["lr"] for group in Muon(time_lr=1e-4)(net).param_groups] == [1e-3, 1e-3, 1e-4]


@pytest.mark.slow
def test_a_run_goes_on_with_another_rate_of_its_embedders(tmp_path: Path) -> None:
    """What the optimizer has in memory goes by the names of weights, not by their group."""
    train(load("moons", [*TINY, "train.steps=2"]), tmp_path)
    train(load("moons", [*TINY, "train.steps=4", "train.optimizer.time_lr=1e-4"]), tmp_path)


def test_stopped_and_resumed_is_the_same_run(tmp_path: Path) -> None:
    train(load("moons", [*TINY, "train.steps=4", "train.schedule.kind=constant"]), tmp_path / "whole")
    for steps in (2, 4):
        train(load("moons", [*TINY, f"train.steps={steps}", "train.schedule.kind=constant"]), tmp_path / "parted")
    last = "checkpoints/step-00000004/{}/00000.safetensors"
    for part in ("net", "optimizer"):
        one, other = ((tmp_path / run / last.format(part)).read_bytes() for run in ("whole", "parted"))
        assert one == other


class Block(nn.Module):
    """A matrix and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(256, 16)])
        self.head = nn.Linear(16, 3)


def passed_on(pair: tuple[nn.Module, torch.optim.Optimizer], by: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A net and its optimizer, copied by what other libraries copy them by."""
    return copy.deepcopy(pair) if by == "copy" else pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("by", ["copy", "pickle"])
@pytest.mark.parametrize("spec", [Muon(lr=0.01, weight_decay=0.1), AdamW8bit(lr=0.01)])
def test_a_copy_takes_the_same_steps(spec: Muon | AdamW8bit, by: str) -> None:
    """Before the first step and after some: the copy's net moves as the other, which stays where it is."""
    net: nn.Module = Block()
    if isinstance(spec, AdamW8bit):
        net = net.bfloat16()  # it draws random numbers by the names of weights
    pair = net, spec(net)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        for i, p in enumerate(net.parameters()):
            p.grad = torch.randn(p.shape, generator=stream(seed, f"{i}")).to(p.dtype)
        optimizer.step()

    for seed in range(3):
        other = passed_on(pair, by)
        before = [p.clone() for p in net.parameters()]
        step(*other, seed)
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        step(*pair, seed)
        moved = zip(net.parameters(), other[0].parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in moved)
        pair = other if seed == 1 else pair
        net = pair[0]


def test_its_memory_is_counted() -> None:
    """One number for each weight of a matrix, two of all else, and a count of steps."""
    run = load("moons", TINY)
    net = meta_net(run)
    both = held_bytes(net, run.train).optimizer
    most = sum(p.nbytes for p in net.parameters())
    inside = sum(p.nbytes for p in block_matrices(net))
    assert both == 2 * most - inside + 4 * (len([*net.parameters()]) - len(block_matrices(net)))


def slope_growth(optimizer: Optimizer, chosen: str) -> float:
    """How many times larger de/dt, the slope of the embedding of t, is after the worst first step of some weights.

    Adam's first step is its rate times the sign of the gradient, the worst one that of the slope itself.
    """
    net = build(load("dumo-best-latents", ["net.depth=1", "net.route=null"])).double()
    (scalars,) = (module for module in net.modules() if isinstance(module, Scalars))
    t = torch.tensor(SLOPE_TIMES, dtype=torch.float64)

    def slope() -> Tensor:
        _, de_dt = jvp(lambda t: scalars(t=t), (t,), (torch.ones_like(t),))  # pyright: ignore[reportAssignmentType]
        return de_dt.square().mean().sqrt()

    before = slope()
    before.neg().backward()  # a step goes down
    for name, p in net.named_parameters():
        p.grad = p.grad if p.grad is not None and chosen in name else torch.zeros_like(p)
    optimizer(net).step()
    return (slope() / before).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "own", "without"),
    [("embedders", 1.5, 6.5), ("t.0.weight", 1.3, 3.0), ("t.2.weight", 1.2, 2.2), ("blocks", 1.0, 1.0)],
)
def test_one_step_hardly_turns_the_embedding_of_time(chosen: str, own: float, without: float) -> None:
    """At its own rate by a half at most; at the rate of heads and labels nearly sevenfold (docs/mathematics.md)."""
    rates = load("dumo-best-latents").train.optimizer
    assert isinstance(rates, Muon)
    assert slope_growth(rates, chosen) <= own
    assert slope_growth(rates.model_copy(update={"adamw_lr": 0.006, "time_lr": None}), chosen) >= without
