"""Pages do what they say when their commands are typed, of a net and a training made small."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from docs.page import blocks, lines
from docs.turn import tier
from dumo.lab.experiment import read_plan
from dumo.objectives import DuMo, base
from dumo.testing import CheckError
from dumo.types import Spec
from e2e.shell import TINY, call
from forked import ENVIRONMENT

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(name: str) -> Iterator[str]:
    """Type a page's commands, each of which must end well, and give what each printed; trainings are made small."""
    for line in lines(PAGES / f"{name}.md", "sh"):
        if "mine.yaml" in line or line.startswith("dumo encode"):
            continue  # `test_a_comparison_with_an_objective_of_ones_own` types them
        program, *words = shlex.split(line, comments=True)
        assert program == "dumo", line
        asks = ["--yes"] * (words[:2] == ["train", "photos"])  # there is no terminal to ask on
        done = call(*words, *asks, *(TINY if words[0] == "train" else ()))
        assert done.code == 0, (line, done)
        yield done.out


def photos(folder: Path) -> None:
    """Cats and dogs, of noise, and small enough to be learned in pixels."""
    g = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(g.integers(0, 256, (24, 28, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")


def test_a_law_of_t_alone_is_of_the_class_that_the_page_names() -> None:
    page = (PAGES / "own-objective.md").read_text(encoding="utf-8")
    named = re.search(r"To draw t alone, [^|]*subclass of `(\w+)`", page)
    assert named
    cls: type[Spec] = getattr(base, named[1])

    def one(self: Spec, n: int, g: Generator) -> Tensor:
        return torch.full((n,), 0.5)

    law = type("Half", (cls,), {"one": one})
    own = type("Own", (DuMo,), {"__annotations__": {"times": law}, "times": law()})
    t, r = own().times(3, Generator())
    assert (t.tolist(), r.tolist()) == ([0.5] * 3, [0.0] * 3)
    assert not own().times.climbs


@tier("photos")
def test_photos(here: Path) -> None:
    photos(here / "photos")
    *_, report = typed("photos")
    assert report.splitlines()[-1] == "runs/photos/report.html"


@tier("compare")
def test_a_comparison(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = read_plan("zoo")
    two = tuple(arm for arm in zoo.arms if arm.recipe in ("digits", "digits-meanflow"))
    monkeypatch.setattr("dumo.lab.reproduce.read_plan", lambda name: zoo.model_copy(update={"arms": two}))
    outputs = dict(zip(lines(PAGES / "compare.md", "sh"), typed("compare"), strict=False))
    assert "class_mmd" in outputs["dumo compare runs/meanflow-1 runs/dumo-1"]


@tier("compare")
def test_a_comparison_with_an_objective_of_ones_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's two files and commands as they stand, on digits, with small nets and few steps."""
    (code,) = blocks(PAGES / "compare.md", "python")
    (plan,) = blocks(PAGES / "compare.md", "yaml")
    small = "net.width=32, net.depth=1, train.batch=16, evaluate.protocol.samples=500"
    instead = {"cifar10-latents": "digits", "steps: 1200": "steps: 9", "data.images.count=5000": small}
    for words, small_words in instead.items():
        assert words in plan
        plan = plan.replace(words, small_words)
    (here / "mine.py").write_text(code, encoding="utf-8")
    (here / "mine.yaml").write_text(plan, encoding="utf-8")
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv("PYTHONPATH", f"{here}:{ROOT / 'src'}")  # of the processes in which arms are trained
    smoke, whole = (line for line in lines(PAGES / "compare.md", "sh") if "mine.yaml" in line)
    for line, folder, runs in ((smoke, "mine-smoke", 3), (whole, "mine-laptop", 9)):
        path, program, *words = shlex.split(line, comments=True)
        assert (path, program) == ("PYTHONPATH=.", "dumo")
        done = call(*words)
        assert done.code == 0, (line, done)
        results = json.loads((here / f"runs/reproduce/{folder}/results.json").read_text(encoding="utf-8"))
        assert len(results["cells"]) == runs
        assert [row["objective"] for row in results["table"]] == ["DuMo"] * 2 + ["MeanFlow"] * 2 + ["Mine"] * 2
        costs = [row["steps"] * row["F_per_step"] for row in results["table"]]
        assert max(costs) - min(costs) < 5  # a step
    assert {row["seeds"] for row in results["table"]} == {3}


@tier("paper")
def test_a_paper(here: Path) -> None:
    assert "as is" in list(typed("paper"))[-1]


@tier("own-objective")
def test_an_objective_in_a_file_of_ones_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file passes the check and trains by the commands; with the sign of its target flipped it fails the check."""
    file, check, *_ = blocks(PAGES / "own-objective.md", "python")
    (here / "mine.py").write_text(file, encoding="utf-8")
    (here / "mine_wrong.py").write_text(file.replace("v_hat - v_star", "v_hat + v_star"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(here))
    exec(check, {})
    with pytest.raises(CheckError, match="gradient_vanishes_at_the_flow"):
        exec(check.replace("from mine import", "from mine_wrong import"), {})

    train, sample = (line for line in lines(PAGES / "own-objective.md", "bash") if line.startswith("PYTHONPATH=. dumo"))
    for line, small in ((train, TINY), (sample, ())):
        done = call(*shlex.split(line)[2:], *small)
        assert done.code == 0, (line, done)


@tier("own-objective")
def test_an_objective_in_the_package(here: Path) -> None:
    """In a copy of the tree: with file and lines it trains; a law holds it, and breaks with its sign flipped."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", here)
    _, _, code, line, member = blocks(PAGES / "own-objective.md", "python")
    room = here / "src/dumo/objectives"
    listed = (room / "__init__.py").read_text(encoding="utf-8")
    wrong = {"AnyStep": "AnyWrong", "any_step": "any_wrong", "v_star - lift": "v_star + lift"}
    for twin in ({}, wrong):
        own = [code, line, member]
        for old, new in twin.items():
            own = [text.replace(old, new) for text in own]
        (room / f"{twin.get('any_step', 'any_step')}.py").write_text(own[0], encoding="utf-8")
        for place, text in (("from dumo.objectives.consistency", own[1]), ("    | Consistency", f"    {own[2]}")):
            listed = listed.replace(place, f"{text}{place}")
    (room / "__init__.py").write_text(listed, encoding="utf-8")

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        env = ENVIRONMENT | {"PYTHONPATH": str(here / "src"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.run([sys.executable, "-m", *words], cwd=here, env=env, capture_output=True, text=True)

    command = shlex.split(blocks(PAGES / "own-objective.md", "sh")[0])
    done = run("dumo", *command[1:], *TINY, "train.steps=2")
    assert (done.returncode, "runs/any-step" in done.stderr) == (0, True), done.stderr
    law = "tests/theory/test_fixed_point.py::test_gradient_vanishes_at_the_flow"
    bare = ("-o", "addopts=--import-mode=importlib")  # shapes are not checked, which takes longer than this law
    found = run("pytest", "-q", "-p", "no:cacheprovider", *bare, "--collect-only", "tests/contract").stdout
    laws = {kind: {*re.findall(rf"::(\w+)\[.*{kind}", found)} for kind in ("any_step", "dumo_any")}
    assert laws["any_step"] == laws["dumo_any"]  # the contract tests find it, as they found its siblings
    assert len(laws["any_step"]) > 15
    said = run("pytest", "-q", "-rA", "-p", "no:cacheprovider", *bare, law, "-k", "any_").stdout
    assert {one.startswith("PASSED") for one in said.splitlines() if re.match(r"[A-Z]+ .*\[any_step", one)} == {True}
    assert {one.startswith("FAILED") for one in said.splitlines() if re.match(r"[A-Z]+ .*\[any_wrong", one)} == {True}
