"""A run is one value, whether it comes from a recipe, a file over a base or a folder, and goes back to YAML whole."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from contract.case import members
from dumo.config.difference import differences
from dumo.config.load import RUN_FILE, dump, load, summary
from dumo.config.source import FORMAT, FORMAT_KEY, Origin, choose, read
from dumo.flow.solver import Heun, Hop
from dumo.io.yaml import parse_yaml
from dumo.objectives import FlowMatching, Objective
from dumo.training.ema import Ema
from dumo.types import UserError

ABOUT = "\ta 'quoted' \"line\": # no comment, - ünïcödé 你好 🙂 end "
ODD = [
    f"about={json.dumps(ABOUT, ensure_ascii=False)}",
    "about='yes'",
    "about='1e3'",
    "about=''",
    "train.optimizer.lr=1e-8",
    "train.optimizer.lr=0.1234567890123456789",
    "train.clip=1e300",
    "train.seed=123456789012345678901234567890",
    "train.ema=[{decay: 0.9999}, {decay: 0.5, ramp: false}]",
    "train.ema=[]",
    "train.ref=0.999",
    "sample.nfe=[3, 1]",
    "objective.slope.kind=jvp",
]


@pytest.mark.parametrize("override", ODD)
def test_what_is_dumped_is_loaded(override: str, tmp_path: Path) -> None:
    run = load("digits", [override])
    file = tmp_path / "odd name.yml"
    file.write_text(dump(run), encoding="utf-8")
    assert load(str(file)) == run
    assert dump(load(str(file))) == dump(run)


def leaves(tree: object, path: str = "") -> dict[str, Any]:
    """Every value of a tree that is no mapping, by its dotted path."""
    if isinstance(tree, dict):
        return {k: v for name, part in tree.items() for k, v in leaves(part, f"{path}.{name}").items()}
    return {path.removeprefix("."): tree}


@pytest.mark.parametrize("name", ["digits", "dumo-best", "cifar10-latents", "digits-words", "flux-lora"])
def test_a_dump_is_complete(name: str, tmp_path: Path) -> None:
    run, file = load(name), tmp_path / "run.yaml"
    file.write_text(dump(run), encoding="utf-8")
    tree = parse_yaml(dump(run))
    assert next(iter(tree.items())) == (FORMAT_KEY, FORMAT)
    del tree[FORMAT_KEY]
    found = leaves(tree)
    again = load(
        str(file), [f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in found.items()]
    )  # each by its path
    assert again == run
    assert list(differences(again, run)) == []
    assert {"train.optimizer.eps", "train.schedule.kind", "sample.solver.kind", "path.kind"} <= found.keys()
    assert {path for path in found if path.startswith("objective.times.")}


def test_a_summary_leaves_out_what_says_nothing() -> None:
    """Of the machine, and what is empty, where they stand at their defaults."""
    assert len(leaves(summary(load("digits")))) <= 48
    assert {"seed", "keep", "compile", "clip", "coupling"}.isdisjoint(summary(load("digits"))["train"])
    asked = ["train.seed=1", "train.keep=3", "train.clip=1", "teacher.source=x", "sample.guide.scale=1"]
    found = leaves(summary(load("digits", asked)))
    assert {name: found[name] for name in ("train.seed", "train.keep", "train.clip")} == {
        "train.seed": 1,
        "train.keep": 3,
        "train.clip": 1,
    }
    assert found["teacher.source"] == "x"
    assert not any(name.startswith(("teacher.guide", "sample.guide")) for name in found)


def test_a_new_kind_begins_with_its_own_defaults_and_an_old_one_goes_on() -> None:
    assert load("moons", ["net.kind=mlp"]) == load("moons")
    other = load(
        "moons", ["objective.kind=flow_matching", "sample.solver.kind=heun", "sample.nfe=[2]", "evaluate.nfe=[2]"]
    )
    assert other.objective == FlowMatching(drop=0.0)
    assert other.sample.solver == Heun()


def test_overrides_of_one_load_leave_the_next_alone() -> None:
    before = load("digits")
    load("digits", ["train.steps=5", "objective.kind=meanflow", "sample.solver.kind=hop"])
    assert load("digits") == before


@pytest.mark.slow
def test_garbage_never_gets_further_than_a_user_error(tmp_path: Path) -> None:
    text, file = dump(load("digits")), tmp_path / "a.yaml"
    g = random.Random(0)
    bits = ["", ":", "{", "-", "x", "\n", " ", "null", "[]", "-1"]
    said: list[str] = []
    for _ in range(150):
        at, cut = g.randrange(len(text)), g.randrange(1, 30)
        file.write_text(text[:at] + g.choice(bits) + text[at + cut :])
        try:
            load(str(file))
        except UserError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all(said)


def test_a_folder_by_a_recipe_s_name_hides_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert load("digits").data.kind == "digits"


def test_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run/run.yaml").touch()
    assert choose("digits").folder == choose("dumo:digits").folder == Path("runs/digits")
    assert choose("my/recipes/digits.small.yaml").folder == Path("runs/digits.small")
    assert choose("a run").folder == choose("a run/run.yaml").folder == Path("a run")
    assert choose(str(tmp_path / "a run")).folder == tmp_path / "a run"


PINNED = ["train.batch=128", "train.seed=0", "train.clip=null", "train.ema=[{decay: 0.999}]", "net.depth=4"]
PINNED += ["train.optimizer={kind: adamw, lr: 0.001, betas: [0.9, 0.95]}", "train.schedule={kind: cosine, warmup: 50}"]
PINNED += [
    "objective.slope={kind: central, h: 0.005}",
    "objective.times={kind: beta}",
    "net.time_scale=1",
    "train.steps=1000",
]


def changed(*overrides: str) -> list[str]:
    """What differs between a run and the run with overrides."""
    found = differences(load("digits", PINNED), load("digits", [*PINNED, *overrides]))
    return [str(difference) for difference in found if not difference.is_free]


def test_free_fields_may_differ() -> None:
    free = ["about=mine", "train.steps=7", "train.log_every=1", "train.save_every=2", "train.keep=9"]
    free += ["train.micro_batch=16", "train.share=2", "train.reshard=true"]
    free += [
        "sample.solver.kind=euler",
        "sample.nfe=[8]",
        "sample.seed=4",
        "evaluate.seed=5",
        "evaluate.protocol.samples=600",
    ]
    assert changed(*free) == []
    assert load("digits", free) != load("digits")


@pytest.mark.parametrize(
    ("override", "line", "may"),
    [
        ("train.batch=16", "train.batch: 128 recorded, 16 requested", False),
        ("train.seed=1", "train.seed: 0 recorded, 1 requested", False),
        ("train.clip=0.5", "train.clip: null recorded, 0.5 requested", True),
        ("train.optimizer.lr=0.5", "train.optimizer.lr: 0.001 recorded, 0.5 requested", True),
        ("train.optimizer.kind=adam", "train.optimizer: {betas: [0.9, 0.95], ", False),
        (
            "train.optimizer.betas=[0.5, 0.6]",
            "train.optimizer.betas: [0.9, 0.95] recorded, [0.5, 0.6] requested",
            False,
        ),
        ("train.schedule.warmup=1", "train.schedule.warmup: 50 recorded, 1 requested", True),
        (
            "train.schedule.kind=constant",
            "train.schedule: {kind: cosine, warmup: 50} recorded, {kind: constant, ",
            True,
        ),
        ("objective.slope.h=0.01", "objective.slope.h: 0.005 recorded, 0.01 requested", True),
        (
            "objective.slope.kind=jvp",
            "objective.slope: {h: 0.005, kind: central} recorded, {kind: jvp} requested",
            True,
        ),
        ("objective.drop=0.2", "objective.drop: ", False),
        ("path.sd=0.5", "path.sd: 1.0 recorded, 0.5 requested", False),
        ("net.depth=2", "net.depth: 4 recorded, 2 requested", False),
        ("train.ema=[]", "train.ema: [{decay: 0.999, ramp: true}] recorded, [] requested", False),
        ("train.ema=[{decay: 0.5}]", "train.ema: [{decay: 0.999, ramp: true}] recorded, [{decay: 0.5, ", False),
    ],
)
def test_difference(override: str, line: str, may: bool) -> None:
    """What is told of a field, and whether it may change where a run goes on."""
    assert [one.startswith(line) for one in changed(override)] == [True]
    [difference] = differences(load("digits", PINNED), load("digits", [*PINNED, override]))
    assert difference.decides != may


def test_difference_tells_each_field_from_left_to_right() -> None:
    assert changed("train.batch=16", "net.depth=2", "train.steps=3", "train.seed=4") == [
        "net.depth: 4 recorded, 2 requested",
        "train.batch: 128 recorded, 16 requested",
        "train.seed: 0 recorded, 4 requested",
    ]
    assert list(map(str, differences(Hop(), Hop(start=0.5)))) == ["start: 1.0 recorded, 0.5 requested"]
    assert list(map(str, differences(Ema(decay=0.5), Ema(decay=0.5, ramp=False), "a."))) == [
        "a.ramp: true recorded, false requested"
    ]


def test_every_slope_and_precision_may_change() -> None:
    for objective in members(Objective):
        if slope := objective.model_fields.get("slope"):
            assert isinstance(slope.json_schema_extra, dict)
            assert slope.json_schema_extra["changes"]


def test_a_header_stands_in_run_yaml_and_is_no_field(tmp_path: Path) -> None:
    run = load("digits")
    origin = Origin(run="/old", step=3)
    (file := tmp_path / RUN_FILE).write_text(dump(run, {"hash": "abc", "origin": origin.model_dump()}))
    assert load(str(tmp_path)) == run
    assert (read(tmp_path).hash, read(tmp_path).origin) == ("abc", origin)
    file.write_text(dump(run))
    assert (read(tmp_path).hash, read(tmp_path).origin) == (None, None)


MINE = """base: {base}
about: mine
train: {{steps: 7}}
objective: {{kind: flow_matching, drop: 0.25}}
sample: {{solver: {{kind: euler}}}}
"""
FLOW = ["objective.kind=flow_matching", "objective.drop=0.25"]
SETS = ["about=mine", "train.steps=7", *FLOW, "sample.solver.kind=euler"]


def written(file: Path, text: str) -> str:
    """A file's path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_a_base_is_a_recipe(tmp_path: Path) -> None:
    assert load(written(tmp_path / "mine.yaml", MINE.format(base="digits"))) == load("digits", SETS)


