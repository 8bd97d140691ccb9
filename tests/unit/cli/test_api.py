"""Python gives what the commands give, and says what is wrong as they do."""

import json
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dumo
from dumo.cli.api import LoadedRun
from dumo.config.load import load
from dumo.flow.solver import Restart
from dumo.io import run_places
from dumo.io.tensor_files import load as load_weights
from dumo.report.evaluation import report_path
from dumo.report.sample_to_files import sample_to_files
from dumo.run.trained import DEFAULT_COUNT
from dumo.types import Readings, UserError
from e2e.shell import call
from e2e.test_start import HEAVY
from forked import ENVIRONMENT

CHANGES = {
    "net": {"kind": "dit", "width": 32, "depth": 1, "patch": 2, "attention": 4, "time_scale": 10},
    "train.batch": 16,
    "train.steps": 2,
    "train.ema": [{"decay": 0.5}],
    "objective.drop": 1e-5,
    "evaluate.protocol.samples": 500,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """DuMo on digits, barely trained. Its weights are not to be written to."""
    return dumo.train("digits", CHANGES, out=tmp_path_factory.mktemp("run") / "digits", device="cpu")


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """DuMo on moons, barely trained."""
    changes = {"net.width": 16, "net.depth": 1, "train.batch": 8, "train.steps": 2}
    return dumo.train(dumo.recipe("moons", changes), out=tmp_path_factory.mktemp("run") / "moons")


def test_import_waits_for_torch() -> None:
    program = f"import sys, dumo; print({{*dumo.__all__}} <= {{*dir(dumo)}}, [m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def test_no_room_shadows_a_name() -> None:
    rooms = [module.name for module in pkgutil.walk_packages(dumo.__path__, "dumo.")]
    assert {"dumo.cli.api", "dumo.cli.train", "dumo.run.trainer"} <= {*rooms}
    assert not {f"dumo.{name}" for name in dumo.__all__} & {*rooms}
    for name in rooms:
        if not name.endswith("__main__"):  # which is a command
            import_module(name)
    assert all(callable(getattr(dumo, name)) for name in dumo.__all__)
    assert dumo.recipe("digits") == load("digits")
    with pytest.raises(AttributeError, match="'dumo' has no attribute 'lode'"):
        _ = dumo.lode


@pytest.mark.slow
def test_python_m_dumo_is_dumo() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dumo", "--version"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"dumo {dumo.__version__}\n"


@pytest.mark.slow
def test_a_recipe_is_changed_by_values(digits: LoadedRun) -> None:
    fields = ["train.steps=2", "train.batch=16", "train.ema=[{decay: 0.5}]", "evaluate.protocol.samples=500"]
    net = "net={kind: dit, width: 32, depth: 1, patch: 2, attention: 4, time_scale: 10}"
    settings = digits.spec.model_copy(update={"resolved": {}})
    assert settings == dumo.recipe("digits", CHANGES) == load("digits", [net, *fields, "objective.drop=0.00001"])
    odd = {"about": "a: b\n# c = 'd'", "train.clip": None, "train.ema": (), "data.kind": "digits"}
    assert dumo.recipe("digits", odd).model_dump() == load("digits").model_dump() | {
        "about": odd["about"],
        "train": load("digits").train.model_dump() | {"clip": None, "ema": ()},
    }
    again = dumo.recipe(digits.spec, {"train.steps": 3, "path": load("digits").path})
    assert again == digits.spec.model_copy(update={"train": digits.spec.train.model_copy(update={"steps": 3})})


@pytest.mark.parametrize("plain", [np.int64, np.float32, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(plain: Callable[[int], Any]) -> None:
    assert dumo.recipe("moons", {"train.optimizer.lr": plain(1)}).train.optimizer.lr == 1
    assert dumo.recipe("moons", {"sample.nfe": np.arange(1, 3)}).sample.nfe == (1, 2)


@pytest.mark.parametrize("value", [np.longdouble(1), np.array([1], dtype=np.longdouble)])
def test_numbers_that_python_does_not_have_are_refused(value: object) -> None:
    with pytest.raises(dumo.UserError, match=r"^train\.optimizer\.lr: .* must be a number, a string, a list or a dict"):
        dumo.recipe("moons", {"train.optimizer.lr": value})


@pytest.mark.slow
def test_samples_are_those_of_the_command(digits: LoadedRun, moons: LoadedRun, tmp_path: Path) -> None:
    def made(run: LoadedRun, count: int, *words: str) -> np.ndarray:
        done = call("sample", run.folder, "--format", "npz", "--nfe", "2", "--out", tmp_path, "--count", count, *words)
        with np.load(done.out.strip()) as archive:
            return archive["arr_0"]

    x = digits.sample(labels=[3, 5], nfe=2, seed=4)
    assert (x.shape, x.dtype, x.device.type) == ((2, 1, 8, 8), torch.float32, "cpu")
    assert (x.min(), x.max()) == (-1, 1)  # of weights like these many pixels lie beyond
    pictures = digits.pil(x)
    assert {picture.mode for picture in pictures} == {"L"}
    assert np.array_equal(
        np.stack([image.convert("RGB") for image in pictures]), made(digits, 2, "--labels", "3,5", "--seed", "4")
    )
    raw = digits.make_samples(torch.tensor([3, 5]), nfe=2, seed=4).x
    assert torch.equal(x, raw.clamp(-1, 1))
    points = moons.sample(count=5, nfe=2)
    assert torch.equal(points, torch.from_numpy(made(moons, 5)))
    assert points.abs().max() > 1  # and points are left where they are


def test_samples_by_default(digits: LoadedRun) -> None:
    own = digits.spec.sample
    assert len(digits.sample()) == DEFAULT_COUNT
    assert len(digits.sample([1, 2, 3])) == 3
    same = digits.sample(labels=7, count=2)
    assert torch.equal(same, digits.sample([7, 7], nfe=own.nfe[0], seed=own.seed, solver=own.solver.kind))
    assert torch.equal(digits.sample(count=3), digits.sample(torch.arange(3)))
    assert (
        len(digits.make_samples(torch.tensor([10]), nfe=1).x) == 1
    )  # no class is a condition by its number, one past the last, as the net has it
    assert not torch.equal(same, digits.sample(labels=7, count=2, solver="euler"))
    for seven in (torch.tensor(7), np.array(7), np.int64(7)):  # a number out of a tensor or an array
        assert torch.equal(same, digits.sample(labels=seven, count=2))


def test_a_count_that_leaves_some_out_is_refused_from_python_and_the_command_line(
    digits: LoadedRun, tmp_path: Path
) -> None:
    said = "count = 1 is less than the 2 labels"
    with pytest.raises(dumo.UserError, match=said):
        digits.sample([3, 5], count=1)
    done = call("sample", digits.folder, "--labels", "3,5", "--count", 1, "--out", tmp_path / "samples")
    assert (done.code, said in done.err, (tmp_path / "samples").exists()) == (2, True, False)
    with pytest.raises(dumo.UserError, match="count = 1 is less than the 2 prompts"):
        sample_to_files(digits, tmp_path / "samples", count=1, prompts=["a dog", "a cat"])


def test_classes_have_the_names_that_labels_take(digits: LoadedRun, moons: LoadedRun) -> None:
    assert digits.classes == tuple("0123456789")
    assert moons.classes == ()
    assert torch.equal(digits.sample(labels=digits.classes[3:5], nfe=1), digits.sample([3, 4], nfe=1))


def test_recipes_are_listed_as_by_the_command() -> None:
    assert dumo.recipes() == call("recipes", "--json").json["recipes"]
    first = dumo.recipes()[0]
    assert (first["name"], first["base"]) == ("digits", None)


def test_a_metric_of_ones_own_stands_in_the_rows_that_are_returned(digits: LoadedRun) -> None:
    def brightness(x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (500, 1, 8, 8)
        assert x.abs().max() <= 1
        return x.mean()

    report = digits.evaluate(nfe=1, seed=7, metrics={"brightness": brightness})
    (row,) = report["results"]
    samples = digits.sample(count=500, nfe=1, seed=7)
    assert row["brightness"] == pytest.approx(samples.mean().item(), abs=1e-6)
    in_file = json.loads(Path(report["file"]).read_text())["results"][0]
    assert in_file == {name: value for name, value in row.items() if name != "brightness"}
    with pytest.raises(dumo.UserError, match="metrics: the report already has a column nfe"):
        digits.evaluate(nfe=1, metrics={"nfe": lambda x: 0.0})


def test_runs_are_compared_as_by_the_command(digits: LoadedRun) -> None:
    digits.evaluate()
    rows = dumo.compare([digits])["rows"]
    assert rows == call("compare", digits.folder, "--json").json["rows"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dumo.compare(["nowhere"])


@pytest.mark.slow
def test_a_run_opened_otherwise_is_compared_by_its_own_evaluation(digits: LoadedRun, tmp_path: Path) -> None:
    folder = shutil.copytree(digits.folder, tmp_path / "run")
    run = dumo.load(folder, device="cpu")
    other = dumo.load(folder, weights=run.checkpoint.path / "net", device="cpu")
    known_report = run_places.folder("digits-trained") / "evaluation.json"
    shutil.copy(known_report, report_path(run, run.spec))
    with pytest.raises(dumo.UserError, match=r"evaluation-net-\w+\.json does not exist: call evaluate\(\) on this run"):
        dumo.compare([run, other])
    shutil.copy(known_report, report_path(other, other.spec))
    names = [row["run"] for row in dumo.compare([run, other])["rows"]]
    assert {*names} == {str(folder), str(report_path(other, other.spec))}


@pytest.mark.slow
def test_a_run_is_exported_as_by_the_command(digits: LoadedRun, tmp_path: Path) -> None:
    made = digits.export(tmp_path / "python")
    assert made == tmp_path / "python"
    assert call("export", digits.folder, "--out", tmp_path / "shell").code == 0
    files = {file.relative_to(made) for file in made.rglob("*.safetensors")}
    assert files
    for file in files:
        assert (made / file).read_bytes() == (tmp_path / "shell" / file).read_bytes()


def test_the_weights_that_were_given_are_exported(digits: LoadedRun, tmp_path: Path) -> None:
    file = tmp_path / "doubled.safetensors"
    save_file({name: 2 * x for name, x in load_weights(digits.file).items()}, file)
    out = dumo.load(digits.folder, weights=file, device="cpu").export(tmp_path / "out")
    [exported] = out.glob("*.safetensors")
    for name, x in load_file(exported).items():
        assert torch.equal(x, load_file(file)[name])


def test_an_export_has_what_is_set_from_python_and_the_command_line(digits: LoadedRun, tmp_path: Path) -> None:
    """And no evaluation that was of what the run has."""
    digits.evaluate(nfe=1)
    dumo.load(digits.folder, {"sample.solver.m": 0.25}, device="cpu").export(tmp_path / "python")
    assert call("export", digits.folder, "--out", tmp_path / "shell", "sample.solver.m=0.25").code == 0
    for out in (tmp_path / "python", tmp_path / "shell"):
        assert load(str(out)).sample.solver == Restart(m=0.25)
        assert "What it measured" not in (out / "README.md").read_text("utf-8")


def test_a_reading_is_the_nets(digits: LoadedRun) -> None:
    x, c, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 9]), torch.tensor([0.3, 1.0])
    v, u = digits.net(x, c, t=t)
    assert isinstance(digits.readings, Readings)
    assert torch.equal(digits.readings.velocity(x, t, c), v)
    assert torch.equal(digits.readings.endpoint(x, t, c), x - t.view(2, 1, 1, 1) * u)
    assert digits.readings.flow_map is None
    guided = dumo.load(digits.folder, {"sample.guide.scale": 3}, device="cpu").readings
    null = digits.net(x, torch.full_like(c, 10), t=t)[0]
    assert torch.allclose(guided.velocity(x, t, c), null + 3 * (v - null), atol=1e-5)


@pytest.mark.slow
def test_a_run_says_what_it_is_and_goes_on(digits: LoadedRun, moons: LoadedRun) -> None:
    assert (digits.step, digits.device.type, digits.codec, digits.net.training) == (2, "cpu", None, False)
    assert digits.spec == load(str(digits.folder))
    last = digits.folder / "checkpoints/step-00000002/net"
    assert dumo.load(digits.folder, weights=last).weights == str(last)
    again = dumo.train(moons.folder, {"train.steps": 3})
    assert (again.step, again.folder) == (3, moons.folder)


def test_a_home_is_found(digits: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(digits.folder.parent))
    assert dumo.load("~/digits").folder == digits.folder
    assert dumo.load("$HOME/digits").folder == digits.folder
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"the run's folder is .*, but NOWHERE is not set"):
        dumo.load("$NOWHERE/digits")
    changes = {"net.width": 16, "net.depth": 1, "train.batch": 8, "train.steps": 1}
    run = dumo.train("moons", changes, out="~/moons", device="cpu")
    assert run.folder == tmp_path / "moons"


def test_a_run_is_judged_and_reported(digits: LoadedRun) -> None:
    found = digits.evaluate(nfe=1, seed=3)
    assert [row["nfe"] for row in found["results"]] == [1]
    assert json.loads(Path(found["file"]).read_text()) == found
    page = digits.report()
    assert page == digits.folder / "report.html"
    assert page.is_file()


@pytest.mark.slow
def test_points_of_ones_own_are_judged_and_reported(tmp_path: Path) -> None:
    changes = {"net.width": 16, "net.depth": 1, "train.batch": 8, "train.steps": 2, "evaluate.protocol.samples": 60}
    run = dumo.train(data=np.random.default_rng(0).normal(size=(50, 3)), overrides=changes, out=tmp_path / "run")
    assert run.evaluate(nfe=1)["baselines"] == {}
    assert run.report().is_file()
