"""A dry run tells what a run takes, of every recipe; and a rehearsal is the step that training would make first."""

import json
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from autoencoder import taef2
from dumo.config import recipes
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.data import Images, Latents
from dumo.encoders import Taef2
from dumo.nets import Pretrained
from dumo.plan import rehearsal
from dumo.plan.plan import cache_bytes, lines, missing_data, most_rows, plan, rehearsal_lines, show
from dumo.plan.rehearsal import TimedStep
from dumo.run import cost, encode, memory, trial_net
from dumo.run.cost import StepCost
from dumo.run.net import outline
from dumo.run.weights import build
from dumo.runtime import dist
from dumo.runtime.stopwatch import WARM_UP
from dumo.training.frozen import trained_state_dict
from dumo.types import Objective, UserError
from e2e.shell import call, refused, sets
from recipe import recipe
from tiers import tiered
from unit.plan.test_catalogue import VARIABLES
from unit.run.adapted import freeze

CPU = torch.device("cpu")
TINY = ("net.width=16", "net.depth=1", "net.attention=2")
HEAVY = ("flux-lora", "qwen-image-lora")  # hundreds of adapters in all blocks
WEIGHED = ("digits-guided",)  # whose steps are counted here; `dumo show` is, of every objective and net

# Parameters in millions: trained, and with DiT's fixed table of positions; the paper says 675, 676 and 679
MILLIONS = {
    "imagenet256-xl2": (677.491, 677.786),
    "imagenet256-xl2-432": (677.491, 677.786),
    "imagenet256-xl2-dual": (677.491, 677.786),
    "imagenet256-xl2-meanflow": (676.441, 676.736),
    "imagenet512-xl4": (677.657, 677.952),
    "imagenet512-xl4-dual": (677.657, 677.952),
    "imagenet512-xl4-meanflow": (676.551, 676.846),
    "imagenet512-xl1-dcae": (677.547, 677.841),
    "imagenet512-xl1-dcae-dual": (677.547, 677.841),
    "imagenet256-b2": (131.497, 131.694),
    "imagenet256-b2-meanflow": (131.091, 131.288),
    "cifar10": (55.741, 55.741),
}

