"""A run keeps averages, the same ones however often it is stopped, and others are made of its snapshots."""

import shutil
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch

from dumo.config.difference import identity
from dumo.config.spec import Run
from dumo.io import digest
from dumo.io.weights import load as load_weights
from dumo.run import judge
from dumo.run.average import Profile, average, fit_profile, overlap, weighted_sum
from dumo.run.train import train
from dumo.run.weights import open_run
from dumo.training import checkpoint
from dumo.training.ema import exponent
from dumo.types import UserError
from e2e.shell import call
from unit.run import known

KEPT = ["train.ema=[{kind: power, std: 0.05}, {kind: power, std: 0.1}]", "train.snapshots=4", "train.save_every=100"]


def tiny(steps: int = 24, *more: str) -> Run:
    """DuMo on moons, in no time, with snapshots."""
    return known.tiny("moons", f"train.steps={steps}", *KEPT, *more)


def kept(folder: Path) -> dict[str, bytes]:
    """The bytes of the snapshots, by their names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("snapshots/*/*"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept twelve."""
    folder = tmp_path_factory.mktemp("average") / "run"
    train(tiny(), folder)
    assert len(kept(folder)) == 12
    return folder


@pytest.mark.nightly
def test_stopped_and_resumed_keeps_the_same(run: Path, tmp_path: Path) -> None:
    train(tiny(10), tmp_path / "run")
    train(tiny(), tmp_path / "run")
    found = kept(tmp_path / "run")
    assert {name: found.pop(name) for name in [*found] if name.endswith("00000010.safetensors")}  # the last one's then
    assert found == kept(run)
    train(tiny(12), tmp_path / "run", step=10)
    assert max(int(name[-20:-12]) for name in kept(tmp_path / "run")) == 12


@pytest.mark.slow
def test_it_is_the_average_that_would_have_been_kept(run: Path, tmp_path: Path) -> None:
    """To the error that is said, of how far the weights went."""
    made = average(str(run), 0.12, tmp_path / "new.safetensors")
    train(tiny(24, "train.ema=[{kind: power, std: 0.12}, {kind: power, std: 0.1}]"), tmp_path / "run")
    wanted, other = (
        load_weights(tmp_path / f"run/checkpoints/step-00000024/ema-std-{std}.safetensors") for std in (0.12, 0.1)
    )
    found = load_weights(made.file)
    assert found.keys() == wanted.keys()
    assert (made.step, made.count) == (24, 12)
    assert 0.01 < made.error < 0.03
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 0.1 * (other[name] - wanted[name]).norm() + 1e-6
    opened = open_run(str(run), weights=str(made.file))
    assert opened.step == 24
    assert all(torch.equal(x, found[name]) for name, x in opened.net.state_dict().items())


@pytest.mark.slow
def test_it_says_what_it_was_made_of_and_takes_no_other_runs(run: Path, tmp_path: Path) -> None:
    about = checkpoint.facts_of(average(str(run), 0.07, tmp_path / "new.safetensors").file)
    assert (about["step"], about["std"], about["run"]) == (24, 0.07, identity(tiny()))
    assert about["sources"] == {name: digest.of_bytes(bits) for name, bits in kept(run).items()}
    train(tiny(4, "train.seed=1"), tmp_path / "other")
    mixed = shutil.copytree(run, tmp_path / "mixed")
    name = "snapshots/ema-std-0.05/step-00000004.safetensors"
    shutil.copy(tmp_path / "other" / name, mixed / name)
    with pytest.raises(UserError, match=rf"mixed/{name} has weights of another run"):
        average(str(mixed), 0.12)


