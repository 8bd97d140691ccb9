"""The bench of a training step: every slope has a row, errors are right, a refusal is a row."""

import pytest
import torch
from torch import nn

from contract.case import members
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.flow.noisy_batch import draw
from dumo.flow.slope import Along, JvpSlope, Slope
from dumo.lab import bench
from dumo.lab.bench import PlainStep, StepRow, slope_error
from dumo.run.random_net import random_net
from dumo.types import Cond, Frozen, Heads, Net, Sample, Time, UserError, frozen
from e2e.shell import call

CPU = torch.device("cpu")
TINY = ("net.width=16", "net.depth=1", "train.batch=8")
KINDS = [slope.model_fields["kind"].default for slope in members(Slope)]
GUIDED = "objective.guide.zeta=0.5"


def tiny(name: str = "digits", *more: str) -> Run:
    """A recipe made small."""
    return load(name, [*TINY, *more])


def built(run: Run) -> nn.Module:
    """Its net for its data."""
    return random_net(run, CPU)


def measured(run: Run, **more: object) -> dict[tuple[str, str], dict[str, object]]:
    """The rows of a bench of one round, by slope and precision."""
    report = bench.measure(run, rounds=1, device="cpu", **more)  # pyright: ignore[reportArgumentType]
    return {(row["slope"], row["precision"]): row for row in report["rows"]}


@pytest.mark.nightly
def test_every_slope_has_a_row_in_every_precision_with_the_yardstick() -> None:
    rows = measured(tiny("digits", GUIDED), precisions=("fp32", "bf16"))
    assert list(rows) == [(slope, precision) for precision in ("fp32", "bf16") for slope in ("none", *KINDS)]
    for (slope, precision), row in rows.items():
        assert row["images_per_second"] == pytest.approx(8 / (row["milliseconds"] / 1000))
        assert row["bytes"] > 0
        assert row["bytes_before"] > 0
        assert row["units_low"] <= row["units_timed"] <= row["units_high"]
        assert row["share_of_peak"] is None
        if slope == "none":
            assert row["units_timed"] == 3
            assert row["error"] is None
            assert 2.9 < row["units_counted"] < 3
        else:
            assert row["error"] < (2e-2 if precision == "bf16" else 1e-3) or slope == "central"
    assert rows["central", "fp32"]["refused"] is None
    assert "needs precision fp32" in str(rows["central", "bf16"]["refused"])
    assert rows["central", "bf16"]["error"] > 0.1 > 1e-3 > rows["central", "fp32"]["error"]
    assert rows["central", "bf16"]["units_counted"] > 5.5
    for precision in ("fp32", "bf16"):
        assert rows["central", precision]["bytes_over_central"] == 1
        assert rows["jvp", precision]["error"] == pytest.approx(rows["dual", precision]["error"], rel=0.5, abs=1e-6)


def test_a_difference_over_too_fast_a_time_is_measured_and_says_why() -> None:
    wide = measured(tiny("digits", "net.time_scale=1000"), slopes=("central",))["central", "fp32"]
    assert "time_scale" in str(wide["refused"])
    assert wide["error"] > 0.1


@pytest.mark.nightly
@pytest.mark.parametrize(("more", "way"), [((GUIDED,), "deferred"), (("train.ref=0.999",), "separate")])
def test_the_way_of_a_dual_is_shown(more: tuple[str, ...], way: str) -> None:
    assert measured(tiny("digits", *more), slopes=("dual",))["dual", "fp32"]["strategy"] == way


@pytest.mark.nightly
def test_what_cannot_be_run_is_a_row_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lame(JvpSlope):
        def __call__(self, *args: object, **rest: object) -> tuple[Heads, Along]:
            raise UserError("no rule for this\nin two lines")

    assert list(measured(tiny("digits-flow-matching"))) == [("none", "fp32")]  # an objective without a slope
    monkeypatch.setitem(bench.SLOPES, "jvp", Lame)
    rows = measured(tiny(), slopes=("jvp", "dual"))
    assert rows["jvp", "fp32"]["refused"] == "no rule for this"
    assert rows["jvp", "fp32"]["units_timed"] is None
    assert rows["jvp", "fp32"]["bytes"] is None
    assert rows["dual", "fp32"]["units_timed"] > 0