# The paper's Tab. 3: resolution, autoencoder, patch, lr, (theta_1, theta_2), zeta; and of Tab. 1 the epochs. All XL.
TABLE_3 = {
    "imagenet256-xl2": (256, "sd-vae", 2, 0.0001, (2.4, 2.4), 0.55, 240),
    "imagenet256-xl2-432": (256, "sd-vae", 2, 0.0001, (2.4, 2.4), 0.55, 432),
    "imagenet512-xl1-dcae": (512, "dc-ae", 1, 0.0001, (1.0, 1.0), 0.66, 840),
    "imagenet512-xl4": (512, "sd-vae", 4, 0.0001, (2.4, 2.4), 0.66, 360),
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No folder is named, and none is here: recipes must do without."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def cost_of_one_pass(net: nn.Module, objective: Objective, _: object, shape: tuple[int, ...], **__: object) -> StepCost:
    """Made up, but for the outputs of the net."""
    return StepCost(units=5.0, flops=10.0, pass_flops=2.0, heads=cost._pass_cost(net, objective, shape).heads)


def test_a_plan_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass forward and one step, whose operations are counted, and one step whose bytes are followed."""
    counted: list[str] = []
    for module, name in (
        (cost, "_forward_pass"),
        (cost, "count_flops"),
        (cost, "step_function"),
        (memory, "_follow_step"),
    ):
        work = getattr(module, name)

        def count(*args: Any, work: Any = work, name: str = name, **named: Any) -> Any:  # noqa: ANN401
            counted.append(name)
            return work(*args, **named)

        monkeypatch.setattr(module, name, count)
    plan(load("digits"))
    assert {name: counted.count(name) for name in set(counted)} == {
        "_forward_pass": 1,
        "count_flops": 2,
        "step_function": 2,
        "_follow_step": 1,
    }


@pytest.mark.parametrize("name", tiered(recipes.names(), now=["digits", "moons"], ci=["cifar10", "imagenet256-xl2"]))
def test_every_recipe_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On nets without numbers, on a machine without any data: what is told is all there, and agrees."""
    if name not in WEIGHED:  # seconds each
        monkeypatch.setattr(memory, "activation_bytes", lambda *_, **__: 0)
        monkeypatch.setattr(cost, "step_cost", cost_of_one_pass)
        monkeypatch.setattr("dumo.plan.plan.far_share", lambda _: 0.1)  # of a million draws
    spec = recipe(name)
    if name in HEAVY:
        assert isinstance(spec.net, Pretrained)
        spec = spec.model_copy(update={"net": spec.net.short(2)})
    examined_net = trial_net.cut_to_two_blocks(spec.net)  # before training
    assert outline(spec.model_copy(update={"net": examined_net}))
    facts = plan(spec)
    json.dumps(facts, allow_nan=False)
    if name in MILLIONS:
        assert (round(facts["parameters"] / 1e6, 3), round(facts["parameters_total"] / 1e6, 3)) == MILLIONS[name]
    assert facts["inputs"]["x"] == list(spec.data.shape)
    assert facts["heads"] == {head: list(spec.data.shape) for head in spec.objective.needs.heads}
    assert facts["flops"] == facts["forward_units_per_step"] * facts["forward_flops_per_image"] * facts["images"]
    assert facts["images"] == spec.train.steps * spec.train.batch
    parts = {key: size for key, size in facts["memory"].items() if key not in ("rows", "total")}
    assert facts["memory"]["total"] == sum(parts.values())
    moments = parts["optimizer"] / parts["gradients"]
    least, most = {"muon": (1, 2), "adamw8bit": (1, 1.1)}.get(spec.train.optimizer.kind, (1.998, 2.002))
    assert least < moments < most
    assert parts["gradients"] == (2 if spec.train.weights == "bfloat16" else 4) * facts["parameters_trained"]
    assert facts["memory"]["rows"] == (spec.train.micro_batch or spec.train.batch)
    assert (facts["cache"] is None) == (spec.data.kind != "latents")
    assert (facts["missing_data"] is None) == (spec.data.kind in ("digits", "moons"))
    assert dict(lines(facts)).keys() >= {"parameters", "memory", "data"}


def test_captions_that_are_not_known_yet_count_as_what_may_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "activation_bytes", lambda *_, **__: 0)
    monkeypatch.setattr(cost, "step_cost", cost_of_one_pass)
    on_device, on_host = (plan(load("text-256", [*TINY, f"net.texts.memory={gb}"]))["memory"] for gb in (1.5, 0))
    assert on_device.pop("texts") == 1.5e9
    assert on_device.pop("total") == on_host.pop("total") + 1.5e9
    assert on_device == on_host


@pytest.mark.nightly
def test_what_validation_adds_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "step_cost", lambda *_, **__: cost.StepCost(units=5.0, flops=10.0, pass_flops=2.0))
    words = ["evaluate.every=100", "evaluate.few=1000", "evaluate.nfe=[2]", "train.batch=50", "sample.guide.scale=2"]
    facts = plan(load("digits", [*words, "objective.drop=0.1"]))
    assert facts["validation"] == {"every": 100, "samples": 1000, "nfe": 2, "share": 4000 / (100 * 50 * 5)}
    said = dict(lines(facts))["validation"]
    assert said.startswith("1,000 samples in 2 NFE every 100 steps: 16.00% more work")
    assert plan(load("digits"))["validation"] is None


