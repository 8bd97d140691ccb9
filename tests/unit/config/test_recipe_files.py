"""A recipe, over its bases, says all that its summary says: nothing is left to a default that might change."""

import json
import re
from pathlib import Path

import pytest
import yaml

import measured
from dumo.config import recipe_files
from dumo.config.check_spec import advice
from dumo.config.load import dump, load, summary
from dumo.config.source import FORMAT_KEY, read
from dumo.io.hub import PUBLISHED
from dumo.io.yaml import parse_yaml
from dumo.lab import experiment
from recipe import recipe

NAMES = recipe_files.names()


def keys(tree: object, path: str = "") -> set[str]:
    """The dotted paths of a tree's values."""
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path} | {key for name, part in parts for key in keys(part, f"{path}.{name}")}


def whole(name: str) -> str:
    """All that a recipe says: its own text, and before it that of its bases."""
    base = recipe_files.tree(name).get("base")
    base = base and re.sub(r"\$\{\w+:-(.*)\}", r"\1", base)  # that of an unset variable
    return (whole(base) if base else "") + recipe_files.text(name)


# By recipe, fields that a run below may have, which are null, and are not written where they are
TAKEN_AWAY = {"personal": {".train.minutes", ".data.images.count", ".data.images.names"}}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_complete_and_says_what_it_is(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where no folder is named; over a base it says less than the whole, and values are of their own types."""
    monkeypatch.chdir(tmp_path)
    for variable in re.findall(r"\$(\w+)", whole(name)):
        monkeypatch.delenv(variable, raising=False)
    tree, run, base, about = (
        read(name).tree,
        load(name),
        recipe_files.tree(name).get("base"),
        recipe_files.tree(name)["about"],
    )
    assert keys(summary(run)) <= keys(tree) <= keys(run.model_dump(mode="json")) | TAKEN_AWAY.get(name, set())
    assert (base, base == name) == (parse_yaml(recipe_files.text(name)).get("base"), False)
    if base:
        assert len(recipe_files.text(name).splitlines()) <= len(dump(run, short=True).splitlines())
    assert not advice(run)  # it is as its source has it
    assert 10 <= len(about) <= 80
    assert about == about.strip() == run.about
    assert "\n" not in about
    if (
        len(run.shown_shape) == 3
    ):  # what an override changes the report says; of ImageNet the size is in the name of the task
        assert str(run.shown_shape[1]) not in re.findall(r"(?<!ImageNet )\b\d+\b", about)
    resolved = parse_yaml(dump(run))
    del resolved[FORMAT_KEY]
    assert run == type(run).model_validate(resolved)
    for key in tree:  # 1e-3 is text to YAML 1.1; the value that it resolves to is a number
        assert tree[key] == {**resolved, key: tree[key]}[key]
        plain = re.sub(r"'[^'\n]*\{n?\}[^'\n]*'", "", yaml.safe_dump(tree[key]))  # but for templates
        assert "'" not in plain.replace("''", ""), key  # the empty text aside


def test_a_subject_has_its_own_length_images_and_evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And not those of the few-step run below it."""
    classes = {"split": "train", "count": 50, "names": ["a", "b"], "classes": 4}
    templates = "data.images.captions={kind: templates, templates: ['a {}'], held: ['the {}']}"
    evaluation = ["evaluate.every=100", "evaluate.best=true", "evaluate.split=test", "evaluate.captions=held"]
    fields = [f"data.images.{name}={value}" for name, value in classes.items()]
    few_step_run = load("sd3-lora", ["train.minutes=30", templates, *fields, *evaluation])
    (tmp_path / "run.yaml").write_text(dump(few_step_run))
    monkeypatch.delenv("FEW_STEPS", raising=False)
    expected = load("personal")
    monkeypatch.setenv("FEW_STEPS", str(tmp_path))
    run = load("personal")
    assert (run.data, run.train, run.evaluate) == (expected.data, expected.train, expected.evaluate)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_its_group(name: str) -> None:
    assert recipe_files.tree(name)["group"] in recipe_files.GROUPS, (
        f"{name}.yaml: write a line `group:`, one of recipes.GROUPS"
    )
    assert "group" not in read(name).tree  # it is no field of a run


def test_recipes_are_listed_by_group() -> None:
    by_group = recipe_files.by_group()
    assert (*by_group,) == recipe_files.GROUPS
    assert all(by_group.values()), "a group without a recipe"
    assert by_group["Start here"][0] == "digits"
    assert by_group["Your own images"] == ["my-images", "my-images-256", "my-images-64", "my-images-buckets"]
    assert [row["name"] for row in recipe_files.rows()] == [name for names in by_group.values() for name in names]
    assert len({recipe_files.tree(name)["about"] for name in NAMES}) == len(NAMES)


SIBLINGS = [
    ("digits", "digits-flow-matching", "digits-meanflow"),
    ("moons", "moons-flow-matching", "moons-meanflow"),
    ("cifar10", "cifar10-meanflow"),
]


@pytest.mark.parametrize("names", SIBLINGS)
def test_siblings_differ_in_what_they_compare_only(names: tuple[str, ...]) -> None:
    runs = [recipe(name) for name in names]
    for part in ("data", "net", "path"):
        assert len({getattr(run, part) for run in runs}) == 1
    assert len({run.train.model_copy(update={"steps": 1}) for run in runs}) == 1  # steps may pay for dearer ones
    assert len({run.evaluate.protocol for run in runs}) == 1


# The paper's FID in one pass and two (Tab. 1); of B/2 the best in one pass (Fig. 4), of three heads in one (Sec. 4.3)
FID = {
    "imagenet256-xl2": ("3.07", "2.82"),
    "imagenet256-xl2-432": ("2.60", "1.79"),
    "imagenet256-xl2-meanflow": ("3.43", "2.93"),
    "imagenet256-xl2-three-heads": ("2.84",),
    "imagenet256-xl2-three-heads-shortcut": ("4.73",),
    "imagenet512-xl4": ("3.47", "2.76"),
    "imagenet512-xl4-meanflow": ("4.21", "3.41"),
    "imagenet512-xl1-dcae": ("2.89", "2.23"),
    "imagenet256-b2": ("63.86",),
    "imagenet256-b2-meanflow": ("76.04",),
}


@pytest.mark.parametrize("name", [name for name in NAMES if re.match(r"imagenet\d", name)])
def test_a_full_size_recipe_says_what_the_paper_has_and_where_its_numbers_come_from(name: str) -> None:
    text = recipe_files.text(name)
    head, lines = text[: text.index("about:")], [line.strip() for line in whole(name).splitlines()]
    for fid in FID[name] if name in FID else (name.removesuffix("-dual"),):
        assert fid in head
    for key in ("lr", "betas", "decay", "batch", "steps", "micro_batch", "drop", "zeta", "ramp"):
        assert any(re.match(rf"(- )?{key}: .+ # .+", line) for line in lines), key


@pytest.mark.parametrize("name", recipe_files.by_group()["A pretrained transformer"])
def test_a_pretrained_transformer_is_tuned_as_published(name: str) -> None:
    """Settings of TwinFlow's released code; and latents are what each model's own pipeline decodes."""
    if name.endswith(("dmd2", "tdm")):
        return  # the next test
    run, is_twinflow = recipe(name).model_dump(), name.endswith("twinflow")
    full = "lora" not in name and not is_twinflow
    train, net, codec = run["train"], run["net"], run["data"]["codec"]
    assert (train["optimizer"]["lr"], train["optimizer"]["betas"], train["clip"]) == (
        1e-5 if full else 1e-4,
        (0.9, 0.99),
        1,
    )
    assert net["lora"] is None if full else net["lora"]["rank"] == 64
    times = "quarters" if is_twinflow else "uniform"
    assert (run["sample"]["solver"]["m"], run["objective"]["times"]["kind"]) == (0.7, times)
    assert (run["objective"]["guide"]["zeta"], run["teacher"] is None) == (
        (0, False) if net["guidance"] or is_twinflow else (0.8, True)
    )
    assert train["batch"] >= 4 * 8  # four to a GPU, of eight
    assert (codec, net["texts"]["kind"]) == ({"kind": "pipeline"}, "pipeline")
    assert run["pipeline"]["source"] in PUBLISHED


@pytest.mark.parametrize(
    ("name", "guidance", "rates", "fake_updates"),
    [
        ("qwen-image-dmd2", 4, (1e-4, 2e-5), 5),
        ("sdxl-dmd2", 8, (5e-5, 2e-5), 5),
        ("sd3-tdm", 4.5, (7.5e-5, 3e-4), 1),
        ("qwen-image-tdm", 4, (1e-4, 2e-5), 1),
    ],
)
def test_dmd2_is_trained_as_published(
    name: str, guidance: float, rates: tuple[float, float], fake_updates: int
) -> None:
    """Scores of the guided base, times of the sampler, updates of the fake score for each of the generator."""
    run = recipe(name).model_dump()
    optimizer, objective, lora = run["train"]["optimizer"], run["objective"], run["net"]["lora"]
    assert (run["teacher"]["kind"], run["teacher"]["guide"]["scale"]) == ("base", guidance)
    assert (optimizer["lr"], optimizer["fake_lr"], optimizer["betas"]) == (*rates, (0, 0.999))
    assert (objective["kind"], objective["fake_updates"], objective["times"]["steps"]) == (
        "dmd2",
        fake_updates,
        4,
    )
    times, solver = objective["times"], run["sample"]["solver"]
    assert (solver["kind"], solver["m"], run["sample"]["nfe"]) == (times["solver"], times["m"], (4,))
    assert (lora["rank"], run["net"]["lowpass"]) == (64, None)
    assert (run["train"]["micro_batch"] or run["train"]["batch"]) % 4 == 0


def test_results_say_where_they_come_from() -> None:
    for name in measured.names():
        results = measured.results(name)
        assert (results["name"], results["title"]) == (name, experiment.read_plan(name).title)
        assert results["scale"] in experiment.SCALES
        assert results["scale"] != "smoke"
        assert results["origin"]["command"].startswith(f"dumo reproduce {name} --scale {results['scale']}")
        assert {"date", "machine", "device", "versions"} <= results["origin"].keys()
        assert results["table"]
        assert len({tuple(row) for row in results["table"]}) == 1
        assert results["cells"]
        assert "not known" not in {row.get("why") for row in results["table"]}
        json.dumps(results, allow_nan=False)