def test_a_snapshot_says_its_width_and_what_it_says_does_not_change(run: Path, tmp_path: Path) -> None:
    """Files of two widths that changed places give another average; without a width they are taken by their place."""
    narrow, wide = (f"snapshots/ema-std-{std}/step-00000012.safetensors" for std in (0.05, 0.1))
    swapped = shutil.copytree(run, tmp_path / "swapped")
    shutil.copy(run / wide, swapped / narrow)
    shutil.copy(run / narrow, swapped / wide)
    with pytest.raises(UserError, match=rf"swapped/{narrow} says that its std is 0\.1, not 0\.05"):
        average(str(swapped), 0.12)
    known.restate(swapped / narrow, lambda facts: facts.update(std=0.05))
    with pytest.raises(UserError, match=rf"swapped/{narrow}: its metadata does not match its checksum"):
        average(str(swapped), 0.12)

    older = shutil.copytree(run, tmp_path / "older")
    for file in older.glob("snapshots/*/*"):
        known.restate(file, lambda facts: [facts.pop(name) for name in ("kind", "std", checkpoint.FACTS_SUM)])
    with pytest.warns(UserWarning, match=r"is from before snapshots said their width \(12 of 12 are\)"):
        made = average(str(older), 0.12)
    found = load_weights(made.file)
    wanted = load_weights(average(str(run), 0.12, tmp_path / "new.safetensors").file)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_that_was_kept_comes_back(run: Path) -> None:
    made = average(str(run), 0.05)
    assert made.file == run / "averages/std-0.05.safetensors"
    there = load_weights(run / "snapshots/ema-std-0.05/step-00000024.safetensors")
    assert all(torch.allclose(x, there[name], rtol=1e-6, atol=1e-7) for name, x in load_weights(made.file).items())


def test_the_command_says_to_judge_what_can_be_judged(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("average", run, "--std", 0.05, "--out", tmp_path / "new.safetensors")
    assert f"    dumo evaluate {run} --weights" in call(*words).err
    monkeypatch.setattr(judge, "missing_to_judge", lambda run, num_images: "reference statistics")
    done = call(*words)
    assert done.err.splitlines()[-2:] == [
        f"next:  dumo sample {run} --weights {tmp_path}/new.safetensors",
        "dumo evaluate needs reference statistics",
    ]


@pytest.mark.parametrize(
    ("std", "says"), [(0.0, "between 0 and"), (0.3, "between 0 and"), (float("nan"), "between"), (0.02, "misses")]
)
def test_widths_that_are_none_are_refused(run: Path, std: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        average(str(run), std)


def test_a_run_without_snapshots_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run's folder"):
        average(str(tmp_path), 0.1)
    train(known.tiny("moons", "train.steps=1"), tmp_path / "run")
    with pytest.raises(UserError, match=r"train\.snapshots=1 .*kind: power"):
        average(str(tmp_path / "run"), 0.1)
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        average(str(tmp_path / "run"), 0.1, tmp_path / "new.pt")


STEPS = 400
PROFILES = [Profile(step, std) for step, std in product(range(50, STEPS + 1, 50), (0.05, 0.1))]


def test_overlaps_are_the_integrals() -> None:
    tau = (np.arange(100_000) + 0.5) / 100
    for one, other in ((Profile(300, 0.1), Profile(700, 0.05)), (Profile(500, 0.2), Profile(500, 0.05))):
        first, second = (
            (exponent(p.std) + 1) * (tau / p.step) ** exponent(p.std) / p.step * (tau < p.step) for p in (one, other)
        )
        assert overlap(one, other) == pytest.approx((first * second).sum() / 100, rel=1e-4)
        assert overlap(one, other) == overlap(other, one)


@pytest.mark.parametrize("known", PROFILES[::5])
def test_a_snapshot_is_found_again(known: Profile) -> None:
    x, error = fit_profile(PROFILES, known)
    assert x == pytest.approx([float(one == known) for one in PROFILES], abs=1e-9)
    assert error < 1e-6


def test_weights_that_rest_stay() -> None:
    for std in (0.01, 0.04, 0.25):
        assert sum(fit_profile(PROFILES, Profile(STEPS, std))[0]) == pytest.approx(1, abs=1e-12)


def test_more_snapshots_are_nearer() -> None:
    """An error that falls by the square of their number."""
    errors = []
    for count in (8, 16, 32):
        kept = [Profile(step, std) for step, std in product(range(3200 // count, 3201, 3200 // count), (0.05, 0.1))]
        errors.append(fit_profile(kept, Profile(3200, 0.12))[1])
    assert all(3 < a / b < 5 for a, b in pairwise(errors))


def test_what_is_not_averaged_is_the_last_ones() -> None:
    snapshots = [{"w": torch.full((2,), i, dtype=torch.float32), "count": torch.tensor(i)} for i in (1, 2)]
    found = weighted_sum(snapshots, [0.25, 0.5], {"w"})
    assert torch.equal(found["w"], torch.full((2,), 1.25))
    assert found["count"].item() == 2