@pytest.mark.parametrize("name", TABLE_3)
def test_table_3(name: str) -> None:
    spec, (side, codec, patch, lr, thetas, zeta, epochs) = recipe(name), TABLE_3[name]
    run: dict[str, Any] = spec.model_dump()
    assert (run["data"]["images"]["side"], run["data"]["codec"]["kind"]) == (side, codec)
    assert {key: run["net"][key] for key in ("patch", "width", "depth", "attention")} == {
        "patch": patch,
        "width": 1152,
        "depth": 28,
        "attention": 16,
    }
    optimizer = run["train"]["optimizer"]
    assert (optimizer["kind"], optimizer["lr"], optimizer["betas"]) == ("adamw", lr, (0.9, 0.95))
    assert optimizer["weight_decay"] == 0  # Sec. 4.1
    times = run["objective"]["times"]
    assert (run["path"]["kind"], times["kind"], (times["a"], times["b"])) == ("linear", "beta", thetas)
    assert (run["objective"]["beta"], run["objective"]["guide"]["zeta"]) == (0.7, zeta)
    assert run["objective"]["slope"] == {"kind": "central", "h": 0.005}  # Sec. 3.3; UCGM
    assert run["net"]["time_scale"] == 1
    train = run["train"]  # App. C.1
    assert (train["batch"], train["schedule"]) == (512, {"kind": "constant", "warmup": 0})
    assert (train["ema"], train["clip"], train["precision"]) == (({"decay": 0.9999, "ramp": False},), None, "fp32")
    assert train["steps"] * 512 / 1_281_167 == pytest.approx(epochs, rel=2e-3)
    assert run["evaluate"]["protocol"]["kind"] == f"adm-imagenet{side}-50k"


@pytest.mark.parametrize("name", [name for name in TABLE_3 if f"{name}-dual" in MILLIONS])
def test_a_twin_differs_in_its_slope_and_how_it_computes(name: str) -> None:
    one, two = (recipe(each).model_dump(exclude={"about"}) for each in (name, f"{name}-dual"))
    assert [run["objective"].pop("slope")["kind"] for run in (one, two)] == ["central", "dual"]
    assert [one["train"].pop(key) for key in ("precision", "compile")] == ["fp32", "none"]  # as published
    assert [two["train"].pop(key) for key in ("precision", "compile")] == ["bf16", "blocks"]
    assert one == two


@pytest.mark.nightly
def test_work_is_all_passes_of_all_images() -> None:
    """XL/2: 118.62 G multiply-adds, 5.9 F a step (the tenth without labels needs no null pass), 240 epochs."""
    spec = recipe("imagenet256-xl2")
    facts = plan(spec)
    assert 40e9 < facts["memory"]["activations"] < 50e9  # 64 rows of 0.68 GB
    assert facts["forward_units_per_step"] == pytest.approx(5.9, abs=1e-3)
    assert facts["flops"] == pytest.approx(2 * 118.62e9 * 5.9 * 600_000 * 512, rel=1e-3)
    assert facts["epochs"] == pytest.approx(239.8, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("part", [False, True])
def test_bytes_are_those_of_real_tensors(monkeypatch: pytest.MonkeyPatch, part: bool) -> None:
    """Of each memory once: what averages share with the net is the net's."""
    if part:
        freeze(monkeypatch)
    spec = load("digits", [*TINY, "train.ema=[{decay: 0.9}, {decay: 0.99}]", "train.ref=0.9"])
    counted = memory.held_bytes(outline(spec), spec.train)
    state = step(spec, 2).state
    modules = [state.net, *(average.module for average in state.averages.values())]
    weights = sum(t.nbytes for t in (*state.net.parameters(), *state.net.buffers()))
    own = (value for entry in state.optimizer.state.values() for value in entry.values())
    held = {x.data_ptr(): x.nbytes for net in modules for x in (*net.parameters(), *net.buffers())}
    assert (counted.weights, counted.averages) == (weights, sum(held.values()) - weights)
    assert counted.averages == 2 * sum(x.nbytes for x in trained_state_dict(state.net).values())
    assert counted.gradients == sum(p.grad.nbytes for p in state.net.parameters() if p.grad is not None)
    assert counted.optimizer == sum(value.nbytes for value in own)


@pytest.mark.nightly
def test_a_cache_is_as_large_as_it_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i, 2 * i, 90)).save(tmp_path / "images" / f"{i}.png")
    images = Images(root=str(tmp_path / "images"), side=32, flip=True, classes=0)
    data = Latents(
        root=str(tmp_path / "cache"), images=images, codec=Taef2(weights=str(taef2(tmp_path / "taef2.safetensors")))
    )
    mine = load("my-images", TINY)
    spec = load("digits", TINY).model_copy(update={"data": data, "evaluate": mine.evaluate})
    assert missing_data(spec.data) is None, "training makes the cache"
    assert cache_bytes(data, None) == {"images": None, "bytes_per_image": 2 * 2 * prod(data.shape), "bytes": None}
    encode.encode(data, device="cpu")
    facts = plan(spec)
    assert facts["missing_data"] is None
    larger = data.model_copy(update={"images": images.model_copy(update={"side": 64})})
    assert "resolution: 32 in the cache, 64 asked" in str(missing_data(larger))
    assert facts["cache"]["images"] == 3
    assert facts["epochs"] == facts["images"] / 3
    files = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.safetensors"))
    assert 0 <= files - facts["cache"]["bytes"] < 2000  # labels, header


