"""The benches of a step, of sampling and of data: every slope has a row, errors are right, a refusal is a row."""

import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from contract.case import members
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.data.album import MAX_THREADS
from dumo.flow.draw import draw
from dumo.flow.slope import Along, JvpSlope, Slope
from dumo.flow.solver import Euler, Heun, Hop, Restart
from dumo.lab import data_bench, random_net, sample_bench, step_bench
from dumo.lab.step_bench import PlainStep, StepRow, slope_error
from dumo.runtime.progress import no_bar
from dumo.training.prefetch import BATCHES_AHEAD
from dumo.types import Cond, Frozen, Heads, Net, Sample, Time, UserError, frozen
from e2e.shell import call, refused, sets
from unit.data.animals import as_folder

CPU = torch.device("cpu")
TINY = ("net.width=16", "net.depth=1", "train.batch=8")
KINDS = [slope.model_fields["kind"].default for slope in members(Slope)]
GUIDED = "objective.guide.zeta=0.5"


def tiny(name: str = "digits", *more: str) -> Run:
    """A recipe made small."""
    return load(name, [*TINY, *more])


def built(run: Run) -> nn.Module:
    """Its net for its data."""
    return random_net.build(run.net, run.objective.needs, run.data.shape, run.data.classes, CPU)


def measured(run: Run, **more: object) -> dict[tuple[str, str], dict[str, object]]:
    """The rows of a bench of one round, by slope and precision."""
    report = step_bench.measure(run, rounds=1, device="cpu", **more)  # pyright: ignore[reportArgumentType]
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
@pytest.mark.parametrize(("more", "way"), [((GUIDED,), "tape"), (("train.ref=0.999",), "pass")])
def test_the_way_of_a_dual_is_shown(more: tuple[str, ...], way: str) -> None:
    assert measured(tiny("digits", *more), slopes=("dual",))["dual", "fp32"]["way"] == way


@pytest.mark.nightly
def test_what_cannot_be_run_is_a_row_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lame(JvpSlope):
        def __call__(self, *args: object, **rest: object) -> tuple[Heads, Along]:
            raise UserError("no rule for this\nin two lines")

    assert list(measured(tiny("digits-flow-matching"))) == [("none", "fp32")]  # an objective without a slope
    monkeypatch.setitem(step_bench.SLOPES, "jvp", Lame)
    rows = measured(tiny(), slopes=("jvp", "dual"))
    assert rows["jvp", "fp32"]["refused"] == "no rule for this"
    assert rows["jvp", "fp32"]["units_timed"] is None
    assert rows["jvp", "fp32"]["bytes"] is None
    assert rows["dual", "fp32"]["units_timed"] > 0


