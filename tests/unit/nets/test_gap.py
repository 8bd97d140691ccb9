"""A second time for pretrained nets: the old numbers at any r at the start, an exact step, what is trained and kept."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Diffusion, Linear
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.flow.times import Jumps, Pair
from dumo.io.deferred import load_parameters
from dumo.nets import Pretrained, lowpass
from dumo.nets.dualized import Dualized, time_embedder_paths
from dumo.nets.gap import fit_fixed_times
from dumo.nets.lora import Lora
from dumo.objectives import FACM, LSD, RCGM, DuMoAny, MeanFlow, Several, SplitMeanFlow
from dumo.types import Frozen, Needs, Objective
from tiers import tiered
from transformers_saved import CLASSES, IMAGES, NO_LOWPASS, NOISE, SHAPE, Saved, asked, batch, built

pytestmark = pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")  # diffusers', of its Chroma
NAMES = [name for name in (*IMAGES, *NOISE, "wan") if not name.startswith("chroma")]
QUICK = ("sd3", "flux-guided", "z-image-lengths", "sd1")
SOME = tiered(NAMES, now=QUICK)
TR = Needs(inputs=("t", "r"), heads=("u",))
LORA = Lora(rank=4)


def cut(spec: Pretrained, name: str) -> Pretrained:
    """With a low-pass, where there is one."""
    return spec if name in NO_LOWPASS else spec.model_copy(update={"lowpass": 10.0})


def moved(net: Dualized) -> Dualized:
    """A net whose embedding of the gap says something."""
    g = torch.Generator().manual_seed(0)
    assert net.gap is not None
    with torch.no_grad():
        for p in net.gap.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return net


def gradient(net: Dualized, objective: Objective) -> dict[str, Tensor]:
    """Of every parameter that has one, by a step."""
    x, c, _ = batch(4)
    path = Diffusion(schedule=net.diffusion.schedule) if net.diffusion else Linear()
    record = draw(objective, path, x, c, torch.full_like(c, CLASSES), seed=0, step=0)
    objective.loss(net.train(), Frozen(net), record).loss.mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_any_r_begins_as_the_model(folder: Saved, name: str) -> None:
    """u(x, t, r) = v(x, t) to the bit; and no longer, once the gap is embedded."""
    x, c, t = batch()
    (old,) = built(folder(name), Needs(heads=("u",)))(x, c, t=t)
    net = built(folder(name), TR)
    for r in (t, 0 * t, t / 3, 1 + 0 * t):
        assert torch.equal(net(x, c, t=t, r=r)[0], old)
    moved(net)
    assert not torch.allclose(net(x, c, t=t, r=t / 3)[0], net(x, c, t=t, r=0 * t)[0], atol=1e-4)


@pytest.mark.parametrize("needs", [TR, Needs(heads=("u",))], ids=["two times", "one time"])
@pytest.mark.parametrize("name", ["sd3", "z-image", "sd1"])
def test_negative_times_begin_as_positive_ones(folder: Saved, name: str, needs: Needs) -> None:
    """u(x, -t, -r) = u(x, t, r) to the bit; with the trained vector it differs, and u(x, t, r) does not change."""
    x, c, t = batch()
    net = built(cut(folder(name), name), replace(needs, signed=True))
    if net.gap is not None:
        moved(net)
    times = {"t": t, "r": t / 2} if net.gap is not None else {"t": t}
    negative_times = {input_name: -time for input_name, time in times.items()}
    assert net.negative_time is not None
    with torch.no_grad():
        (at,), (below,) = net(x, c, **times), net(x, c, **negative_times)
        assert torch.equal(at, below)
        net.negative_time.fill_(0.1)
        assert torch.equal(net(x, c, **times)[0], at)
        assert not torch.allclose(net(x, c, **negative_times)[0], at, rtol=1e-3)


def test_facm_begins_at_the_velocity_of_its_teacher(folder: Saved) -> None:
    """At -t the model has its velocity at t, so the anchor is at rest. With other data the trained vector learns.

    The gradient by the slope that rides is that by forward mode.
    """
    x, c, _ = batch(4)
    facm = FACM(guide=Guide(), drop=0.0, slope=DualSlope())
    net = built(cut(folder("sd3"), "sd3"), facm.needs, lora=LORA)
    frozen_net = Frozen(copy.deepcopy(net))

    def teacher(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return frozen_net(x, c, t=t)[0]

    record = draw(facm, Linear(), x, c, torch.full_like(c, CLASSES), seed=0, step=0)
    taught = replace(record, v_t=teacher(record.x_t, record.t, record.c))
    assert not facm.loss(net.train(), Frozen(net), taught).parts["v"].any()

    dual = gradient(net, facm)
    assert dual["negative_time"].any()
    net.zero_grad()
    jvp = gradient(net, FACM(guide=Guide(), drop=0.0, slope=JvpSlope()))
    assert dual.keys() == jvp.keys()
    assert all(torch.allclose(dual[name], jvp[name], rtol=1e-3, atol=1e-5) for name in dual)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_one_guided_step_is_exact(folder: Saved, name: str) -> None:
    """MeanFlow's gradient by the slope that rides is that by forward mode, and every parameter has one."""
    spec, times = cut(folder(name), name), Pair(velocity_ratio=0.5)
    nets = [moved(built(spec, TR)) for _ in range(2)]
    slopes = (DualSlope(), JvpSlope())
    objectives = (MeanFlow(slope=slope, guide=Guide(zeta=0.55), times=times) for slope in slopes)
    dual, jvp = (gradient(net, objective) for net, objective in zip(nets, objectives, strict=True))
    assert dual.keys() == jvp.keys() == {n for n, p in nets[0].named_parameters() if p.requires_grad}
    size = torch.stack([g.norm() for g in jvp.values()]).norm()
    assert torch.stack([(dual[n] - g).norm() for n, g in jvp.items()]).norm() / size < 1e-5


