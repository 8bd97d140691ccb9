"""The fake score of DMD2 beside the generator: two adapters on one frozen model, of which one adds to a pass."""

from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from dumo.flow.noisy_batch import draw
from dumo.flow.path import Diffusion, FlowPath, Linear
from dumo.flow.times import OfSampler
from dumo.nets.dualized import Dualized
from dumo.nets.lora import Lora, adapters
from dumo.objectives.dmd2 import DMD2
from dumo.run.memory import held_bytes
from dumo.run.teacher import BaseNet
from dumo.training.optim import AdamW
from dumo.training.settings import Train
from dumo.types import Cond, Frozen, Needs, NoisyBatch, Sample, Time, UserError, fake_score
from transformers_saved import CLASSES, SHAPE, Saved, batch, built

OBJECTIVE = DMD2()
FAKE_STEP, GENERATOR_STEP = 0, OBJECTIVE.fake_updates
NAMES = ["sd3", "sdxl"]
SID = DMD2(alpha=1.2)  # differentiates the base model and the fake score with respect to their inputs
SETTINGS = {"dmd2": OBJECTIVE, "sid": SID, "tdm": DMD2(times=OfSampler(solver="hop"))}


def made(folder: Saved, name: str = "sd3", **fields: object) -> Dualized:
    return built(folder(name), OBJECTIVE.needs, lora=Lora(rank=4), **fields)


def noisy(net: Dualized, step: int, guidance: float = 1.0, objective: DMD2 = OBJECTIVE) -> NoisyBatch:
    """A step's batch, whose real score is the base model's."""
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(5))
    c = torch.arange(4) % CLASSES
    path: FlowPath = Linear()
    if net.diffusion:
        path = Diffusion(schedule=net.diffusion.schedule)
    base = BaseNet(net, "fp32")

    def teacher(x: Sample, t: Time, c: Cond, v: Sample) -> Sample:
        real = base(x, c, t=t)[0]
        if guidance == 1:
            return real
        null = base(x, torch.full_like(c, CLASSES), t=t)[0]
        return null + guidance * (real - null)

    return draw(objective, path, x, c, CLASSES, seed=0, step=step, teacher=teacher)


def gradients(net: Dualized, step: int, objective: DMD2 = OBJECTIVE) -> dict[str, Tensor]:
    """Of the trained weights; only those that have one."""
    net.zero_grad()
    objective.loss(net, Frozen(net), noisy(net, step, 3.0, objective)).loss.mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def randomized(net: Dualized) -> Dualized:
    """Adapters that add something."""
    for name, p in net.named_parameters():
        if "lora_B" in name:
            g = torch.Generator().manual_seed(len(name) + 100 * (".fake." in name))
            p.data = 0.05 * torch.randn(p.shape, generator=g)
    return net


@pytest.mark.parametrize("name", NAMES)
def test_only_adapters_are_trained_and_both_are_saved(folder: Saved, name: str) -> None:
    net = made(folder, name)
    trained = {path for path, p in net.named_parameters() if p.requires_grad}
    assert all(".lora_" in path for path in trained)
    fake = {path for path in trained if ".fake." in path}
    assert {path.replace(".fake.", ".default.") for path in fake} == trained - fake
    assert {id(p) for p in net.fake_score_parameters} == {id(net.get_parameter(path)) for path in fake}
    assert {layer.active_adapters[0] for layer in adapters(net)} == {"default"}


@pytest.mark.parametrize("name", NAMES)
def test_fresh_adapters_give_no_pull_to_the_bit(folder: Saved, name: str) -> None:
    """Fake and real scores are the same model, until guidance or a step makes a difference."""
    net = made(folder, name)
    assert not OBJECTIVE.loss(net, Frozen(net), noisy(net, GENERATOR_STEP)).loss.any()
    assert OBJECTIVE.loss(net, Frozen(net), noisy(net, GENERATOR_STEP, guidance=3.0)).loss.all()
    net = randomized(net)
    assert OBJECTIVE.loss(net, Frozen(net), noisy(net, GENERATOR_STEP)).loss.all()


def test_each_pass_has_its_own_adapters(folder: Saved) -> None:
    """The base has neither, and outside of a pass the generator's add."""
    net, plain = randomized(made(folder)), made(folder)
    x, c, t = batch()
    outputs = {"generator": net(x, c, t=t)[0], "original": plain(x, c, t=t)[0]}
    with fake_score(net):
        outputs["fake"] = net(x, c, t=t)[0]
        with net.base():
            assert torch.equal(net(x, c, t=t)[0], outputs["original"])
    assert torch.equal(net(x, c, t=t)[0], outputs["generator"])
    for layer in adapters(net):
        for part in (layer.lora_A, layer.lora_B):
            part["fake"], part["default"] = part["default"], part["fake"]
    assert torch.equal(net(x, c, t=t)[0], outputs["fake"])
    assert not torch.allclose(outputs["fake"], outputs["generator"], atol=1e-4)
    assert not torch.allclose(outputs["original"], outputs["generator"], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "objective"),
    [("sd3", OBJECTIVE), ("sdxl", OBJECTIVE), ("sd3", SID), ("sdxl", SID)],
    ids=["sd3", "sdxl", "sd3-sid", "sdxl-sid"],
)
def test_a_step_trains_one_adapter(folder: Saved, name: str, objective: DMD2) -> None:
    """The weights and moments of the other, and all frozen weights, keep their bits."""
    net = randomized(made(folder, name))
    optimizer = AdamW(lr=0.01, weight_decay=0.1, fake_lr=0.003)(net)
    for step, trains_fake in ((FAKE_STEP, True), (GENERATOR_STEP, False), (6, True)):
        weights = {path: p.detach().clone() for path, p in net.named_parameters()}
        moments = deepcopy({p: state for p, state in optimizer.state.items()})
        optimizer.zero_grad()
        assert gradients(net, step, objective).keys() == {path for path in weights if is_trained(path, trains_fake)}
        optimizer.step()
        for path, p in net.named_parameters():
            moved = is_trained(path, trains_fake)
            assert torch.equal(p, weights[path]) != moved, path
            if not moved and p in moments:
                assert all(torch.equal(value, moments[p][key]) for key, value in optimizer.state[p].items())


