"""`dumo.Flow` in a training loop of one's own: losses, gradients, samples and random numbers of anybody's networks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import dumo
from contract.case import members
from contract.own import Encoder, Numbers, Patches, Perceptron, Text, UNet
from dumo.autodiff import dual
from dumo.flow.adapter import Condition, NetAdapter
from dumo.flow.module import Flow
from dumo.flow.noisy_batch import draw, path_velocity
from dumo.flow.path import Linear, Trig
from dumo.flow.solver import Heun
from dumo.flow.times import Jumps
from dumo.nets import DiT
from dumo.objectives import DuMoAny, Objective
from dumo.runtime.random import noise
from dumo.testing.network import randomise
from dumo.types import Frozen, Needs, NoisyBatch, UserError
from tiers import tiered

ROWS, CLASSES = 8, 3
KINDS = [member.model_fields["kind"].default for member in members(Objective)]
QUICK = ("dumo", "pi_flow", "f2d2", "imm", "critic", "imf", "twinflow")  # knobs, groups, gauges, signed times, teachers
TWO = Needs(heads=("v", "u"))
LABELS = torch.arange(ROWS) % CLASSES


def points() -> Tensor:
    return torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def numbers(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    """A network of somebody's, its data, and the settings of its flow."""

    build: Callable[[], nn.Module]
    x: Tensor
    c: Condition = None
    settings: dict[str, Any] = field(default_factory=dict)
    exact: tuple[str, ...] = ("dual", "jvp")  # slopes that are exact on it; the first is taken

    def flow(self, objective: Any = "dumo", **more: Any) -> Flow:  # noqa: ANN401
        """Of a new network."""
        torch.manual_seed(0)
        return dumo.Flow(self.build(), objective, **{**self.settings, **more})


TOKENS = {"tokens": numbers(4, 5), "pooled": numbers(3)}
NO_TOKENS = {"tokens": torch.zeros(4, 5), "pooled": torch.zeros(3)}
OWN_CALL = {"call": lambda net, x, t, c: net(c, torch.cat([x, t[:, None]], 1)), "null": torch.zeros(3)}
CASES = {
    "points": Case(lambda: Perceptron(TWO, CLASSES), points(), LABELS, {"classes": CLASSES}),
    "unet": Case(lambda: UNet(CLASSES), images(), LABELS, {"classes": CLASSES}),
    "dropout": Case(lambda: UNet(CLASSES, dropout=0.3), images(), LABELS, {"classes": CLASSES}),
    "einops": Case(Patches, images()),
    "encoder": Case(Encoder, images(), exact=("dual",)),  # torch.func.jvp drops others
    "numbers": Case(Numbers, points(), numbers(3), {"null": torch.zeros(3)}),
    "own call": Case(lambda: Joined(), points(), numbers(3), OWN_CALL),
    "text": Case(Text, images(), TOKENS, {"null": NO_TOKENS}),
    "no null": Case(Text, images(), TOKENS),
    "steps of 1000": Case(lambda: Thousand(), points(), None, {"time_scale": 1000.0}),
    "in place": Case(lambda: UNet(activation="leaky"), images(), exact=("jvp",)),
    "dumo's own": Case(
        lambda: randomise(DiT(patch=4, width=16, depth=1, attention=1).build(TWO, (1, 8, 8), CLASSES)),
        images(),
        LABELS,
        {"classes": CLASSES},
    ),
}


class Thousand(nn.Module):
    """Of times from 0 to 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Perceptron(TWO)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return self.net(x, t / 1000)


class Joined(nn.Module):
    """Takes numbers first, and then points and times in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Numbers()

    def forward(self, numbers: Tensor, points_and_times: Tensor) -> tuple[Tensor, ...]:
        return self.net(points_and_times[:, :2], points_and_times[:, 2], numbers)


def adapter_and_batch(flow: Flow, x: Tensor, c: Condition = None) -> tuple[NetAdapter, NoisyBatch]:
    """The network as an objective calls it at the next step, and the noisy batch of that step."""
    b, _ = flow._noisy_batch(x, c, flow.step)
    return flow._adapter(c, flow._generator_key(flow.step)), b