@pytest.mark.parametrize("objective", [DuMoAny(), LSD(), RCGM(), Several(), SplitMeanFlow()])
def test_objectives_of_two_times_train_it(folder: Saved, objective: Objective) -> None:
    net = built(cut(folder("sd3"), "sd3"), objective.needs)
    found = gradient(net, objective)
    assert found["gap.layers.linear_2.weight"].any()
    (x, c, t), endpoint = batch(), objective.readings(net).endpoint
    assert endpoint is not None
    assert endpoint(x, t, c).shape == x.shape


def test_the_slope_has_the_gap(folder: Saved) -> None:
    """With r at rest the gap moves as t does: du/dt is that of differences, and another one where r goes along."""
    net = moved(built(cut(folder("sd3"), "sd3"), TR))
    (x, c, t), h = batch(), 1e-3
    w = torch.ones_like(x)
    _, along = DualSlope()(net, Frozen(net), x, c, t=t, r=t / 2, direction=w)

    def difference(rate: float) -> Tensor:
        behind, ahead = (net(x + s * w, c, t=t + s, r=t / 2 + rate * s)[0] for s in (-h, h))
        return (ahead - behind) / (2 * h)

    (slope,) = along(w)
    assert (slope - difference(0)).norm() / slope.norm() < 1e-3
    assert (slope - difference(1)).norm() / slope.norm() > 1e-1


@pytest.mark.parametrize("name", ["sd3", "z-image", "sd1"])
def test_adapters_rest_for_the_base_and_the_gap_is_trained_in_full(folder: Saved, name: str) -> None:
    x, c, t = batch()
    net = built(cut(folder(name), name), TR, lora=LORA)
    (old,) = built(folder(name), Needs(heads=("u",)))(x, c, t=t)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {f"gap.{n}" for n, _ in moved(net).gap.named_parameters()} <= trained  # pyright: ignore[reportOptionalMemberAccess]
    now = net(x, c, t=t, r=t / 2)[0]
    with net.base():
        assert torch.equal(net(x, c, t=t, r=t / 2)[0], old)
    assert torch.equal(net(x, c, t=t, r=t / 2)[0], now)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == trained


@pytest.mark.nightly
def test_quick_waves_of_the_gap_are_cut_and_its_first_layer_is_that_of_t(folder: Saved) -> None:
    """Also once the embedder was refitted."""
    net = built(cut(folder("sd3"), "sd3"), TR)
    assert net.gap is not None
    own = net.model.get_submodule("time_text_embed.timestep_embedder")
    net.refit()
    (_, mine, last), (_, theirs, _) = lowpass.linear_layers(net.gap.layers), lowpass.linear_layers(own)
    assert isinstance(mine, lowpass.MaskedLinear)
    assert torch.equal(mine.weight, theirs.weight)
    assert mine.weight is not theirs.weight
    assert not last.weight.any()
    assert torch.equal(mine.keep, lowpass.frequencies(256, 1000.0) <= 10)
    moved(net)
    s = torch.tensor([0.5], requires_grad=True)
    spread = torch.autograd.functional.jacobian(lambda s: net.gap(s)[0], s).norm()  # pyright: ignore[reportOptionalCall]
    whole = copy.deepcopy(net.gap)
    quick = lowpass.linear_layers(whole.layers)[1]
    assert isinstance(quick, lowpass.MaskedLinear)
    quick.keep.fill_(True)
    assert torch.autograd.functional.jacobian(lambda s: whole(s)[0], s).norm() > 10 * spread


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"lora": LORA}, {"weights": "drawn"}])
def test_it_is_built_of_a_config_and_one_by_one(folder: Saved, fields: dict[str, object]) -> None:
    """The names and bits of a net that is built as it stands, also if its time embedder is fitted before the rest."""
    spec = cut(folder("sd3"), "sd3").model_copy(update=fields)
    with torch.device("meta"):
        outline = spec.build(TR, SHAPE, CLASSES)
    torch.manual_seed(1)
    whole, end = spec.build(TR, SHAPE, CLASSES), torch.rand(1)
    torch.manual_seed(1)
    net, loaders = spec.build_deferred(TR, SHAPE, CLASSES)
    assert torch.equal(torch.rand(1), end)
    assert all(p.is_meta for p in outline.parameters())
    assert shapes(outline) == shapes(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowpass, "STEPS", 2)
        whole.refit()
        net.refit()
    there = load_parameters(net, loaders).state_dict()
    assert all(torch.equal(x, there[key]) for key, x in whole.state_dict().items())


