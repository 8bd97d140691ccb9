"""A plan of the user's own: arms of equal compute, refusals before anything is trained, differences seed by seed."""

import json
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dumo.config import trust
from dumo.lab import arm_picture
from dumo.lab import reproduce as reproduce_module
from dumo.lab.cell import Result
from dumo.lab.ownplan import paired_table, read_file, require_fair
from dumo.lab.plan import Cell, Cost, Plan
from dumo.lab.reproduce import reproduce
from dumo.types import UserError
from dumo.types.outside import code_hash

ARMS = """
arms:
  - {objective: DuMo, recipe: moons}
  - {objective: MeanFlow, recipe: moons-meanflow, set: [train.clip=2.0]}
"""


def plan(tmp_path: Path, text: str) -> Plan:
    """The plan that a file of this text holds."""
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return read_file(str(file))


def cells(tmp_path: Path, text: str, scale: str = "laptop") -> list[Cell]:
    """The runs of a file of this text."""
    return list(plan(tmp_path, text).cells(scale))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step costs 3 F: counting takes long."""
    monkeypatch.setattr(Cost, "units", 3.0)
    monkeypatch.setattr(Cost, "flops", 1.0)


def test_arms_get_the_steps_that_the_budget_pays_for(tmp_path: Path) -> None:
    made = cells(tmp_path, f"budget: 800F\nseeds: [3, 5]{ARMS}")
    assert [cell.name for cell in made] == ["dumo-3", "dumo-5", "meanflow-3", "meanflow-5"]
    for cell in made:
        units = Cost(cell.spec).units
        assert cell.spec.train.steps == round(800 / units)
        assert cell.spec.train.seed == int(cell.name[-1])
    assert made[0].spec.train.steps != made[2].spec.train.steps
    assert made[2].spec.train.clip == 2.0
    require_fair(made, "operations")


def test_a_budget_in_steps_of_a_recipe(tmp_path: Path) -> None:
    by_steps = cells(tmp_path, f"budget: 1,000 steps of moons{ARMS}")
    assert by_steps[0].spec.train.steps == 1000
    assert len(by_steps) == 6  # three seeds, where none are named
    in_passes = cells(tmp_path, f"budget: {1000 * Cost(by_steps[0].spec).units} F{ARMS}")
    assert [cell.spec for cell in in_passes] == [cell.spec for cell in by_steps]
    in_operations = cells(tmp_path, f"budget: 1000 steps of moons\ncost: operations{ARMS}")
    assert in_operations[0].spec.train.steps == 1000


def test_a_budget_in_operations_is_that_of_the_recipe_it_names(tmp_path: Path) -> None:
    """Though the first arm's net is another one, whose passes cost less."""
    arms = ARMS.replace("recipe: moons}", "recipe: moons, set: [net.width=64]}").replace(", set: [train.clip=2.0]", "")
    small, named = cells(tmp_path, f"budget: 1000 steps of moons-meanflow\ncost: operations\nseeds: [0]{arms}")
    assert named.spec.train.steps == 1000
    assert small.spec.train.steps == round(1000 * Cost(named.spec).operations / Cost(small.spec).operations)


def test_at_the_scale_of_a_smoke_test(tmp_path: Path) -> None:
    made = cells(tmp_path, f"budget: 800F{ARMS}", "smoke")
    assert [(cell.spec.train.steps, cell.spec.train.seed) for cell in made[:1]] == [(20, 0)]
    assert len(made) == 2
    assert made[0].spec.evaluate.protocol.total == 500


@pytest.mark.usefixtures("free")
def test_a_smoke_test_is_judged_by_few_samples_whatever_judges(tmp_path: Path) -> None:
    """FID takes over 2048 samples, so a moment's training is judged by KID."""
    made = cells(tmp_path, f"budget: 800F{ARMS}".replace("moons-meanflow", "cifar10"), "smoke")
    protocol = made[1].spec.evaluate.protocol.model_dump()
    assert (protocol["samples"], protocol["frechet"]) == (1000, False)


def reproduced(tmp_path: Path, *more: str) -> dict[str, Any]:
    """The results of a file of two arms on points, trained for a moment; `more` are settings of the second."""
    file = tmp_path / "mine.yaml"
    settings = ", ".join(["evaluate.protocol.samples=20", *more])
    file.write_text(f"""
budget: 800F
cost: operations
set: [net.width=8, net.depth=1, train.batch=4, "evaluate.nfe=[1]", "evaluate.contrast=[]"]
arms:
  - {{objective: DuMo, recipe: moons, set: [evaluate.protocol.samples=20]}}
  - {{objective: MeanFlow, recipe: moons-meanflow, set: [{settings}]}}
""")
    return reproduce(str(file), "smoke", tmp_path / "out", device="cpu")