@pytest.mark.parametrize(
    ("name", "each"),
    [("imagenet256-xl2", 8 * 4 * 32 * 32), ("imagenet512-xl1-dcae", 4 * 32 * 16 * 16), ("imagenet-sample", 2 * 2048)],
)
def test_a_cache_holds_moments_of_gaussians_both_flips_and_two_bytes_a_number(name: str, each: int) -> None:
    data = recipe(name).data
    assert isinstance(data, Latents)
    assert cache_bytes(data, 10) == {"images": 10, "bytes_per_image": each, "bytes": 10 * each}


@pytest.mark.parametrize(("ranks", "words", "rows"), [(1, [], 32), (3, [], 11), (8, [], 4), (2, ["micro_batch=5"], 4)])
def test_memory_is_of_the_largest_pass(
    ranks: int, words: list[str], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "world", lambda: ranks)
    run = load("digits", [f"train.{word}" for word in words])
    assert most_rows(run.train, run.objective) == rows


def small(*fields: str) -> Run:
    return load("digits", [*TINY, *fields])


def step(spec: Run, rows: int) -> TimedStep:
    """A rehearsed step of random rows."""
    return rehearsal.make_step(spec, build(spec), rehearsal.random_rows(spec.data, rows, CPU))


def test_a_rehearsal_is_the_first_step_of_training() -> None:
    """One update of every weight that has a gradient, at the rate of step 0, and the average follows."""
    spec = small("train.schedule.warmup=10", "train.ema=[{decay: 0.75, ramp: false}]", "train.micro_batch=8")
    before = build(spec)
    made = step(spec, 2)
    state = made.state
    record = made.record
    assert (state.step, state.images, record.images) == (1, 2, 2)
    assert record.lr == spec.train.optimizer.lr / 10
    assert min(made.pass_seconds, made.update_seconds) > 0
    moved = 0
    for old, new, mean in zip(before.parameters(), state.net.parameters(), state.sampled_net.parameters(), strict=True):
        assert torch.allclose(mean, 0.75 * old + 0.25 * new, atol=1e-7)
        change = (new - old).abs().max().item()
        assert change == pytest.approx(record.lr, rel=1e-2) or change <= record.lr  # Adam's first step is the rate
        moved += change > 0
    assert moved
    for old, mean in zip(before.parameters(), state.sampled_net.parameters(), strict=True):
        moved -= bool((mean != old).any())
    assert moved == 0


def test_hours_are_of_the_whole_run() -> None:
    """Passes take time by the row, the update by the step: here 3 s for 2 rows, and 1 s."""
    times = iter([*[100.0] * 3 * WARM_UP, 0.0, 3.0, 4.0, 10.0, 12.0])
    found = rehearsal.rehearse(small("train.batch=32", "train.steps=900"), 2, "cpu", clock=lambda: next(times))
    assert (found.pass_seconds, found.update_seconds, found.sample_seconds) == (3, 1, 2)
    assert found.step_seconds == 16 * 3 + 1
    assert found.hours == 900 * 49 / 3600
    assert found.images_per_second == 32 / 49
    assert found.sample_nfe == 1
    assert found.peak_bytes > 1e7