def shapes(net: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    return {name: (p.shape, p.requires_grad) for name, p in net.named_parameters()}


def test_a_time_that_is_missing_is_named(folder: Saved) -> None:
    x, c, t = batch()
    with pytest.raises(TypeError, match="inputs t, r, got t"):
        built(folder("sd3"), TR)(x, c, t=t)


def test_rows_of_anyflow_are_a_law_that_is_there() -> None:
    """Half have r = t, a quarter r = 0, and r of a quarter is free."""
    t, r = Jumps(velocity_ratio=0.5, data_ratio=0.5)(400, torch.Generator().manual_seed(0))
    assert ((r == t).sum(), (r == 0).sum()) == (200, 100)
    free = (r / t)[(r < t) & (r > 0)]
    assert len(free) == 100
    assert abs(free.mean() - 0.5) < 0.1
    assert MeanFlow.model_validate({"times": {"kind": "jumps"}}).times == Jumps()


# --- for a list of passes in the one embedder of the stock model

PASSES = torch.tensor([1.0, 0.7, 0.45]), torch.tensor([0.7, 0.0, 0.2])


def apart(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize(
    "name", tiered([name for name in NAMES if name in IMAGES], ci=[name for name in QUICK if name in IMAGES])
)
def test_the_stock_model_has_both_times_of_fixed_passes(folder: Saved, name: str, lora: Lora | None) -> None:
    """Asked as its pipeline asks; without the correction it is another model, and so it is at other times."""
    net = moved(built(cut(folder(name), name), TR, lora=lora))
    x, c, _ = batch(2)
    found = net.fit_fixed_times(*PASSES, net.model_times(1000 * PASSES[0]))
    model = net.single_head_model("u", merged=lora is not None, time_layer=found.layer)
    for t, r in zip(*(s[:, None].expand(3, 2) for s in PASSES), strict=True):
        wanted = net(x, c, t=t, r=r)[0]
        assert apart(asked(name, model, x, c, t), wanted) < 1e-5
        assert apart(asked(name, net.single_head_model("u", merged=lora is not None), x, c, t), wanted) > 1e-4
        assert apart(asked(name, model, x, c, t), net(x, c, t=t, r=r + 0.15)[0]) > 1e-4
    layer = lowpass.linear_layers(net.model.get_submodule(time_embedder_paths(net.model, net.family)[0]))[2]
    assert layer.bias is None or torch.equal(found.layer.bias, layer.bias)
    assert torch.linalg.matrix_rank((found.layer.weight - layer.weight).detach(), rtol=1e-4) <= found.passes == 3


@pytest.mark.parametrize("name", ["sd3", "z-image"])
def test_a_velocity_has_no_gap_at_any_time(folder: Saved, name: str) -> None:
    net, (x, c, t) = moved(built(folder(name), TR)), batch()
    assert (
        apart(
            asked(name, net.single_head_model("u", time_layer=net.velocity_time_layer()), x, c, t),
            net(x, c, t=t, r=t)[0],
        )
        < 1e-5
    )


def embedders(*, bias: bool = True) -> tuple[nn.Sequential, Tensor]:
    """One of 64 numbers, and the waves of many times."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(32, 64, bias), nn.SiLU(), nn.Linear(64, 24, bias))
    return one.requires_grad_(False), lowpass.waves(torch.linspace(0.1, 1, 10), lowpass.frequencies(32, 10.0).float())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_is_as_exact_as_its_type(dtype: torch.dtype, bias: bool) -> None:
    """What rounds the first layer is made up for, and what is said of the error is so."""
    one, x = embedders(bias=bias)
    some, g = x[::3], torch.Generator().manual_seed(1)
    wanted = one(some).double() + torch.randn(4, 24, generator=g).double()
    found = fit_fixed_times(one, some, wanted, dtype)
    new = copy.deepcopy(one)
    new[2] = found.layer
    for kind, said in ((dtype, found.error), (torch.bfloat16, found.half)):
        made = copy.deepcopy(new).to(kind).double()(some.double())
        assert abs(float(((made - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) / said - 1) < 1e-6
    assert found.error < (1e-6 if dtype == torch.float32 else 5e-3)
    assert found.passes == 4
    h = one[:2](some).double() if dtype == torch.float32 else one[:2].bfloat16().double()(some.double())
    assert abs(found.condition / float(torch.linalg.cond(h)) - 1) < 1e-3
    assert f"condition number {found.condition:.3g}" in str(found)