def is_trained(path: str, trains_fake: bool) -> bool:
    return ".lora_" in path and (".fake." in path) == trains_fake


def test_rates_are_of_each_adapter(folder: Saved) -> None:
    net = made(folder)
    generator, fake = AdamW(lr=0.01, fake_lr=0.003)(net).param_groups
    assert {*fake["params"]} == {*net.fake_score_parameters}
    assert {*generator["params"]} == {p for p in net.parameters() if p.requires_grad} - {*fake["params"]}
    assert (generator["lr"], fake["lr"], fake["ratio"]) == (0.01, 0.003, pytest.approx(0.3))
    (both,) = AdamW(lr=0.01)(net).param_groups
    assert len(both["params"]) == 2 * len(fake["params"])


def test_memory_is_of_two_adapters_and_the_gradients_of_one(folder: Saved) -> None:
    net = made(folder).to("meta")
    held = held_bytes(net, Train(steps=1, batch=4, ema=(), optimizer=AdamW(fake_lr=1e-3)))
    trained = sum(p.nbytes for p in net.parameters() if p.requires_grad)
    assert held.gradients == trained // 2 == sum(p.nbytes for p in net.fake_score_parameters)
    count = sum(p.requires_grad for p in net.parameters())
    assert held.optimizer == 2 * trained + 4 * count


@pytest.mark.parametrize(
    ("name", "setting", "step"),
    [
        *product(NAMES, ["dmd2"], [FAKE_STEP, GENERATOR_STEP]),
        *product(NAMES, ["sid"], [GENERATOR_STEP]),
        *product(["sd3"], ["tdm"], [FAKE_STEP, GENERATOR_STEP]),
    ],
)
@pytest.mark.parametrize("fake_rank", [4, 2], ids=["equal ranks", "unequal ranks"])
def test_checkpointing_changes_no_gradient(folder: Saved, name: str, setting: str, step: int, fake_rank: int) -> None:
    """Blocks are computed again while the generator's adapter is active, whichever was in their first pass, or none."""
    plain, lean = (
        gradients(randomized(with_rank(made(folder, name, checkpoint=c), fake_rank)), step, SETTINGS[setting])
        for c in (False, True)
    )
    assert plain.keys() == lean.keys()
    assert sum(bool(p.any()) for p in plain.values()) > len(plain) / 2
    assert all(torch.allclose(plain[path], lean[path], rtol=1e-4, atol=1e-6) for path in plain)


def test_a_teacher_with_dropout_is_computed_again_without(folder: Saved) -> None:
    """SiD differentiates the base model, which is evaluated, in a step in which the net has dropout."""
    plain, lean = (randomized(made(folder, checkpoint=c)) for c in (False, True))
    pulls: list[Tensor] = []
    for net in (plain, lean):
        net.train()
        for block in net.blocks:
            block.attn.to_out[1] = nn.Dropout(0.5)  # pyright: ignore[reportIndexIssue]
        x, c, t = batch()
        x.requires_grad_()
        v = BaseNet(net, "fp32")(x, c, t=t)[0]
        pulls += torch.autograd.grad(v.square().sum(), x)
    assert torch.equal(*pulls)


def with_rank(net: Dualized, rank: int) -> Dualized:
    """Cut the fake score's adapters to this rank."""
    for layer in adapters(net):
        a, b = layer.lora_A["fake"], layer.lora_B["fake"]
        a.weight = nn.Parameter(a.weight[:rank].detach())
        b.weight = nn.Parameter(b.weight[:, :rank].detach())
    return net


def test_the_exported_model_is_the_generator(folder: Saved) -> None:
    net = randomized(made(folder))
    x, c, t = batch()
    u = net(x, c, t=t)[0]
    before = net.single_head_model("u", merged=True).state_dict()
    assert not any("lora" in name for name in before)
    for p in net.fake_score_parameters:
        p.data.zero_()
    assert torch.equal(net(x, c, t=t)[0], u)
    assert all(map(torch.equal, before.values(), net.single_head_model("u", merged=True).state_dict().values()))


def test_a_head_w_alone_is_not_for_pipelines(folder: Saved) -> None:
    with pytest.raises(UserError, match="head 'w'"):
        built(folder("sd3"), Needs(heads=("v", "w")))