def test_steps_of_a_run_that_ends_by_the_clock_are_no_fact() -> None:
    times = iter([*[100.0] * 3 * WARM_UP, 0.0, 3.0, 4.0, 10.0, 12.0])
    run = small("train.batch=32", "train.steps=900", "train.minutes=9.8")
    found = rehearsal.rehearse(run, 2, "cpu", clock=lambda: next(times))
    assert found.hours == pytest.approx(9.8 / 60)
    said = dict(rehearsal_lines(asdict(found), run.train))
    assert said["the run"] == "9.8 minutes, then it ends: at most 12 steps on this device alone"
    assert dict(lines(plan(run)))["in all"].startswith("9.8 minutes, then it ends; guessed are 900 steps of 32: 28,800")
    assert "guess" not in dict(lines(plan(small())))["in all"]
    shown = call("show", "moons", *sets("net.width=16", "train.minutes=9.8"))
    assert "9.8 minutes, then it ends; train.steps is a guess until then" in " ".join(shown.out.split())


def test_a_large_net_on_a_cpu_makes_no_step_more_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[int] = []

    def made(*given: object, warm_up: int, clock: object) -> None:
        warmed.append(warm_up)
        raise KeyboardInterrupt

    monkeypatch.setattr(rehearsal, "make_step", made)
    for most in (rehearsal.MAX_PARAMETERS_TO_WARM_UP, 10):
        monkeypatch.setattr(rehearsal, "MAX_PARAMETERS_TO_WARM_UP", most)
        with pytest.raises(KeyboardInterrupt):
            rehearsal.rehearse(small(), 1, "cpu")
    assert warmed == [WARM_UP, 0]


def test_what_does_not_fit_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearsal, "make_step", full)
    with pytest.raises(UserError, match=r"4 rows.*fewer rows.*net.checkpoint"):
        rehearsal.rehearse(small(), 4, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "far", "scale"),
    [
        ("moons", ["objective.times.kind=uniform"], 0.1, 1),
        ("moons", ["objective.times={kind: uniform, high: 0.5}"], 0.0, 1),
        ("moons", ["objective.times={kind: beta, a: 1, b: 1}"], 0.1, 1),
        ("moons-meanflow", ["objective.times.velocity_ratio=0"], 0.01, 1),  # both of two uniform times
        ("moons-meanflow", ["objective.times.velocity_ratio=0.5"], 0.005, 1),
        ("moons-flow-matching", [], None, 1),
        ("digits", ["objective.times.kind=uniform", "objective.guide={omega: 0.2, zeta: 0.9}"], 0.1, 2),
    ],
)
def test_how_much_is_far_and_how_much_is_guided(
    name: str, overrides: list[str], far: float | None, scale: float
) -> None:
    found = show(load(name, ["net.width=16", "net.depth=1", *overrides]))
    assert found.far == (far if far is None else pytest.approx(far, abs=1e-3))
    assert found.guidance_scale == pytest.approx(scale)


@pytest.mark.nightly
def test_the_command(tmp_path: Path) -> None:
    words = ("dry", "moons", *sets("net.width=16"), "--device", "cpu")
    told = call(*words, "--rows", 3)
    assert (told.code, told.err) == (0, "")
    for word in ("parameters", "GB at most", "3 rows of random numbers", "d/dt is off float64", "hours on this device"):
        assert word in " ".join(told.out.split())
    facts = call(*words, "--rows", 2, "--json").json
    assert facts["step"]["rows"] == 2
    assert facts["step"]["hours"] > 0
    assert call(*words, "--json").json == {**facts, "step": None}
    assert list(tmp_path.iterdir()) == []
    refused(*words, "--rows", 0, named=("--rows",))


@pytest.mark.nightly
def test_your_own_folder_need_not_be_named_to_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, tried = call("show", "my-images", *sets(*TINY)), call("dry", "my-images", *sets(*TINY))
    assert (shown.code, shown.err) == (0, "")
    assert "root: $MY_IMAGES" in shown.out
    assert "not known yet: a class per folder" in " ".join(shown.out.split())
    assert "MY_IMAGES is not set" in " ".join(tried.out.split())
    refused("train", "my-images", *sets(*TINY), named=("MY_IMAGES is not set", "set data.root"))
    assert "there is no /nowhere" in str(missing_data(load("my-images", [*TINY, "data.root=/nowhere"]).data))
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    monkeypatch.setenv("MY_IMAGES", str(tmp_path))
    assert missing_data(load("my-images", TINY).data) is None