def trained(flow: Flow, x: Tensor, c: Condition, steps: int) -> list[float]:
    """The losses of some steps with Adam."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(steps):
        loss = flow(x, c)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def conditions_of_samples(c: Condition) -> int | Condition:
    return ROWS if c is None or c is LABELS else c


# ------------------------------------------------------------------------------------------------- networks, objectives


@pytest.mark.parametrize("name", CASES)
def test_a_network_learns_and_samples_and_nothing_else_changes(name: str) -> None:
    case = CASES[name]
    flow = case.flow()
    before = torch.get_rng_state()
    modes = [part.training for part in flow.modules()]
    kept = copy.deepcopy(flow.net.state_dict())
    why = flow.check(case.x, case.c)
    assert why.startswith(case.exact[0])
    assert all(torch.equal(value, kept[key]) for key, value in flow.net.state_dict().items())

    flow(case.x, case.c).backward()
    grads = [p.grad for p in flow.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    for nfe in (1, 2):
        samples = flow.sample(conditions_of_samples(case.c), nfe=nfe)
        assert samples.shape == case.x.shape
        assert samples.dtype == torch.float32
        assert samples.isfinite().all()
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in flow.modules()] == modes


PAIRS = [(name, slope) for name in CASES for slope in ("dual", "jvp", "central")]


def in_double(c: Condition) -> Condition:
    """The same conditions, but for class numbers."""
    if isinstance(c, Tensor):
        return c.double() if c.is_floating_point() else c
    return None if c is None else {name: rows.double() for name, rows in c.items()}


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_derivative_is_that_of_float64(name: str, kind: str) -> None:
    case = CASES[name]
    flow = case.flow({"kind": "dumo", "slope": {"kind": kind}})
    if kind not in (*case.exact, "central"):
        with pytest.raises(UserError, match=f"not {kind}"):
            flow.check(case.x, case.c)
        return
    if name == "in place" and kind == "central":  # its kinks are nearer than h
        return
    flow.check(case.x, case.c)
    passes, b = adapter_and_batch(flow, case.x, case.c)
    slope = flow.objective.needs.slope
    assert slope is not None
    _, along = slope(passes, Frozen(passes), b.x_t, b.c, t=b.t)
    with torch.no_grad():
        found = along(b.v_t)

    exact_passes, b = adapter_and_batch(case.flow().double(), case.x.double(), in_double(case.c))
    h = 1e-5
    with torch.no_grad():
        ahead = exact_passes(b.x_t + h * b.v_t, b.c, t=b.t + h)
        behind = exact_passes(b.x_t - h * b.v_t, b.c, t=b.t - h)
    for du_dt, after, before in zip(found, ahead, behind, strict=True):
        true = (after - before) / (2 * h)
        assert true.norm() > 1e-3
        assert (du_dt - true).norm() <= (0.05 if kind == "central" else 1e-6) * true.norm()


def objective_of(kind: str) -> dict[str, Any]:
    return {"kind": kind, "size": 4} if kind == "drift" else {"kind": kind}


def flow_of(kind: str, classes: int, **settings: Any) -> Flow:  # noqa: ANN401
    """Of a perceptron that has what this objective needs."""
    trial = dumo.Flow(Perceptron(TWO), objective_of(kind), classes=classes)
    needs = trial.objective.needs
    path = Trig() if needs.formulas.paths == ("trig",) else Linear()
    torch.manual_seed(0)
    return dumo.Flow(Perceptron(needs, classes), objective_of(kind), classes=classes, path=path, **settings)


class AsksForTensors(Perceptron):
    def forward(
        self, x: Tensor, t: Tensor, r: Tensor | None = None, c: Tensor | None = None, **knobs: Tensor
    ) -> tuple[Tensor, ...]:
        assert torch.is_tensor(x)
        assert r is None or torch.is_tensor(r)
        return super().forward(x, t, r, c, **knobs)


@pytest.mark.parametrize("kind", ["lsd", "freeflow", "f2d2", "critic"])
def test_others_take_duals_whatever_the_slope(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_tensor", lambda value: isinstance(value, Tensor))  # as in a new process
    dual._patch_is_tensor.cache_clear()
    teacher = flow_of("flow_matching", 0)
    needs = flow_of(kind, 0).objective.needs
    settings = {"teacher": teacher} if needs.teacher.velocity == "must" else {}
    objective: dict[str, Any] = {"kind": kind}
    if needs.slope is not None:
        objective["slope"] = {"kind": "central"}
    assert dumo.Flow(AsksForTensors(needs), objective, **settings)(points()).isfinite()
    dual._patch_is_tensor.cache_clear()


@pytest.mark.parametrize("kind", tiered(KINDS, now=QUICK))
def test_every_objective_learns_and_samples(kind: str) -> None:
    teacher = flow_of("flow_matching", CLASSES)
    teacher(points(), LABELS)
    for classes, labels in ((0, None), (CLASSES, LABELS)):
        if kind == "self_e" and not classes:
            continue  # it needs conditions: test_refusals
        flow = flow_of(kind, classes)
        must = flow.objective.needs.teacher.velocity == "must"
        if flow.objective.needs.teacher.points:
            with pytest.raises(UserError, match=r"teacher\.pairs"):
                flow(points(), labels)
            continue
        if must:
            with pytest.raises(UserError, match="teacher="):
                flow(points(), labels)
        if must or (classes and flow.objective.needs.teacher.velocity != "no"):
            of_classes = teacher if classes else flow_of("flow_matching", 0)
            is_same_path = flow.path == teacher.path
            flow = flow_of(kind, classes, teacher=of_classes if is_same_path else path_velocity)
        for _ in range(2):
            loss = flow(points(), labels)
            loss.backward()
            assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
        readings = flow.objective.readings(nn.Identity())
        if readings.lowest == 1 or readings.only:
            some_nfe: tuple[int, ...] = (1,)
        else:
            some_nfe = (4,) if must else (1, 2)
        for nfe in some_nfe:
            assert flow.sample(4, nfe=nfe).isfinite().all()


def test_every_objective_is_tried() -> None:
    assert {*QUICK} <= {*KINDS}


@pytest.mark.parametrize("kind", ["dumo", "meanflow", "flow_matching"])
def test_the_gradient_is_that_of_the_bare_step(kind: str) -> None:
    flow = flow_of(kind, CLASSES)
    flow.check(points(), LABELS)
    net = copy.deepcopy(flow.net)

    def called(x: Tensor, c: Tensor, /, **times: Tensor) -> tuple[Tensor, ...]:
        return net(x, c=c, **times)

    bare = nn.Module()
    bare.forward = called  # pyright: ignore[reportAttributeAccessIssue]
    b = draw(flow.objective, Linear(), points(), LABELS, CLASSES, seed=0, step=0)
    loss = flow.objective.loss(bare, Frozen(bare), b).loss.mean()
    loss.backward()
    mine = flow(points(), LABELS)
    mine.backward()
    assert torch.equal(mine, loss)
    for (name, p), other in zip(flow.net.named_parameters(), net.parameters(), strict=True):
        assert p.grad is not None, name
        assert other.grad is not None, name
        assert torch.equal(p.grad, other.grad), name


@pytest.mark.slow
def test_a_network_of_diffusers_is_called_by_a_function() -> None:
    from diffusers import UNet2DModel  # slow to import

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=CLASSES + 1,
        attention_head_dim=4,
    )
    flow = dumo.Flow(net, classes=CLASSES, call=lambda net, x, t, c: net(x, t, c).sample.chunk(2, 1))
    flow(images(), LABELS).backward()
    assert flow.slope_report.startswith("dual: ")
    assert flow.sample(2).isfinite().all()


# ------------------------------------------------------------------------------------------------------- random numbers


@pytest.mark.usefixtures("two_ranks")
def test_ranks_and_steps_draw_other_rows_and_two_shards_are_the_batch() -> None:
    case = CASES["points"]
    whole = case.flow(shard=(0, 1))
    losses = [whole(case.x, case.c).item() for _ in range(2)]
    assert losses[0] != losses[1]

    parts = []
    for rank in range(2):
        rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        flow = case.flow(shard=(rank, 2))
        parts.append(flow(case.x[rows], LABELS[rows]).item())
    assert sum(parts) / 2 == pytest.approx(losses[0], rel=1e-6)

    same = [case.flow(shard=(rank, 2))(case.x, case.c).item() for rank in range(2)]
    assert same[0] != same[1]


def test_all_passes_of_a_step_meet_the_same_dropout_and_two_steps_do_not() -> None:
    flow = CASES["dropout"].flow()
    x, c = CASES["dropout"].x, CASES["dropout"].c
    masks: list[Tensor] = []

    def note(_: nn.Module, __: object, out: object) -> None:
        if isinstance(out, Tensor):
            masks.append(out.detach() == 0)

    flow.check(x, c)
    assert isinstance(flow.net, UNet)
    flow.net.dropout.register_forward_hook(note)
    passes, b = adapter_and_batch(flow, x, c)
    for _ in range(2):
        passes(b.x_t, b.c, t=b.t)
    assert masks[0].any()
    assert torch.equal(masks[0], masks[1])
    flow(x, c)
    flow.step = 5
    passes, b = adapter_and_batch(flow, x, c)
    passes(b.x_t, b.c, t=b.t)
    assert not torch.equal(masks[0], masks[-1])


def test_a_step_that_is_given_is_not_counted_and_evaluation_counts_none() -> None:
    case = CASES["points"]
    flow = case.flow()
    third = flow(case.x, case.c, step=3).item()
    assert flow.step == 0
    flow.eval()
    flow(case.x, case.c)
    assert flow.step == 0
    flow.train()
    losses = [flow(case.x, case.c).item() for _ in range(4)]
    assert flow.step == 4
    assert losses[3] == third


@pytest.mark.usefixtures("two_ranks")
def test_a_smaller_last_batch_keeps_the_rows_of_its_rank() -> None:
    case = CASES["points"]
    flow = case.flow(shard=(1, 2))
    flow(case.x, case.c)
    z = flow.make_draws(1, (2,), batch=2 * ROWS).z
    assert z is not None
    seen: list[Tensor] = []
    flow.net.register_forward_pre_hook(lambda _, given: seen.append(given[0]) if isinstance(given[0], Tensor) else None)
    x = torch.zeros(3, 2)
    flow(x, LABELS[:3])
    ratio = (seen[0] if len(seen[0]) == 3 else seen[-1]) / z[ROWS : ROWS + 3]
    assert torch.allclose(ratio[:, 0], ratio[:, 1])  # both are t


@pytest.mark.usefixtures("two_ranks")
def test_a_larger_batch_of_validation_changes_no_later_step() -> None:
    case = CASES["points"]
    larger, labels = case.x.repeat(2, 1), LABELS.repeat(2)
    alone, validated = case.flow(shard=(1, 2)), case.flow(shard=(1, 2))
    validated.eval()(larger, labels)
    first = validated.train()(case.x, case.c)
    validated.eval()(larger, labels, step=0)
    second = validated.train()(case.x, case.c)
    assert [first, second] == [alone(case.x, case.c) for _ in range(2)]


@pytest.mark.usefixtures("two_ranks")
def test_validation_at_a_step_draws_the_same_before_and_after_training() -> None:
    case = CASES["points"]
    flow = case.flow(shard=(1, 2)).eval()
    x, labels = case.x[:4], LABELS[:4]
    before = flow(x, labels, step=0)
    flow.train()(case.x, case.c)
    torch.testing.assert_close(flow.eval()(x, labels, step=0), before)


@pytest.mark.parametrize("name", ["points", "in place", "text"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_validation_without_gradients_may_come_first(name: str, mode: Callable[[], Any]) -> None:
    """It is what it is with gradients, and du/dt is taken as without it."""
    case = CASES[name]
    first, later = case.flow(), case.flow()
    first.eval()
    with mode():
        x = case.x.clone()
        before = first(x, case.c, step=3)
    first.train()(case.x, case.c)
    later(case.x, case.c)
    assert first.chosen_slope == later.chosen_slope
    later.eval()
    torch.testing.assert_close(before, later(case.x, case.c, step=3).detach())
    with mode():
        torch.testing.assert_close(later(x, case.c, step=3), before)


def test_a_condition_is_dropped_to_its_null() -> None:
    seen: list[Tensor] = []
    null = torch.full((3,), 7.0)

    def call(net: nn.Module, x: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        seen.append(c)
        return net(x, t, c)[:1]

    flow = CASES["numbers"].flow({"kind": "flow_matching", "drop": 0.5}, null=null, call=call)
    given = numbers(3)
    flow(points(), given)
    dropped = (seen[-1] == null).all(1)
    assert dropped.any()
    assert not dropped.all()
    assert torch.equal(seen[-1][~dropped], given[~dropped])


def test_what_has_no_null_stays_where_the_rest_is_dropped() -> None:
    seen: list[dict[str, Tensor]] = []

    def call(net: nn.Module, x: Tensor, t: Tensor, c: dict[str, Tensor]) -> tuple[Tensor, ...]:
        seen.append(c)
        return net(x, t, c["cond"] + c["size"])[:1]

    c = {"cond": numbers(3), "size": torch.arange(float(ROWS))[:, None]}
    null = {"cond": torch.full((3,), 7.0)}
    flow = CASES["numbers"].flow({"kind": "flow_matching", "drop": 0.5}, null=null, call=call)
    flow(points(), c)
    assert (seen[-1]["cond"] == 7).all(1).any()
    assert torch.equal(seen[-1]["size"], c["size"])
    guided = flow.sample(c, nfe=2, guidance=2.0)
    others = {"cond": c["cond"], "size": torch.cat([c["size"][:1] + 5, c["size"][1:]])}
    torch.testing.assert_close(flow.sample(others, nfe=2, guidance=2.0)[1:], guided[1:])


# --------------------------------------------------------------------------------------------------------- what is read


def test_a_sample_is_a_function_of_seed_number_and_condition() -> None:
    case = CASES["dropout"]
    flow = case.flow()
    trained(flow, case.x, case.c, 2)
    eight = flow.sample(8)
    torch.testing.assert_close(flow.sample(4), eight[:4])
    flow.eval()
    assert torch.equal(flow.sample(8), eight)
    torch.testing.assert_close(flow.sample([0, 1, 1])[:2], eight[:2])
    assert not torch.allclose(flow.sample([0, 0])[1], eight[1])
    assert not torch.allclose(flow.sample(8, seed=1), eight)
    torch.testing.assert_close(flow.sample(torch.tensor([0, 1, 2])), eight[:3])


def test_samples_of_a_table_are_of_their_rows() -> None:
    case = CASES["text"]
    flow = case.flow()
    trained(flow, case.x, case.c, 2)
    all_rows = flow.sample(TOKENS)
    torch.testing.assert_close(flow.sample({name: rows[:2] for name, rows in TOKENS.items()}), all_rows[:2])


def test_velocity_and_jump_are_those_of_the_heads_in_evaluation() -> None:
    flow = CASES["points"].flow()
    x, c, t = points(), LABELS, torch.linspace(0.1, 1, ROWS)
    v, u = flow.net(x, t, c=c)
    assert torch.equal(flow.velocity(x, t, c), v)
    torch.testing.assert_close(flow.jump(x, t, c=c), x - t[:, None] * u)
    assert torch.equal(flow.jump(x, t, torch.zeros(ROWS), c), flow.jump(x, t, 0, c))
    assert torch.equal(flow.velocity(x, 0.5, c), flow.velocity(x, torch.tensor(0.5), c))
    assert not flow.velocity(x, t, c).requires_grad


@pytest.mark.parametrize("kind", ["dumo", "meanflow"])
@pytest.mark.parametrize("sd", [1.0, 0.5])
def test_a_jump_to_the_data_is_in_units_of_the_data(kind: str, sd: float) -> None:
    flow = flow_of(kind, CLASSES)
    flow.path = Linear(sd=sd)
    samples = flow.sample(LABELS, nfe=1, shape=(2,))
    z = noise(0, range(ROWS), 0, (2,))
    torch.testing.assert_close(flow.jump(z, 1.0, c=LABELS), samples)
    torch.testing.assert_close(flow.jump(z, torch.ones(ROWS), torch.zeros(ROWS), LABELS), samples)


def test_a_jump_goes_up_where_that_is_taught() -> None:
    assert flow_of("f2d2", 0).jump(points(), 0.3, 0.7).isfinite().all()


def test_what_is_read_drops_nothing() -> None:
    case = CASES["dropout"]
    flow = case.flow()
    velocity = flow.velocity(case.x, 0.5, LABELS)
    assert flow.net.training
    assert torch.equal(flow.eval().velocity(case.x, 0.5, LABELS), velocity)


def test_times_reach_the_network_on_its_scale() -> None:
    flow = CASES["steps of 1000"].flow()
    assert isinstance(flow.net, Thousand)
    plain = dumo.Flow(flow.net.net)
    torch.testing.assert_close(flow.velocity(points(), 0.7), plain.velocity(points(), 0.7))


def test_guidance_leads_away_from_the_null() -> None:
    flow = flow_of("flow_matching", CLASSES)
    flow(points(), LABELS)
    plain = flow.sample([1, 1], nfe=1)
    guided = flow.sample([1, 1], nfe=1, guidance=3.0)
    none = flow.sample([1, 1], nfe=1, guidance=1e-6)
    torch.testing.assert_close(guided, none + 3 * (plain - none), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(guided, plain, atol=1e-3)


def test_what_was_never_taught_is_refused() -> None:
    one_pass = flow_of("tbsm", 0)
    with pytest.raises(UserError, match="nfe = 2"):
        one_pass.sample(4, nfe=2, shape=(2,))
    for t in (0.5, torch.tensor(0.5)):
        with pytest.raises(UserError, match="tbsm"):
            one_pass.jump(points(), t)
    assert one_pass.jump(points(), 1.0).isfinite().all()
    to_data = dumo.Flow(Perceptron(DuMoAny().needs), DuMoAny(times=Jumps(data_ratio=1)))
    with pytest.raises(UserError, match="'hop' with nfe = 2"):
        to_data.sample(4, nfe=2, shape=(2,))


class CastsTime(nn.Module):
    """Takes times, which are in float32 also beside shorter data, in the type of x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return self.layers(torch.cat([x, t[:, None].to(x.dtype)], 1)).chunk(2, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_type_are_trained_and_read(dtype: torch.dtype) -> None:
    flow = dumo.Flow(CastsTime().to(dtype))
    flow(points().to(dtype)).backward()
    exact = dumo.Flow(CastsTime())
    exact.load_state_dict(flow.state_dict())
    samples = flow.sample(4, nfe=2)
    assert samples.dtype == torch.float32
    torch.testing.assert_close(samples, exact.sample(4, nfe=2), rtol=0.05, atol=0.05)
    assert flow.velocity(points(), 0.5).dtype == torch.float32
    torch.testing.assert_close(flow.jump(points(), 0.5), exact.jump(points(), 0.5), rtol=0.05, atol=0.05)


def test_samples_are_in_the_precision_of_the_caller_or_of_the_flow() -> None:
    flow = CASES["points"].flow(precision="bf16")
    flow(points(), LABELS)
    low = flow.sample(4)
    flow.precision = None
    plain = flow.sample(4)
    assert not torch.equal(plain, low)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.sample(4), low)
    flow.precision = "fp32"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.sample(4), plain)