def test_arms_on_points_have_a_table_and_a_chart(tmp_path: Path) -> None:
    results = reproduced(tmp_path)
    assert [Path(name).name for name in results["files"]] == ["mine.png", "table.md", "results.json"]
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    assert all(Path(name).is_file() for name in results["files"])


def test_a_seed_that_diverges_leaves_the_table_of_the_others(tmp_path: Path) -> None:
    results = reproduced(tmp_path, "train.optimizer.lr=1e6", "train.max_skips=1")
    assert [(row["objective"], "failed" in row) for row in results["table"]] == [("DuMo", False)]
    assert "diverged" in results["diverged"]["meanflow-0"]
    assert "dumo" not in results["diverged"]["meanflow-0"]  # no command that would make another cell of it


@pytest.mark.usefixtures("free")
def test_the_command_of_results_agrees_to_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_loss.py").write_text("""
from typing import Literal

from dumo.objectives import FlowMatching


class Mine(FlowMatching):
    kind: Literal["my_own_loss:Mine"] = "my_own_loss:Mine"
""")
    monkeypatch.syspath_prepend(tmp_path)
    text = f"budget: 80F\nseeds: [0]{ARMS}".replace("train.clip=2.0", "objective.kind=my_own_loss:Mine")
    with trust.trusting():
        dumo, mine = cells(tmp_path, text.replace("moons-meanflow", "moons-flow-matching"))
    assert mine.spec.objective.drop == dumo.spec.objective.drop == 0.0
    command = reproduce_module._command("mine.yaml", "laptop", None, 1, "auto", [dumo, mine])
    assert command == "dumo reproduce mine.yaml --scale laptop --trust-code"
    assert "trust" not in reproduce_module._command("mine.yaml", "laptop", None, 1, "auto", [dumo])


def test_the_table_is_there_where_a_picture_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(title: str, rows: object) -> None:
        raise UserError("no room for a picture")

    monkeypatch.setattr(arm_picture, "ranking_chart", fail)
    with pytest.raises(UserError, match="no room for a picture"):
        reproduced(tmp_path)
    assert "DuMo" in (tmp_path / "out/table.md").read_text()
    assert json.loads((tmp_path / "out/results.json").read_text())["table"]


@pytest.mark.usefixtures("free")
def test_an_objective_that_was_mended_is_trained_anew(tmp_path: Path) -> None:
    """Its cells are in folders named after its code."""
    made = cells(tmp_path, f"budget: 80F\nseeds: [0]{ARMS}")
    assert all(code_hash(cell.spec.objective) in cell.code for cell in made)
    assert made[0].code != made[1].code


def test_a_setting_may_hold_the_seed(tmp_path: Path) -> None:
    made = cells(tmp_path, f"budget: 80F\nset: [evaluate.seed=$seed]{ARMS}")
    assert [cell.spec.evaluate.seed for cell in made] == [0, 1, 2, 0, 1, 2]


@pytest.mark.usefixtures("free")
def test_each_seed_has_its_own_setting_in_braces_too(tmp_path: Path) -> None:
    made = cells(tmp_path, f"budget: 80F\nset: ['evaluate.seed=${{seed}}']{ARMS}")
    assert [cell.spec.evaluate.seed for cell in made] == [0, 1, 2, 0, 1, 2]


def of_kind(kind: str, *more: str) -> str:
    """Two arms of one recipe, the other by another objective."""
    settings = ", ".join([f"objective.kind={kind}", *more])
    return ARMS.replace("recipe: moons-meanflow, set: [train.clip=2.0]", f"recipe: moons, set: [{settings}]")


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("kind", ["meanflow", "dumo_any", "imm"])
def test_another_objective_keeps_the_dropped_labels_and_the_guidance_of_its_recipe(tmp_path: Path, kind: str) -> None:
    """imm has no field `guide`."""
    dumo, other = cells(tmp_path, f"budget: 80F\nseeds: [0]{of_kind(kind)}")
    assert other.spec.objective.kind == kind
    kept, brought = (cell.spec.objective.model_dump(include={"drop", "guide"}) for cell in (dumo, other))
    assert brought == {name: kept[name] for name in brought}


@pytest.mark.usefixtures("free")
def test_an_arm_may_have_its_own_dropped_labels(tmp_path: Path) -> None:
    arms = of_kind("meanflow", "objective.guide.zeta=0.2")
    for cell in cells(tmp_path, f"budget: 80F\nseeds: [0]\nset: [data.labelled=true, objective.drop=0.3]{arms}"):
        assert cell.spec.objective.drop == 0.3
    assert cell.spec.objective.needs.guide.zeta == 0.2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"budget: 800{ARMS}", "budget"),
        (f"budget: 0F{ARMS}", "0F trains nothing"),
        (f"budget: 0 steps of moons{ARMS}", "0 steps of moons trains nothing"),
        (f"budget: plenty{ARMS}", "is no budget: write 8100F"),
        (f"budget: 20 steps of moon{ARMS}", "no recipe 'moon'; did you mean 'moons'"),
        (f"budget: 800F{ARMS}".replace("recipe: moons}", "recipe: mons}"), "no recipe 'mons'; did you mean 'moons'"),
        (f"budget: 800F\nseeds: [0, 0]{ARMS}", "0 is there twice: write different seeds"),
        (f"budget: 800F\nseeds: [0, -1]{ARMS}", "-1 is negative"),
        (f"budget: 800F{ARMS}".replace("MeanFlow", "'+'"), "mine.yaml: objective + has no letter or digit"),
        (f"budget: 800F\nset: [small]{ARMS}", "mine.yaml: set: small is no setting: write FIELD=VALUE"),
        (
            f"budget: 800F\nset: [train.steps=9]{ARMS}",
            "mine.yaml: set: train.steps=9: leave it out",
        ),
        (f"budget: 800F\nset: [train.minutes=5]{ARMS}", "train.minutes=5: leave it out, for `budget` says it"),
        (f"budget: 800F{ARMS}".replace("train.clip=2.0", "train.seed=9"), "leave it out, for `seeds` says it"),
        (f"budget: 800F\nset: ['train={{steps: 9}}']{ARMS}", "write its fields one by one"),
        (f"budget: 800F{ARMS}".replace("MeanFlow", "dumo"), "mine.yaml: objective 'dumo' is there twice"),
        (f"budget: 800F\nsed: [a=b]{ARMS}", "sed"),
        ("budget: 800F\narms: [{objective: DuMo, recipe: moons}]", "arms"),
        ("", "mine.yaml holds no plan: it must map names to values, budget and arms"),
        ("budget: [", "mine.yaml is not YAML: while parsing"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        plan(tmp_path, text)
    assert said in str(refused.value)


def test_a_file_is_not_taken_for_a_plan_of_dumos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would be taken for zoo"):
        read_file(str(tmp_path / "zoo.yaml"))
    with pytest.raises(UserError, match="is not there"):
        read_file(str(tmp_path / "mine.yaml"))


def test_code_is_run_where_somebody_agreed(tmp_path: Path) -> None:
    """A setting in a file is not one that was typed."""
    text = f"budget: 800F{ARMS}".replace("train.clip=2.0", "objective.kind=not_mine:Robust")
    with pytest.raises(UserError, match=r"runs code: not_mine:Robust(.|\n)*trust.code"):
        plan(tmp_path, text)
    with trust.trusting():
        assert plan(tmp_path, text).arms[1].set == ("objective.kind=not_mine:Robust",)


def test_passes_of_other_sizes_are_refused(tmp_path: Path) -> None:
    other = cells(tmp_path, f"budget: 800F{ARMS}".replace("train.clip=2.0", "train.batch=128"))
    with pytest.raises(UserError, match=r"a forward pass of \S+ costs \S+ times(.|\n)*cost: operations"):
        require_fair(other, "passes")
    require_fair(other, "operations")
    require_fair(cells(tmp_path, f"budget: 800F{ARMS}".replace("moons-meanflow", "moons")), "passes")
    none = cells(tmp_path, f"budget: 1F{ARMS}")
    with pytest.raises(UserError, match="does not pay for a step"):
        require_fair(none, "passes")


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("recipe", "setting", "said"),
    [
        ("digits", "data.held=359", "data.held is 0 in dumo-0 and 359 in meanflow-0"),
        ("digits", "evaluate.protocol.samples=600", "evaluate.protocol is {kind: digits, samples: 2000} in dumo-0"),
        ("moons", "evaluate.seed=1", "evaluate.seed is 0 in dumo-0 and 1 in meanflow-0"),
        ("cifar10-latents", "evaluate.split=null", "evaluate.split is test in dumo-0 and null in meanflow-0"),
        ("moons", "data.labelled=true", "data.classes is 0 in dumo-0 and 2 in meanflow-0"),
    ],
)
def test_arms_that_are_measured_otherwise_are_refused(tmp_path: Path, recipe: str, setting: str, said: str) -> None:
    """Before they are trained."""
    arms = ARMS.replace("moons-meanflow", recipe).replace("moons}", f"{recipe}}}").replace("train.clip=2.0", setting)
    other = cells(tmp_path, f"budget: 800F\nseeds: [0]{arms}")
    with pytest.raises(UserError) as refused:
        require_fair(other, "passes")
    assert said in str(refused.value)


@pytest.mark.usefixtures("free")
def test_a_fold_may_differ_by_seed(tmp_path: Path) -> None:
    text = f"budget: 800F\nset: [data.held=359, data.fold=$seed]{ARMS}"
    require_fair(cells(tmp_path, text.replace("moons", "digits")), "passes")


def result(arm: str, seed: int, distance: float, score: str = "mmd", error: float | None = 0.01) -> Result:
    """A measured run of one pass."""
    labels = {"objective": arm, "steps": 10, "F_per_step": 3.0}
    spec = SimpleNamespace(train=SimpleNamespace(seed=seed))
    row = {"nfe": 1, "solver": "hop", score: distance}
    if error is not None:
        row[f"{score}_sd"] = error
    report = {"results": [row], "contrast": []}
    return Result(
        cast(Cell, SimpleNamespace(name=f"{arm}-{seed}", arm=arm, spec=spec, labels=labels)), cast(Any, None), report
    )


def test_arms_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Seeds scatter more than the arms differ: what is common to both drops out."""
    results = [result("a", seed, x) for seed, x in enumerate((1.0, 1.3, 1.6))]
    results += [result("b", seed, x) for seed, x in enumerate((1.1, 1.4, 1.73))]
    results += [result("c", seed, x) for seed, x in enumerate((1.2, 1.2, 1.6))]
    a, b, c = paired_table(plan(tmp_path, f"budget: 800F{ARMS}"), results)
    assert [row["best"] for row in (a, b, c)] == ["*", "", "*"]
    assert (a["behind"], a["margin"]) == (None, None)
    assert b["behind"] == pytest.approx(0.11)
    assert b["margin"] == pytest.approx(4.302653 * sqrt(0.0003) / sqrt(3), rel=1e-5)  # t(0.975, 2)
    assert [*a][:5] == ["objective", "steps", "F_per_step", "nfe", "best"]


