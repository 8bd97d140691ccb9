"""The first minute: help, recipes, show; and that none of the quick commands waits for torch."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from dumo.config import recipe_files
from dumo.config.load import load, summary
from dumo.config.source import FORMAT, FORMAT_KEY, read
from dumo.run.net import meta_net
from dumo.run.resolve import resolve
from dumo.run.weights import build
from e2e.shell import TINY, call, refused
from forked import ENVIRONMENT
from tiers import tiered

QUICK = """
import contextlib, io, json, sys
from dumo import cli
found = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["dumo", *words]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main()
        except SystemExit as ended:
            found[" ".join(words)] = [ended.code, len(out.getvalue()), [m for m in HEAVY if m in sys.modules]]
print(json.dumps(found))
"""
HEAVY = ["torch", "numpy", "sklearn", "matplotlib", "safetensors"]


@pytest.mark.slow
def test_quick_commands_import_nothing_heavy() -> None:
    words = [[], ["--help"], ["-h"], ["--version"], ["recipes"]]
    words += [["train", "--help"], ["reproduce", "-h"], ["frobnicate"]]
    words += [["train"], ["sample", "x", "--count", "0"], ["evaluate", "x", "--seed", "-1"]]
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {HEAVY}\n{QUICK}", json.dumps(words)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert len(found) == len(words)
    wrong = {"", "frobnicate", "train", "sample x --count 0", "evaluate x --seed -1"}
    for asked, (code, printed, heavy) in found.items():
        assert code == (2 if asked in wrong else 0), asked
        assert printed > (10 if asked == "--version" else 50), asked
        assert heavy == [], asked


@pytest.mark.slow
def test_help_names_every_command() -> None:
    done = call("--help")
    assert (done.code, done.err) == (0, "")
    assert call("--version").out == f"dumo {metadata.version('dumo')}\n"
    for command in ("recipes", "show", "train", "sample", "evaluate", "compare", "reproduce", "report"):
        assert f" {command} " in done.out
        one = call(command, "--help")
        assert one.code == 0
        assert "Usage:" in one.out


def test_recipes_are_listed_by_purpose_with_what_they_are() -> None:
    done, told = call("recipes"), call("recipes", "--json")
    assert (done.code, done.err, told.code, told.err) == (0, "", 0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]  # as grep sees them: a recipe, a line
    expected: list[str] = []
    for group, names in recipe_files.by_group().items():
        expected += [group, *(f"{name} {recipe_files.tree(name)['about']}" for name in names)]
    assert [line for line in lines if line][: len(expected)] == expected
    assert "dumo show NAME --yaml > my.yaml" in done.out
    assert told.json["recipes"] == [
        {
            "name": name,
            "about": recipe_files.tree(name)["about"],
            "group": group,
            "base": recipe_files.tree(name).get("base"),
        }
        for group, names in recipe_files.by_group().items()
        for name in names
    ]


def kinds() -> list[str]:
    """A recipe of every net: what `show` counts depends on little else. Of large nets the quickest to count."""
    first = {read(name).tree["net"]["kind"]: name for name in reversed(recipe_files.names())}
    return list((first | {"diffusers": "sana", "unet": "cifar10-small"}).values())


KINDS = kinds()


@pytest.mark.parametrize("name", tiered(KINDS, ci={*KINDS} - {"sana", "cifar10-small"}))
def test_show_json_is_one_object_and_true(name: str, here: Path) -> None:
    done = call("show", name, "--json")
    assert (done.code, done.err) == (0, "")
    spec = resolve(load(name))
    facts = done.json
    assert facts["spec"] == summary(spec)
    net = build(spec) if facts["parameters"] < 1e8 else meta_net(spec)  # XL takes seconds and 2.7 GB
    assert facts["parameters"] == sum(p.numel() for p in net.parameters())
    assert 2.5 <= facts["forward_units_per_step"] <= 18  # a pass, its backward, and the passes of the targets
    assert facts["forward_flops_per_image"] > facts["parameters"]  # each weight is used at least once, two to a use
    assert (facts["far"] is None) == (not (spec.readings.endpoint or spec.readings.flow_map))
    assert list(here.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("alone", [[], ["--yaml"]])
def test_what_show_prints_is_a_file_that_trains(alone: list[str], here: Path) -> None:
    about = "a long line that says what this is " * 5
    words = [*TINY, f"about={about}", "train.steps=2"]
    done = call("show", "digits-guided", *words, *alone)
    assert (done.code, done.err) == (0, "")
    (here / "my.yaml").write_text(done.out)
    assert "base" not in yaml.safe_load(done.out)  # it is whole
    facts = ("# parameters", "# one step", "# P(t - r > 0.9)", "# guidance scale")
    assert [fact in done.out for fact in facts] == [not alone] * len(facts)
    assert call("train", "my.yaml").code == 0
    assert load("my.yaml") == load("digits-guided", words)
    assert load("runs/my").model_copy(update={"resolved": {}}) == load("my.yaml")
    assert "base" not in yaml.safe_load((here / "runs/my/run.yaml").read_text())


def test_what_was_typed_stays_in_its_comment(here: Path) -> None:
    (here / "a\tb\x07.yaml").write_text("base: digits")
    done = call("show", "a\tb\x07.yaml", "--yaml", "about='one\n\n  about: two'")
    run = load("digits")
    assert yaml.safe_load(done.out) == {FORMAT_KEY: FORMAT, **summary(run), "about": "one\nabout: two"}
    whole = call("show", "digits", "--yaml", "--all")
    assert yaml.safe_load(whole.out) == {FORMAT_KEY: FORMAT, **run.model_dump(mode="json", exclude={"resolved"})}
    refused("show", "digits", "--yaml", "--json", named=("--yaml prints only the run",), lines=None)


def test_a_teacher_s_code_runs_on_train_alone_and_is_named_before(here: Path) -> None:
    """It may be in a file of somebody else's: to look at that is safe."""
    text = "open('ran', 'w').close()\nfrom dumo.types import Readings\n"
    text += "make = lambda run, device: Readings(velocity=lambda x, t, c: x)"
    (here / "loud_teacher.py").write_text(text)
    teacher = "{kind: python, source: 'loud_teacher:make'}"
    (here / "theirs.yaml").write_text(f"base: moons\nteacher: {teacher}\ntrain: {{steps: 2, batch: 4}}\n")
    for command, *words in (["show"], ["show", "--cost"]):
        done = call(command, "theirs.yaml", *words)
        assert (done.code, "executes" in done.err) == (0, False)
    assert not (here / "ran").exists()
    refused("train", "theirs.yaml", named=("runs code: loud_teacher:make", "--trust-code"), lines=None)
    assert not (here / "ran").exists()
    done = call("train", "theirs.yaml", "--trust-code")
    assert (here / "ran").exists()
    assert done.err.startswith("teacher.source: this run executes loud_teacher:make\n")