@pytest.mark.nightly
def test_blocks_are_compiled_where_there_are_some_and_a_loss_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As training does it."""
    setting = step_bench.prepare(tiny(), (1, 8, 8), CPU, "blocks")
    assert all(block._compiled_call_impl is not None for block in setting.net.blocks)  # pyright: ignore
    with pytest.raises(UserError, match="loss"):
        step_bench.prepare(tiny("moons"), (2,), CPU, "blocks")
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
    plain, central, dual = step_bench.with_times(tried, seconds, batch=6, seconds_at_peak=0.5)
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
    assert [row.units_timed for row in step_bench.with_times(tried, seconds, 1, None)] == [4, 5, 3, 10]


def test_zeros_are_filled_and_nothing_else() -> None:
    rng = torch.random.get_rng_state()
    module, again = (built(tiny()) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert all(p.all() for p in module.parameters())
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.bias)
    weight = layer.weight.detach().clone()
    assert torch.equal(random_net.fill_zeros(layer).weight, weight)
    assert layer.bias.all()


def test_sampling_is_measured_by_passes() -> None:
    report = sample_bench.measure(tiny(), nfes=(1, 5), precisions=("fp32", "bf16"), batch=3, rounds=2, device="cpu")
    rows = report["rows"]
    assert [(row["nfe"], row["solver"], row["precision"]) for row in rows] == [
        (nfe, solver, precision) for precision in ("fp32", "bf16") for nfe, solver in ((1, "restart"), (5, "euler"))
    ]
    assert all(0 < row["low"] <= row["images_per_second"] <= row["high"] for row in rows)


def test_samples_are_made_by_what_makes_sense() -> None:
    def solvers(name: str, **update: object) -> list[object]:
        run = tiny(name)
        run = run.model_copy(update={"sample": run.sample.model_copy(update=update)})
        return [sample_bench.solver(run.sample.solver, run.reads, nfe) for nfe in (1, 2, 50)]

    assert solvers("digits") == [Restart(), Restart(), Euler()]
    assert solvers("digits-meanflow") == [Hop(), Hop(), Hop()]
    assert solvers("digits", solver=Heun()) == [Euler(), Heun(), Heun()]
    with pytest.raises(UserError, match="ask for 1 to"):
        sample_bench.solver(Restart(), tiny().reads, 0)


@pytest.mark.nightly
def test_the_commands_print_tables_and_json() -> None:
    words = ("bench", "step", "digits", *sets(*TINY, GUIDED), "--rounds", 1, "--device", "cpu", "--precision", "bf16")
    made = call(*words, "--slope", "central,none")
    assert made.code == 0
    assert "F by time" in made.out
    assert "central in bf16: slope 'central' needs" in made.out
    report = call(*words, "--slope", "none", "--batch", 4, "--shape", "1,4,4", "--json").json
    assert report["batch"] == 4
    assert report["shape"] == [1, 4, 4]
    assert [row["slope"] for row in report["rows"]] == ["none"]
    words = ("bench", "sample", "moons", *sets("net.width=16"), "--nfe", 1, "--batch", 8, "--rounds", 1)
    assert call(*words, "--json").json["rows"][0]["nfe"] == 1
    assert "images_per_second" in call(*words).out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("step digits --slope cental", ("'cental'", "'central'")),
        ("step digits --precision bf61", ("'bf61'", "'bf16'")),
        ("step digits --precision tf32 --device cpu", ("tf32", "GPU")),
        ("step digits --compile block", ("'block'", "'blocks'")),
        ("step digits --shape 4,x", ("--shape", "4,x")),
        ("step digits --shape 4,32", ("square images",)),
        ("step digits --shape 4,0,0", ("at least 1",)),
        ("step digits-flow-matching --slope dual", ("no slope",)),
        ("sample digits --nfe 0", ("nfe = 0",)),
    ],
)
def test_what_this_run_or_machine_lacks_is_refused(
    words: str, named: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused("bench", *words.split(), named=named)


# --- of data


class Huge:
    """A million million images, made batch by batch; `most` live at one time."""

    size = 10**12

    def __init__(self) -> None:
        self.made: list[int] = []
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        x = torch.zeros(batch_size, 3, 8, 8)
        self.made.append(step)
        self.alive.add(x)
        self.most = max(self.most, len(self.alive))
        return x, torch.zeros(batch_size, dtype=torch.long)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        raise AssertionError

    def fingerprint(self) -> str:
        raise AssertionError


def test_few_batches_live_at_a_time() -> None:
    source = Huge()
    steps = range(100, 100 + data_bench.WARM_UP_BATCHES + 50)
    assert data_bench.images_per_second(source, 4, steps, CPU, lambda done, note: None) > 0
    assert source.most <= BATCHES_AHEAD + 2  # ahead, and in use
    assert set(steps) <= set(source.made) <= set(range(100, steps.stop + BATCHES_AHEAD))
    assert len(source.made) == len(set(source.made))


def test_each_number_of_threads_has_a_line(tmp_path: Path) -> None:
    as_folder(tmp_path)
    words = ("bench", "data", tmp_path, "--side", "8", *sets("data.memory=0"), "--batch", "4", "--batches", "2")
    done = call(*words, "--threads", "1,3", "--step-seconds", "0.000001", "--json").json
    assert [row["threads"] for row in done["rows"]] == [1, 3]
    assert all(row["waits"] for row in done["rows"])
    assert data_bench.powers_of_two(6) == [1, 2, 4, 6]
    assert (done["images_per_second_needed"], done["images"]) == (pytest.approx(4e6), 12)
    assert done["kind"] == "folder, decoded at every visit"
    shown = call(*words, "--threads", "1", "--step-seconds", "1000000")
    assert (shown.code, "the device does not wait: a step takes 0 images/s (given)" in shown.out) == (0, True)
    kept = call("bench", "data", tmp_path, "--side", "8", "--batches", "1", "--json").json
    assert [row["threads"] for row in kept["rows"]] == [None]
    assert kept["rows"][0]["waits"] is None


@pytest.mark.parametrize(
    "fields",
    [["data.captions={kind: templates, templates: ['a {}']}"], ["data.crop=adm", "data.buckets.step=8"]],
)
def test_images_with_captions_or_in_buckets_are_decoded_too(fields: list[str], tmp_path: Path) -> None:
    as_folder(tmp_path)
    benchmark = data_bench.benchmark_of(str(tmp_path), ["data.memory=0", *fields], batch=2, side=8)
    report = data_bench.measure(benchmark, threads=[1, 2], batches=1, device="cpu")
    assert report["kind"] == "folder, decoded at every visit"
    assert [row["threads"] for row in report["rows"]] == [1, 2]


def test_no_more_threads_are_measured_than_training_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_folder(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    report = data_bench.measure(
        data_bench.benchmark_of(str(tmp_path), ["data.memory=0"], batch=2, side=8), batches=1, device="cpu"
    )
    assert max(row["threads"] for row in report["rows"]) == MAX_THREADS


def test_a_recipe_is_read_at_its_own_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = data_bench.measure(
        data_bench.benchmark_of("digits", ["train.batch=32"]), batches=1, step_seconds=0.1, device="cpu", bar=no_bar
    )
    assert (report["batch"], report["kind"], report["images_per_second_needed"]) == (32, "numbers in memory", 320)
    with pytest.raises(UserError, match="--side"):
        data_bench.benchmark_of("digits", side=8)
    refused("bench", "data", "nowhere-at-all", named=("nowhere-at-all",))


@pytest.mark.parametrize(("rate", "words"), [(100.0, "waits 90% of the time"), (2000.0, "does not wait")])
def test_the_verdict_says_who_waits(rate: float, words: str) -> None:
    report = {
        "rows": [{"images_per_second": 1.0}, {"images_per_second": rate}],
        "images_per_second_needed": 1000.0,
        "step_seconds_are": "given",
        "kind": "folder, decoded at every visit",
    }
    assert words in data_bench.verdict(report)
    assert ("dumo encode" in data_bench.verdict(report)) == (rate < 1000)