@pytest.mark.parametrize("base", ["../other/my base.yaml", "../other/run", "../other/run/run.yaml", "$THERE/run"])
def test_a_base_is_a_file_or_a_folder_beside_it(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", str(tmp_path / "other"))
    monkeypatch.chdir(Path("/"))  # wherever the command is called
    for name in ("my base.yaml", "run/run.yaml"):
        written(tmp_path / "other" / name, dump(load("digits", ["net.depth=2"])))
    mine = written(tmp_path / "mine" / "mine.yaml", MINE.format(base=base))
    assert load(mine) == load("digits", ["net.depth=2", *SETS])
    assert load(mine, ["net.depth=3"]).net == load("digits", ["net.depth=3"]).net


def test_a_recipe_is_a_recipe_whatever_lies_beside_the_file(tmp_path: Path) -> None:
    written(tmp_path / "digits/run.yaml", dump(load("moons")))
    for base in ("digits", "dumo:digits"):
        assert load(written(tmp_path / "mine.yaml", f"base: {base}")) == load("digits")
    assert load(written(tmp_path / "mine.yaml", "base: ./digits")) == load("moons")


def test_a_base_may_have_a_base(tmp_path: Path) -> None:
    mine = written(tmp_path / "a/mine.yaml", MINE.format(base="digits-meanflow"))  # of which digits is the base
    assert load(mine) == load("digits-meanflow", SETS)
    written(tmp_path / "b/run.yaml", "base: ../a/mine.yaml\ntrain: {steps: 8, batch: 8}")
    last = written(tmp_path / "c.yaml", "base: b\ntrain: {batch: 4}")
    assert load(last) == load("digits-meanflow", [*SETS, "train.steps=8", "train.batch=4"])


@pytest.mark.parametrize("name", ["run.yaml", "mine.yaml"])
@pytest.mark.parametrize("line", ["", f"format: {FORMAT}\n"])
def test_a_file_may_say_its_format(name: str, line: str, tmp_path: Path) -> None:
    text = f"{line}base: digits\ntrain: {{micro_batch: 8}}"
    assert load(written(tmp_path / name, text)) == load("digits", ["train.micro_batch=8"])
