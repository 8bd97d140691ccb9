"""What a run is, of every recipe: its size, what a step costs, and the settings of the paper."""

import json
from pathlib import Path
from typing import Any

import pytest

from dumo.config import recipe_files
from dumo.config.load import load
from dumo.nets import Pretrained
from dumo.plan import facts
from dumo.plan.facts import show
from dumo.run import flops
from dumo.run.flops import StepCost
from dumo.run.net import meta_net, num_parameters
from dumo.run.random_net import cut_to_two_blocks
from e2e.shell import call, refused
from recipe import recipe
from tiers import tiered

TINY = ("net.width=16", "net.depth=1", "net.attention=2")
VARIABLES = (
    "DUMO_DATA",
    "MY_IMAGES",
    "DUMO_INCEPTION",
    "DUMO_ADM",
    "FEW_STEPS",
)
HEAVY = ("flux-lora", "qwen-image-lora")  # hundreds of adapters in all blocks
COUNTED = ("digits-guided",)  # whose steps are counted here; `dumo show` is, of every objective and net

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


@pytest.mark.parametrize(
    "name", tiered(recipe_files.names(), now=["digits", "moons"], ci=["cifar10", "imagenet256-xl2"])
)
def test_every_recipe_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On nets without numbers, on a machine without any data."""
    if name not in COUNTED:  # seconds each
        monkeypatch.setattr(flops, "step_cost", lambda *_, **__: StepCost(units=5.0, flops=10.0, pass_flops=2.0))
        monkeypatch.setattr(facts, "far_share", lambda _: 0.1)  # of a million draws
    spec = recipe(name)
    if name in HEAVY:
        assert isinstance(spec.net, Pretrained)
        spec = spec.model_copy(update={"net": spec.net.short(2)})
    examined_net = cut_to_two_blocks(spec.net)  # before training
    assert meta_net(spec.model_copy(update={"net": examined_net}))
    found = show(spec)
    json.dumps(found.spec, allow_nan=False)
    assert found.forward_units_per_step > 2
    assert 0 < found.parameters_trained <= found.parameters
    if name in MILLIONS:
        millions, with_tables = MILLIONS[name]
        assert round(found.parameters / 1e6, 3) == millions
        assert round(sum(x.numel() for x in meta_net(spec).state_dict().values()) / 1e6, 3) == with_tables


@pytest.mark.slow
def test_codes_count_as_the_weights_that_they_stand_for() -> None:
    words = ["net.kind=diffusers", "net.texts.kind=codes", "pipeline=sd3-digits", "net.lora.rank=4"]
    coded, plain = (meta_net(load("digits", [*words, f"net.lora.frozen={coding}"])) for coding in ("int8", "float32"))
    assert num_parameters(coded) == num_parameters(plain) != sum(p.numel() for p in coded.parameters())


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


def test_the_length_of_a_run_that_ends_by_the_clock_is_said() -> None:
    shown = call("show", "moons", "net.width=16", "train.minutes=9.8")
    assert "9.8 minutes; train.steps only scales the warmup" in " ".join(shown.out.split())


@pytest.mark.nightly
def test_your_own_folder_need_not_be_named_to_be_looked_at() -> None:
    shown = call("show", "my-images", *TINY)
    assert (shown.code, shown.err) == (0, "")
    assert "root: $MY_IMAGES" in shown.out
    assert "not known yet: a class per folder" in " ".join(shown.out.split())
    refused("train", "my-images", *TINY, named=("MY_IMAGES is not set", "set data.root"))
