"""A run is one value, whether it comes from a recipe, a file or a folder, and goes back to YAML whole."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from contract.case import members
from dumo.flow.solver import Heun, Hop
from dumo.objectives import Objective
from dumo.run.config import recipes
from dumo.run.config.load import FILE, default_folder, difference, differences, dump, load, parse, summary
from dumo.run.config.source import FORMAT, KEY, Noted, noted
from dumo.run.config.tree import Sampling
from dumo.training.ema import Ema
from dumo.types import UserError

ABOUT = "\ta 'quoted' \"line\": # no comment, - ünïcödé 你好 🙂 end "
ODD = [
    f"about={json.dumps(ABOUT)}",
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


def test_a_file_and_a_folder_are_as_good_as_a_recipe(tmp_path: Path) -> None:
    for name in ("digits", "dumo-best", "moons"):
        run = load(name)
        (tmp_path / "run.yaml").write_text(dump(run), encoding="utf-8")
        assert load(str(tmp_path)) == load(str(tmp_path / "run.yaml")) == run


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


@pytest.mark.parametrize("name", recipes.names())
def test_a_dump_is_complete(name: str, tmp_path: Path) -> None:
    run, file = load(name), tmp_path / "run.yaml"
    file.write_text(dump(run), encoding="utf-8")
    tree = recipes.parse_yaml(dump(run))
    assert next(iter(tree.items())) == (KEY, FORMAT)
    del tree[KEY]
    found = leaves(tree)
    again = load(str(file), [f"{path}={json.dumps(value)}" for path, value in found.items()])  # each by its path
    assert again == run
    assert list(difference(again, run)) == []
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


def test_overrides_come_one_after_another() -> None:
    assert load("digits", ["train.steps=5", "train.steps=7"]).train.steps == 7
    run = load("moons", ["sample.solver.kind=restart", "sample.solver.start=0.9"])
    assert run.sample.solver.model_dump() == {"kind": "restart", "m": 0.5, "start": 0.9}


def test_a_new_kind_begins_with_its_own_defaults_and_an_old_one_goes_on() -> None:
    assert load("moons", ["net.kind=mlp"]) == load("moons")
    other = load(
        "moons", ["objective.kind=flow_matching", "sample.solver.kind=heun", "sample.nfe=[2]", "evaluate.nfe=[2]"]
    )
    assert other.objective.kind == "flow_matching"
    assert other.objective == type(other.objective)()
    assert other.sample.solver == Heun()
    with pytest.raises(UserError, match=r"objective\.beta: unknown key"):
        load("moons", ["objective.beta=0.5", "objective.kind=flow_matching", "objective.beta=0.5"])


def test_overrides_of_one_load_leave_the_next_alone() -> None:
    before = load("digits")
    load("digits", ["train.steps=5", "objective.kind=meanflow", "sample.solver.kind=hop"])
    assert load("digits") == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "--set train.steps: write it as a.b=c"),
        ("=3", "--set =3: write it as a.b=c"),
        ("", "--set : write it as a.b=c"),
        ("train.steps=[", "is not a YAML value"),
        ("train.steps.more=1", r"train\.steps is \d+, a value without fields"),
        ("about.more=1", "about is .*, a value without fields"),
        ("train.ema.1.decay=0.5", "train.ema.1: this is a list of 1; give a place from 0 to 0"),
        ("train.ema.first.decay=0.5", "train.ema.first: this is a list"),
        ("train.ema.1=0.5", "train.ema.1: this is a list"),
        ("train.ema.²=0.5", "train.ema.²: this is a list"),
    ],
)
def test_overrides_that_go_nowhere(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("digits", [override])


def test_a_place_in_an_empty_list() -> None:
    with pytest.raises(UserError, match=r"train\.ema\.0") as refused:
        load("digits", ["train.ema=[]", "train.ema.0.decay=0.5"])
    assert "-1" not in str(refused.value)  # there is no place to give


@pytest.mark.parametrize(
    "text", ["a: [1, 2\nb: }", "\t- x", "a: !!python/name:os.system", "a: *b", "a: 1\n b: 2", "\x00"]
)
def test_what_is_not_yaml(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml is not YAML") as refused:
        load(str(file))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "3", "- 1", "null", "text", "2026-01-01"])
def test_what_holds_no_run(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml holds no run"):
        load(str(file))


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


def test_mistakes_of_a_file_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump(load("digits", ["train.batch=77"])).replace("batch: 77", "batch: -1"))
    with pytest.raises(UserError, match=r"train\.batch") as refused:
        load(str(tmp_path))
    assert str(tmp_path / "run.yaml") in str(refused.value)


def test_a_folder_by_a_recipe_s_name_hides_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert load("digits").data.kind == "digits"


def test_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run/run.yaml").touch()
    assert default_folder("digits") == Path("runs/digits")
    assert default_folder("my/recipes/digits.small.yaml") == Path("runs/digits.small")
    assert default_folder("a run") == default_folder("a run/run.yaml") == Path("a run")
    assert default_folder(str(tmp_path / "a run")) == tmp_path / "a run"


def test_parse_tells_every_mistake() -> None:
    with pytest.raises(UserError) as refused:
        parse(Sampling, {"solver": {"kind": "hopp"}, "seed": -1, "nfee": []})
    assert sorted(line.split(":")[0] for line in str(refused.value).splitlines()) == ["nfee", "seed", "solver.kind"]


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
    return list(difference(load("digits", PINNED), load("digits", [*PINNED, *overrides])))


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
    ("override", "line"),
    [
        ("train.batch=16", "train.batch: 128 there, 16 asked"),
        ("train.seed=1", "train.seed: 0 there, 1 asked"),
        ("train.clip=0.5", "train.clip: null there, 0.5 asked"),
        ("train.optimizer.lr=0.5", "train.optimizer.lr: 0.001 there, 0.5 asked"),
        ("train.optimizer.betas=[0.5, 0.6]", "train.optimizer.betas: [0.9, 0.95] there, [0.5, 0.6] asked"),
        ("train.schedule.warmup=1", "train.schedule.warmup: 50 there, 1 asked"),
        ("objective.slope.kind=jvp", "objective.slope: {h: 0.005, kind: central} there, {kind: jvp} asked"),
        ("net.depth=2", "net.depth: 4 there, 2 asked"),
        ("train.ema=[]", "train.ema: [{decay: 0.999, ramp: true}] there, [] asked"),
        ("train.ema=[{decay: 0.5}]", "train.ema: [{decay: 0.999, ramp: true}] there, [{decay: 0.5, ramp: true}] asked"),
    ],
)
def test_difference(override: str, line: str) -> None:
    assert changed(override) == [line]


def test_difference_tells_each_field_from_left_to_right() -> None:
    assert changed("train.batch=16", "net.depth=2", "train.steps=3", "train.seed=4") == [
        "net.depth: 4 there, 2 asked",
        "train.batch: 128 there, 16 asked",
        "train.seed: 0 there, 4 asked",
    ]
    assert list(difference(Hop(), Hop(start=0.5))) == ["start: 1.0 there, 0.5 asked"]
    assert list(difference(Ema(decay=0.5), Ema(decay=0.5, ramp=False), "a.")) == ["a.ramp: true there, false asked"]


def test_another_family_member_is_told_whole() -> None:
    (line,) = changed("objective.times.kind=uniform")
    assert line.startswith("objective.times: {")
    assert "kind: beta" in line
    assert "kind: uniform" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("override", "may"),
    [
        ("train.optimizer.lr=0.5", True),
        ("train.optimizer.kind=adam", False),
        ("train.optimizer.betas=[0.5, 0.6]", False),
        ("train.schedule.warmup=1", True),
        ("train.schedule.kind=constant", True),
        ("train.clip=0.5", True),
        ("objective.slope.h=0.01", True),
        ("objective.slope.kind=jvp", True),
        ("objective.drop=0.2", False),
        ("train.ema=[]", False),
        ("net.depth=2", False),
    ],
)
def test_what_may_change_on_resume(override: str, may: bool) -> None:
    found = [*differences(load("digits", PINNED), load("digits", [*PINNED, override]))]
    assert [one.may for one in found] == [may]


def test_every_slope_and_precision_may_change() -> None:
    for objective in members(Objective):
        if slope := objective.model_fields.get("slope"):
            assert isinstance(slope.json_schema_extra, dict)
            assert slope.json_schema_extra["changes"]


def test_what_was_changed_stands_in_run_yaml_and_is_no_field(tmp_path: Path) -> None:
    run = load("digits")
    past = [Noted(step=5, field="train.clip", was=None, now=1.0), Noted(step=9, field="data", was="a", now="b")]
    (file := tmp_path / FILE).write_text(text := dump(run, past))
    assert load(str(tmp_path)) == run
    assert noted(tmp_path) == past
    (other := tmp_path / "other.yaml").write_text(text)
    assert load(str(other)) == run
    file.write_text(dump(run))
    assert "changed" not in file.read_text()
    assert noted(tmp_path) == []
    for wrong in ("3", "[{step: 1}]", "[{step: a, field: b, was: 1, now: 2}]"):
        file.write_text(f"changed: {wrong}\n" + dump(run))
        with pytest.raises(UserError, match=r"run\.yaml: changed.*mend or remove it"):
            load(str(tmp_path))