def test_an_arm_near_zero_is_best_and_so_is_what_is_level_with_it(tmp_path: Path) -> None:
    """An unbiased distance may be 0, and its error then is above it."""
    distances = {"a": (0.02, -0.01, 0.0), "b": (0.03, 0.01, -0.01), "c": (1.0, 1.1, 1.2)}
    results = [result(arm, seed, x) for arm, values in distances.items() for seed, x in enumerate(values)]
    rows = paired_table(plan(tmp_path, f"budget: 800F{ARMS}"), results)
    assert [row["best"] for row in rows] == ["*", "*", ""]


def test_arms_of_one_seed_are_level_by_standard_errors_alone(tmp_path: Path) -> None:
    """The deviation of a kernel distance over subsets is none, so it ranks no arm."""
    for score, marks in (("mmd", ["*", "*"]), ("kid", ["", ""])):
        results = [result("a", 0, 1.0, score), result("b", 0, 1.01, score)]
        rows = paired_table(plan(tmp_path, f"budget: 800F{ARMS}"), results)
        assert [row["best"] for row in rows] == marks


def test_arms_of_one_seed_are_not_ranked_without_errors(tmp_path: Path) -> None:
    """Nobody can say what is level with the best."""
    results = [result("a", 0, 1.0, "fid", None), result("b", 0, 1.01, "fid", None)]
    rows = paired_table(plan(tmp_path, f"budget: 800F{ARMS}"), results)
    assert [row["best"] for row in rows] == ["", ""]
    more_seeds = [result(arm, 1, 1.1, "fid", None) for arm in "ab"]
    assert any(row["best"] for row in paired_table(plan(tmp_path, f"budget: 800F{ARMS}"), results + more_seeds))


def test_arms_are_not_ranked_by_a_score_of_which_more_is_better(tmp_path: Path) -> None:
    results = [result(arm, seed, 20.0 + seed, "clip_score") for arm in "ab" for seed in range(3)]
    for row in paired_table(plan(tmp_path, f"budget: 800F{ARMS}"), results):
        assert (row["best"], row["behind"], row["margin"]) == ("", None, None)
