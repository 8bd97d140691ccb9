"""The first minute: help, recipes, show; and that none of the quick commands waits for torch."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from dumo import recipes
from dumo.config.load import load
from e2e.shell import ENVIRONMENT, call, sets

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


def test_help_names_every_command() -> None:
    done = call("--help")
    assert done.code == 0
    assert done.err == ""
    for command in ("recipes", "show", "dry", "train", "sample", "evaluate", "compare", "reproduce", "report", "grid"):
        assert f" {command} " in done.out
        one = call(command, "--help")
        assert one.code == 0
        assert "Usage:" in one.out


def test_version_is_the_packages() -> None:
    assert call("--version").out == f"dumo {metadata.version('dumo')}\n"


def test_recipes_are_listed_with_what_they_are() -> None:
    done = call("recipes")
    assert (done.code, done.err) == (0, "")
    flat = " ".join(done.out.split())
    for name in recipes.names():
        assert f"{name} {recipes.about(name)}" in flat


def kinds() -> list[str]:
    """A recipe of every objective, net and data: what `show` counts depends on little else."""
    trees = {name: yaml.safe_load(recipes.text(name)) for name in recipes.names()}
    return list(
        {tuple(tree[part]["kind"] for part in ("objective", "net", "data")): n for n, tree in trees.items()}.values()
    )


@pytest.mark.parametrize("name", kinds())
def test_show_json_is_one_object_and_true(name: str, here: Path) -> None:
    done = call("show", name, "--json")
    assert (done.code, done.err) == (0, "")
    spec = load(name)
    facts = done.json
    assert facts["spec"] == spec.model_dump(mode="json")
    net = spec.build() if facts["parameters"] < 1e8 else spec.outline()  # XL takes seconds and 2.7 GB
    assert facts["parameters"] == sum(p.numel() for p in net.parameters())
    assert 2.5 <= facts["forward_units_per_step"] <= 18  # a pass, its backward, and the passes of the targets
    assert facts["forward_flops_per_image"] > facts["parameters"]  # each weight is used at least once, two to a use
    assert (facts["far"] is None) == (not (spec.reads.endpoint or spec.reads.flow_map))
    assert list(here.iterdir()) == []


def test_show_prints_the_complete_spec_in_full_width(here: Path) -> None:
    about = "a long line that says what this is " * 5
    done = call("show", "digits", *sets(f"about={about}", "train.steps=7"))
    assert (done.code, done.err) == (0, "")
    (here / "mine.yaml").write_text(done.out.split("\nparameters")[0])  # as the error for no run's YAML advises
    assert load("mine.yaml") == load("digits", [f"about={about}", "train.steps=7"])
    for fact in ("parameters", "one step", "P(t - r > 0.9)", "guidance scale"):
        assert fact in done.out


def test_set_reaches_every_depth_and_the_last_wins(here: Path) -> None:
    words = sets("train.steps=5", "train.ema.0.decay=0.5", "objective.guide.zeta=0.5", "train.steps=6")
    spec = call("show", "digits", "--json", *words).json["spec"]
    assert (spec["train"]["steps"], spec["train"]["ema"][0]["decay"]) == (6, 0.5)
    assert spec["objective"]["guide"]["zeta"] == 0.5
    assert call("show", "digits", "--json", *words).json["guidance_scale"] == 2.0


def test_a_file_is_as_good_as_a_recipe(here: Path) -> None:
    tree = yaml.safe_load(recipes.text("moons"))
    (here / "my moons.yaml").write_text(yaml.safe_dump(tree))
    assert call("show", "my moons.yaml", "--json").json == call("show", "moons", "--json").json