def test_a_solver_may_be_named() -> None:
    flow = CASES["points"].flow()
    flow(points(), LABELS)
    assert torch.equal(flow.sample(4, nfe=2, solver="heun"), flow.sample(4, nfe=2, solver=Heun()))


def test_an_average_is_read_and_the_flow_stays() -> None:
    case = CASES["points"]
    flow = case.flow()
    average = AveragedModel(flow.net)
    whole = AveragedModel(flow)
    trained(flow, case.x, case.c, 2)
    before = flow.sample(4)
    old = flow.with_net(average).sample(4)
    assert not torch.allclose(old, before)
    torch.testing.assert_close(flow.with_net(whole).sample(4), old)
    assert torch.equal(flow.sample(4), before)
    assert flow.net is not average


def test_an_average_as_theta_drops_nothing() -> None:
    """An AveragedModel begins in training mode; a network that is its own theta^- stays in it."""
    case = CASES["dropout"]
    losses: list[Tensor] = []
    for average in (AveragedModel(case.flow().net), AveragedModel(case.flow().net).eval()):
        flow = case.flow(ref=average)
        losses.append(flow(case.x, case.c))
        assert not any(part.training for part in average.modules())
        assert flow.net.training
    assert torch.equal(*losses)

    plain = case.flow()
    of_itself = dumo.Flow(plain.net, ref=plain.net, **case.settings)
    loss = of_itself(case.x, case.c)
    assert of_itself.net.training
    assert torch.equal(loss, plain(case.x, case.c))
    assert not torch.equal(loss, losses[0])