@pytest.mark.nightly
def test_blocks_are_compiled_where_there_are_some_and_a_loss_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As training does it."""
    setting = bench.prepare(tiny(), CPU, "blocks")
    assert all(block._compiled_call_impl is not None for block in setting.net.blocks)  # pyright: ignore
    with pytest.raises(UserError, match="loss"):
        bench.prepare(tiny("moons"), CPU, "blocks")
    given: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: given.append(how) or f)
    assert measured(tiny("digits", GUIDED), slopes=("dual",), compile="loss")["dual", "fp32"]["units_timed"] > 0
    assert given == [{"fullgraph": True, "dynamic": False}] * 2


class Skewed(JvpSlope):
    """A tenth too long."""

    def __call__(self, net: Net, ref: Frozen, x: Sample, c: Cond, *, t: Time, **rest: object) -> tuple[Heads, Along]:
        heads, along = super().__call__(net, ref, x, c, t=t, **rest)  # pyright: ignore[reportArgumentType]
        return heads, lambda w: tuple(1.1 * slope for slope in along(w))


@pytest.mark.parametrize("name", ["digits-guided", "moons-meanflow"])
def test_a_slope_that_is_a_tenth_off_is_seen_to_be(name: str) -> None:
    run = tiny(name)
    module = built(run)
    x = torch.randn(8, *run.data.shape, generator=torch.Generator().manual_seed(0))
    c = torch.zeros(8, dtype=torch.long)
    for slope, error in ((JvpSlope(), 0), (Skewed(), 0.1)):
        objective = run.objective.model_copy(update={"slope": slope})
        b = draw(objective, run.path, x, c, c, seed=0, step=0)
        assert slope_error(module, frozen(module), objective, b) == pytest.approx(error, abs=1e-5)
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_the_yardstick_teaches_every_head_the_velocity() -> None:
    class Ones(nn.Module):
        def forward(self, x: Sample, c: Cond, /, *, t: Time) -> Heads:
            return x * 0 + 1, x * 0 + 3

    x, c = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
    plain = PlainStep(of=tiny("moons").objective)
    b = draw(plain, tiny("moons").path, x, c, c, seed=0, step=0)  # pyright: ignore[reportArgumentType]
    loss = plain.loss(Ones(), frozen(Ones()), b).loss
    assert torch.allclose(loss, (1 - b.v_t).square().mean(1) + (3 - b.v_t).square().mean(1))


def test_a_slow_round_slows_all_and_changes_no_ratio() -> None:
    slow = torch.tensor([1.0, 7.0, 1.0, 2.0, 1.0])
    seconds = torch.stack([3 * slow, 5 * slow, 4 * torch.ones(5)])
    tried = [
        (StepRow(name, "fp32", "none", bytes=size, units_counted=2.9), print)
        for name, size in (("none", 10), ("central", 20), ("dual", 25))
    ]
    plain, central, dual = bench.with_times(tried, seconds, batch=6, seconds_at_peak=0.5)
    assert (plain.units_low, plain.units_timed, plain.units_high) == (3, 3, 3)
    assert (central.units_low, central.units_timed, central.units_high) == pytest.approx((5, 5, 5))
    assert (dual.units_low, dual.units_timed, dual.units_high) == (2, 4, 4)
    assert (dual.milliseconds, dual.images_per_second) == (4000, 1.5)
    assert (plain.bytes_over_central, central.bytes_over_central, dual.bytes_over_central) == (0.5, 1, 1.25)
    assert dual.share_of_peak == 2.9 * 0.5 / 4
    tried = [
        (StepRow(name, precision, "none", units_counted=units), print)
        for precision, units in (("fp32", 3.9), ("bf16", 2.9))
        for name in ("none", "dual")
    ]
    seconds = torch.tensor([[4.0], [5.0], [1.5], [5.0]])  # in fp32 blocks are computed twice: four passes
    assert [row.units_timed for row in bench.with_times(tried, seconds, 1, None)] == [4, 5, 3, 10]


def test_no_weight_is_zero_and_all_are_the_same_at_every_call() -> None:
    rng = torch.random.get_rng_state()
    module, again = (built(tiny()) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert all(p.all() for p in module.parameters())


@pytest.mark.nightly
def test_the_command_prints_a_table() -> None:
    words = ("bench", "digits", *TINY, GUIDED, "--rounds", 1, "--device", "cpu", "--precision", "bf16")
    made = call(*words, "--slope", "central,none")
    assert made.code == 0
    assert "F by time" in made.out
    assert "central in bf16: slope 'central' needs" in made.out
    assert "8 samples of 1 x 8 x 8" in made.out