@pytest.mark.slow
def test_a_compiled_network_is_the_same() -> None:
    case = CASES["points"]
    plain = case.flow()
    flow = case.flow()
    flow.net = torch.compile(flow.net, backend="aot_eager")  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(2):
        torch.testing.assert_close(flow(case.x, case.c), plain(case.x, case.c))
    torch.testing.assert_close(flow.sample(4), plain.sample(4))


# ------------------------------------------------------------------------------------------------------------- teachers


def test_a_pupil_learns_its_teachers_velocity() -> None:
    case = CASES["points"]
    teacher = case.flow()
    trained(teacher, case.x, case.c, 2)
    pupil = flow_of("flow_matching", CLASSES, teacher=teacher)
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in pupil.parameters()}
    passes, b = adapter_and_batch(pupil, points(), LABELS)
    assert passes.net is pupil.net
    torch.testing.assert_close(b.v_t, teacher.velocity(b.x_t, b.t, b.c))


def test_a_teacher_gets_the_pupils_rows_of_a_table() -> None:
    case = CASES["numbers"]
    teacher = case.flow()
    pupil = case.flow(teacher=teacher)
    _, b = adapter_and_batch(pupil, case.x, case.c)
    given = torch.where((b.c < 0)[:, None], torch.zeros(3), numbers(3))
    torch.testing.assert_close(b.v_t, teacher.velocity(b.x_t, b.t, given))


# ------------------------------------------------------------------------------------------------------ what is resumed


@pytest.mark.parametrize("name", ["dropout", "encoder"])
@pytest.mark.parametrize("file", ["flow.pt", "flow.safetensors"])
def test_a_resumed_run_goes_on_to_the_bit(name: str, file: str, tmp_path: Path) -> None:
    case = CASES[name]
    flow = case.flow(seed=5)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)

    def step(flow: Flow, optimizer: torch.optim.Optimizer) -> float:
        loss = flow(case.x, case.c)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    step(flow, optimizer)
    if file.endswith("pt"):
        torch.save(flow.state_dict(), tmp_path / file)
    else:
        save_file(flow.state_dict(), tmp_path / file)
    kept = copy.deepcopy(optimizer.state_dict())
    through = [step(flow, optimizer) for _ in range(2)]

    again = case.flow()
    for p in again.parameters():
        nn.init.zeros_(p)
    fresh = torch.optim.Adam(again.parameters(), lr=1e-2)
    again.load_state_dict(torch.load(tmp_path / file) if file.endswith("pt") else load_file(tmp_path / file))
    fresh.load_state_dict(kept)
    assert again.seed == 5
    assert again.step == 1
    assert again.shape == case.x.shape[1:]
    assert [step(again, fresh) for _ in range(2)] == through
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), again.parameters(), strict=True))
    assert torch.equal(flow.sample(2), again.sample(2))


def test_a_state_has_one_size_and_keeps_the_chosen_slope() -> None:
    case = CASES["in place"]
    flow = case.flow()
    fresh = flow.state_dict()["_extra_state"]
    flow(case.x, case.c)
    kept = flow.state_dict()["_extra_state"]
    assert fresh.shape == kept.shape
    other = case.flow()
    other.set_extra_state(kept)
    assert other.chosen_slope == flow.chosen_slope
    assert other.get_extra_state().tolist() == kept.tolist()
