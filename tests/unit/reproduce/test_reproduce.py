"""A plan is made once: what is finished is kept, what was stopped goes on, what has changed is made anew."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import log
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image

from dumo import recipes
from dumo.config.load import load
from dumo.evaluation.evaluate import evaluate
from dumo.objectives import Objective
from dumo.progress import no_bar
from dumo.random import stream
from dumo.reproduce import PLANS, arm, redraw, reproduce
from dumo.reproduce.arm import Arm
from dumo.reproduce.ours import fair, ideas, pretrained, stages
from dumo.reproduce.paper import fig3, fig4a, fig4b, fig4c, fig5, sec43, tab2, zoo
from dumo.reproduce.plan import SCALES, Cell, Finished, Plan, finish, markdown, units
from dumo.run.folder import RunFolder
from dumo.sampling.generate import Samples
from dumo.training import loop
from dumo.training.state import State
from dumo.training.step import Record
from dumo.types import UserError

TINY = ["net.width=8", "net.depth=1", "train.batch=4", "train.steps=4", "train.save_every=2"]
TINY += ["evaluate.protocol.samples=20", "evaluate.nfe=[1]"]


def cell(name: str = "a", *more: str) -> Cell:
    """DuMo on moons, in no time."""
    return Cell(name, load("moons", [*TINY, *more]), {"seed": 0})


def plan(*cells: Cell) -> Plan:
    """Of these cells; a row a cell, a text for a picture."""

    def draw(done: list[Finished], folder: Path) -> list[Path]:
        (folder / "picture.txt").write_text(f"{len(done)} cells")
        return [folder / "picture.txt"]

    def table(done: list[Finished]) -> list[dict[str, object]]:
        return [{"cell": one.cell.name, "mmd2": one.report["results"][0]["mmd2"], "none": None} for one in done]

    def made(scale: str) -> Iterator[Cell]:
        yield from cells

    return Plan("A test", made, table, draw)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting what steps cost takes long, and is tested by itself: here all cost 3 F."""
    for module in (arm, pretrained, stages):
        monkeypatch.setattr(module, "units", lambda spec: 3.0)
    monkeypatch.setattr(arm, "flops", lambda spec: 1e6)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are trained, as they are."""
    made: list[int] = []
    original = loop.train_step

    def train_step(state: State, *values: object, **named: object) -> Record:
        made.append(state.step)
        return original(state, *values, **named)

    monkeypatch.setattr(loop, "train_step", train_step)
    return made


def test_a_plan_leaves_results_table_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "test", plan(cell("a"), cell("b", "train.seed=1")))
    results = reproduce("test", "smoke", tmp_path / "out")
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    assert [row["cell"] for row in results["table"]] == ["a", "b"]
    assert results["table"][0]["mmd2"] != results["table"][1]["mmd2"]
    assert [one["cell"] for one in results["cells"]] == ["a", "b"]
    assert results["origin"]["command"] == "dumo reproduce test --scale smoke"
    assert results["files"] == [str(tmp_path / "out" / name) for name in ("picture.txt", "table.md", "results.json")]
    assert all(Path(file).is_file() for file in results["files"])
    assert (tmp_path / "out/picture.txt").read_text() == "2 cells"
    assert (tmp_path / "out/table.md").read_text().splitlines()[0] == "# A test"


@pytest.mark.slow
def test_cells_side_by_side_are_those_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    """Made in processes of their own: here no step is trained, and the numbers are the same."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # a core each, as the tests have
    monkeypatch.setitem(PLANS, "test", plan(cell("a"), cell("b", "train.seed=1")))
    apart = reproduce("test", "smoke", tmp_path / "apart", jobs=2)
    assert steps == []
    assert apart["origin"]["command"].endswith("--jobs 2")
    assert apart["table"] == reproduce("test", "smoke", tmp_path / "in turn")["table"]
    assert steps


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PLANS, "test", plan(cell()))
    reproduce("test", "laptop")
    assert Path("runs/reproduce/test-laptop/results.json").is_file()


def finished(tmp_path: Path, *more: str) -> Finished:
    """A cell, trained and judged."""
    return finish(cell("a", *more), tmp_path, device="cpu", bar=no_bar)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that cell: to be read."""
    folder = tmp_path_factory.mktemp("once")
    finished(folder)
    return folder


def test_finished_cells_are_kept(tmp_path: Path, steps: list[int]) -> None:
    first = finished(tmp_path)
    kept = [first.opened.folder / "evaluation.json", *(first.opened.folder / "checkpoints").rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert finished(tmp_path).report == first.report
    assert steps == [0, 1, 2, 3]
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_stopped_cell_goes_on(tmp_path: Path, steps: list[int]) -> None:
    first = finished(tmp_path)
    shutil.rmtree(first.opened.folder / "checkpoints/step-00000004")
    (first.opened.folder / "evaluation.json").unlink()
    assert finished(tmp_path).report == first.report
    assert steps == [0, 1, 2, 3, 2, 3]


def test_a_cell_that_was_trained_but_not_judged(tmp_path: Path, steps: list[int]) -> None:
    first = finished(tmp_path)
    (first.opened.folder / "evaluation.json").unlink()
    assert finished(tmp_path).report == first.report
    assert steps == [0, 1, 2, 3]


def test_what_trains_otherwise_is_another_cell(tmp_path: Path) -> None:
    folders = [finished(tmp_path, more).opened.folder for more in ("train.seed=0", "train.seed=1", "net.width=9")]
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path and folder.name.startswith("a-") for folder in folders)


@pytest.mark.parametrize(
    "more", ["evaluate.protocol.samples=21", "evaluate.seed=1", "evaluate.nfe=[2]", "sample.solver.m=0.4"]
)
def test_what_is_judged_otherwise_is_judged_again(once: Path, tmp_path: Path, more: str) -> None:
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    spec = cell("a", more).spec
    second = finished(tmp_path, more)
    assert second.report["samples"] == spec.evaluate.protocol.samples
    assert second.report["seed"] == spec.evaluate.seed
    assert second.report["solver"] == spec.sample.solver.model_dump()
    assert [row["nfe"] for row in second.report["results"]] == list(spec.evaluate.nfe)


@pytest.mark.parametrize("otherwise", [{"nfe": [3, 4]}, {"seed": 5}, {"solver": "euler"}])
def test_a_judgement_by_other_means_is_not_taken(tmp_path: Path, otherwise: dict[str, Any]) -> None:
    first = finished(tmp_path)
    evaluate(first.opened, **otherwise)  # someone looks at a cell with dumo evaluate
    assert finished(tmp_path).report == first.report


def test_cells_that_were_measured_otherwise_make_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "test", plan(cell("a"), cell("b", "evaluate.seed=1")))
    with pytest.raises(UserError, match=r"not measured alike(.|\n)*  seed: 0 in a; 1 in b\n"):
        reproduce("test", "smoke", tmp_path / "out")
    assert not (tmp_path / "out/table.md").exists()


def test_wrong_names_are_refused_before_any_work(tmp_path: Path) -> None:
    for name, scale, said in (
        ("fig33", "smoke", "'fig3'"),
        ("fig3", "smoky", "'smoke'"),
        ("zoo", "", "smoke, laptop, paper"),
    ):
        with pytest.raises(UserError, match=said):
            reproduce(name, scale, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_markdown() -> None:
    rows = [{"a": 1, "b": 0.123456, "c": None}, {"a": 20, "b": 1e-9, "c": "x"}]
    lines = markdown("T", rows).splitlines()
    assert lines == ["# T", "", "| a | b | c |", "| --- | --- | --- |", "| 1 | 0.1235 | None |", "| 20 | 1e-09 | x |"]


SMALL_SCALES = ("smoke", "laptop")
UNPUBLISHED = ("fig3", "fig5", "guidance", "latents", "lowpass", "ours", "ours-latents", "pretrained", "words")
UNPUBLISHED += (
    "stages",
    "pulls",
    "pulls-latents",
    "best",
    "best-latents",
    "best-options",
    "best-pixels",
    "best-tuning",
)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("name", sorted({*PLANS} - {"guidance"}))  # it counts for itself
def test_every_plan_has_its_cells_at_every_scale(name: str) -> None:
    for scale in SMALL_SCALES if name in UNPUBLISHED else SCALES:
        cells = list(PLANS[name].cells(scale))
        names = [cell.name for cell in cells]
        assert len(set(names)) == len(names) >= 2
        assert len({tuple(cell.labels) for cell in cells}) == 1  # one table
        assert len({cell.spec.model_dump_json() for cell in cells}) == len(cells)  # no two are alike
        if scale == "smoke" and PLANS[name].finish is not PLANS["fig4b"].finish:
            assert all(cell.spec.train.steps <= 40 for cell in cells)


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_what_the_paper_has_not_is_refused_at_its_scale(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{name} has no scale 'paper': .*; it has smoke and laptop$"):
        reproduce(name, "paper", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("name", ["fig4a", "fig4c", "sec43", "tab2", "zoo"])
def test_the_papers_size_needs_data_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DUMO_LATENTS", "IMAGENET", "DUMO_DATA"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=r"data.root is .*, but DUMO_\w+ is not set"):
        reproduce(name, "paper", tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_largest_steps_are_not_timed_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it needs a GPU"):
        reproduce("fig4b", "paper", tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_cells_that_take_turns_are_not_timed_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fig4b times its cells in turn.*: leave out --jobs"):
        reproduce("fig4b", "smoke", tmp_path / "out", jobs=2, device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scale", SMALL_SCALES)
def test_figure_3_varies_the_ratio_alone(scale: str) -> None:
    *meanflows, dumo = fig3.cells(scale)
    assert [one.labels["velocity_ratio"] for one in meanflows] == list(fig3.RATIOS)
    assert [one.spec.model_dump()["objective"]["times"]["velocity_ratio"] for one in meanflows] == list(fig3.RATIOS)
    dumps = [(one.spec.model_dump_json(), f'"velocity_ratio":{one.labels["velocity_ratio"]}') for one in meanflows]
    assert len({text.replace(ratio, "") for text, ratio in dumps}) == 1
    assert dumo.labels["objective"] == "DuMo"
    for part in ("data", "net", "train", "evaluate"):
        assert getattr(dumo.spec, part) == getattr(meanflows[0].spec, part)


@pytest.mark.parametrize("scale", SMALL_SCALES)
def test_arms_are_at_equal_cost(scale: str) -> None:
    arms = [Arm(name, name, (), {"objective": name}) for name in ("digits", "digits-meanflow", "digits-flow-matching")]
    cells = list(arm.equal_cost(arms, scale, seeds=2))
    assert [(one.labels["objective"], one.spec.train.seed) for one in cells] == [
        (one.name, seed) for one in arms for seed in range(1 if scale == "smoke" else 2)
    ]
    counted = {one.labels["objective"]: units(one.spec) for one in cells if one.spec.train.seed == 0}
    budget = cells[0].spec.train.steps * (first := counted["digits"])
    assert cells[0].spec.train.steps == (arm.SMOKE if scale == "smoke" else load("digits").train.steps)
    for one in cells:
        each = counted[one.labels["objective"]]
        assert abs(each * one.spec.train.steps - budget) <= each / 2 + 1e-9  # to half a step
        assert (one.labels["steps"], one.labels["F_per_step"]) == (one.spec.train.steps, round(each, 2))
    assert first > 4
    asked = next(arm.equal_cost(arms, scale, seeds=1, steps=700))
    assert asked.spec.train.steps == (arm.SMOKE if scale == "smoke" else 700)


def test_theta_minus_that_is_an_average_counts() -> None:
    spec = load("digits", ["net.width=8", "net.depth=1"])
    other = load("digits", ["net.width=8", "net.depth=1", "train.ref=0.999"])
    assert units(other) > units(spec)  # the derivative is another net's, and takes a pass of its own


@pytest.mark.usefixtures("free")
def test_the_zoo_has_every_objective() -> None:
    every = get_args(get_args(Objective)[0])
    alone = [model for model in every if not (model().needs.points or model().needs.taught)]  # without a teacher
    kinds = {model.model_fields["kind"].default for model in alone}
    listed = zoo.zoo()
    assert next(iter(listed.items())) == ("DuMo", "digits")
    assert {load(recipe).objective.kind for recipe in listed.values()} == kinds
    assert "digits-guided" not in listed.values()
    cells = list(zoo.PLAN.cells("laptop"))
    assert {one.spec.train.seed for one in cells} == {1, 2, 3}
    for one in cells:
        assert one.spec.data == cells[0].spec.data
        assert one.spec.evaluate.protocol == cells[0].spec.evaluate.protocol
        assert one.spec.evaluate.nfe in ((1, 2, 4), (2, 4))
        assert one.spec.train.batch == load("digits").train.batch


def finished_by_hand(cells: list[Cell], score: str = "fd") -> list[Finished]:
    """Reports whose numbers follow from passes, seed and the arm's place."""
    net, done = load("digits", ["net.width=8", "net.depth=1"]).build(), list[Finished]()
    names = list(dict.fromkeys(json.dumps(one.labels) for one in cells))
    for one in cells:
        place, seed = names.index(json.dumps(one.labels)), float(one.spec.train.seed)
        rows = [
            {"nfe": n, "solver": "s", score: 1 + place + n + 2 * seed, "kid": seed, "kid_sd": 9.0, "recall": 0.5}
            for n in one.spec.evaluate.nfe
        ]
        report = {"step": one.spec.train.steps, "results": rows, "contrast": []}
        done.append(Finished(one, RunFolder(one.spec, Path("x"), net, 7, "w"), report))
    return done


@pytest.mark.usefixtures("free")
def test_a_table_is_means_over_seeds() -> None:
    table = PLANS["latents"].table(finished_by_hand(list(PLANS["latents"].cells("laptop"))))
    assert [(row["objective"], row["nfe"]) for row in table] == [
        (title, n) for title in ("DuMo", "MeanFlow", "Flow matching") for n in (1, 2)
    ]
    for i, row in enumerate(table):
        assert (row["fd"], row["fd_sd"], row["kid"], row["seeds"]) == (1 + i // 2 + row["nfe"] + 2, 2, 1, 3)
        assert "kid_sd" not in row  # of another kind: over subsets, not seeds
    assert arm.measure(table[0]) == "fd"


@pytest.mark.usefixtures("free")
def test_the_zoo_is_compared_with_dumo_in_one_pass() -> None:
    table = zoo.PLAN.table(finished_by_hand(list(zoo.PLAN.cells("laptop"))))
    assert table[0]["objective"] == "DuMo"
    assert table[0]["over_dumo_1_pass"] == 1
    assert all(row["over_dumo_1_pass"] == row["fd"] / table[0]["fd"] for row in table)
    assert all(bool(row["why"]) == (row["nfe"] == 1 and row["fd"] > zoo.FAR * table[0]["fd"]) for row in table)
    assert zoo.PUBLISHED["why"].keys() <= zoo.zoo().keys()
    beside = {row["objective"]: row["paper_fid_imagenet_xl_1_pass"] for row in table}
    assert (beside["DuMo"], beside["MeanFlow"], beside["Flow matching"]) == (3.07, 3.43, None)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("scale", SCALES)
def test_figure_4a_varies_the_share_on_the_velocity(scale: str) -> None:
    cells = list(fig4a.PLAN.cells(scale))
    ratio = ("times", "velocity_ratio")
    for title, field, shares in (("DuMo", ("beta",), fig4a.BETAS), ("MeanFlow", ratio, fig4a.RATIOS)):
        mine = [one for one in cells if one.labels["objective"] == title]
        assert tuple(dict.fromkeys(one.labels["share_on_velocity"] for one in mine)) == shares
        for one in mine:
            value: Any = one.spec.objective.model_dump()
            for key in field:
                value = value[key]
            assert value == one.labels["share_on_velocity"]
            assert one.spec.evaluate.nfe == (1,)
    if scale == "paper":
        assert {one.spec.train.steps for one in cells} == {10_000}
    table = fig4a.PLAN.table(finished_by_hand(cells, "fid" if scale == "paper" else "fd"))
    assert {row["paper_best_fid_b2_10k"] for row in table} == {63.86, 76.04}


@pytest.mark.parametrize("scale", SCALES)
def test_figure_4c_is_a_grid_of_laws(scale: str) -> None:
    cells = list(fig4c.PLAN.cells(scale))
    pairs = [(one.labels["theta_1"], one.labels["theta_2"]) for one in cells]
    assert sorted(pairs) == sorted(product(fig4c.THETAS, fig4c.THETAS))
    for one, (a, b) in zip(cells, pairs, strict=True):
        assert one.spec.objective.times.model_dump() == {"kind": "beta", "a": a, "b": b}
    assert all(one.spec.train == cells[0].spec.train for one in cells)
    if scale == "smoke":
        table = {(row["theta_1"], row["theta_2"]): row for row in fig4c.PLAN.table(finished_by_hand(cells))}
        assert table[0.5, 1.0]["log"] == pytest.approx(log(3))
        assert table[1.0, 1.0]["far"] == pytest.approx(0.1, abs=2e-3)  # uniform
        assert table[2.4, 2.4]["far"] == pytest.approx(0.017, abs=1e-3)
        assert [pair for pair, row in table.items() if row["paper_log_fid_b2_10k"]] == [(2.0, 2.0)]


@pytest.mark.usefixtures("free")
def test_the_fair_ablation_varies_one_thing_at_a_time() -> None:
    """At the same law of (t, r) two heads and one draw the very same times; nothing else differs but the objective."""
    *mine, meanflow = fair.PLAN.cells("smoke")
    assert len(mine) == 2 * 2 * len(fair.TIMES)
    for two, one in zip(mine[::2], mine[1::2], strict=True):
        assert two.labels | {"heads": "one"} == one.labels | {"steps": two.labels["steps"]}
        assert len(two.spec.objective.needs.heads) == 2
        assert len(one.spec.objective.needs.heads) == 1
        for a, b in zip(*(cell.spec.objective.times(64, stream("fair")) for cell in (two, one)), strict=True):
            assert torch.equal(a, b)
        for part in ("data", "net", "path", "sample", "evaluate"):
            assert getattr(two.spec, part) == getattr(one.spec, part)
    for one in mine:
        t, r = one.spec.objective.times(4000, stream("fair"))
        still = (t == r).double().mean().item()
        assert still == pytest.approx(0.75 if one.labels["rows"] == "a quarter" else 0, abs=1e-3)
        assert ((r == 0) | (r == t)).all() == (one.labels["jumps"] == "to data")
        tree = one.spec.objective.model_dump()
        assert tree.get("power", 0) == 0
        assert (tree["drop"], tree["guide"]["zeta"]) == (0, 0)
    assert meanflow.spec.objective == load("digits-meanflow").objective
    assert meanflow.labels["metric"] == "adaptive"
    first, _ = fair.PLAN.table(finished_by_hand(mine[:1]))
    assert first["far"] == pytest.approx(0.1, abs=2e-3)  # uniform, to the data


@pytest.mark.usefixtures("free")
def test_three_heads_at_the_papers_size_keep_its_recipe() -> None:
    two, *three = sec43.PLAN.cells("paper")
    assert two.spec == load(sec43.HOST)
    for one in three:
        kinds = [part.kind for part in one.spec.objective.parts]
        assert kinds[:2] == ["velocity", "endpoint"]
        assert one.spec.objective.guide == two.spec.objective.guide
        assert one.spec.objective.slope == two.spec.objective.slope
        assert one.spec.train.steps == round(two.spec.train.steps * 424 / 432)
        assert one.spec.data == two.spec.data
    assert [one.labels["paper_fid_imagenet256_xl2_1_pass"] for one in (two, *three)] == [2.60, 2.84, 4.73]


@pytest.mark.usefixtures("free")
def test_table_2_takes_objectives_onto_one_recipe() -> None:
    for scale, host in (("laptop", "cifar10-latents"), ("paper", "cifar10")):
        cells = list(tab2.PLAN.cells(scale))
        assert {one.spec.data.classes for one in cells} == {0}
        assert all(one.spec.data == cells[0].spec.data for one in cells)
        assert {one.spec.evaluate.nfe for one in cells} == {(1,)}
        assert [one.labels["objective"] for one in cells if one.spec.train.seed == 0] == list(tab2.ARMS)
        sct = next(one.spec for one in cells if one.labels["objective"] == "sCT")
        assert sct.objective.model_dump() == load("digits-sct").objective.model_dump() | {"drop": 0}
        assert (sct.path, sct.sample.solver) == (load("digits-sct").path, load("digits-sct").sample.solver)
        assert sct.net.model_copy(update={"precondition": "none"}) == load(host).net
        assert sct.train.batch == load(host).train.batch


@pytest.mark.usefixtures("free")
def test_ideas_differ_from_the_base_in_what_they_say() -> None:
    all_, followed = len(ideas.IDEAS), len(ideas.FOLLOWED)
    for plan, recipe, count in ((ideas.DIGITS, "digits", 3 * all_), (ideas.LATENTS, "cifar10-latents", 2 * followed)):
        cells = list(plan.cells("laptop"))
        assert len(cells) == count
        assert cells[0].labels["idea"] == "base"
        assert cells[0].spec.objective == load(recipe).objective
        assert all(one.spec.data == cells[0].spec.data for one in cells)


def test_steps_are_compared_within_rounds() -> None:
    """A round that is slow for all changes no ratio."""
    cost = {fig4b.PLAIN: 1.0, fig4b.DUMO: 2.0, fig4b.MEANFLOW: 4.0}
    cells = [one for one in fig4b.cells("smoke") if one.labels["objective"] in cost]
    net = cells[0].spec.outline()
    report = {"card": {"machine": "m"}, "parameters": 7, "F_per_step": 3.0}
    done = [
        Finished(
            one,
            RunFolder(one.spec, Path("x"), net, 0, "none"),
            report | {"seconds": [cost[one.labels["objective"]] * slow for slow in (1, 1, 10)]},
        )
        for one in cells
    ]
    table = {row["objective"]: row for row in fig4b.PLAN.table(done)}
    assert [table[name]["time_over_flow_matching"] for name in cost] == [1, 2, 4]
    assert [table[name]["speed_over_guided_meanflow"] for name in cost] == [4, 2, 1]
    assert table[fig4b.DUMO]["F_by_time"] == 6
    assert table[fig4b.DUMO]["steps_per_second"] == 0.5
    assert table[fig4b.DUMO]["paper_speed_over_meanflow_xl"] == 1.126


def test_steps_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One size, three objectives, two rounds: bars of the paper's two, and all in a line each."""
    monkeypatch.setattr(fig4b, "zoo", lambda: {"DuMo": "digits", "Flow matching": "digits-flow-matching"})
    results = reproduce("fig4b", "smoke", tmp_path, device="cpu")
    assert [row["objective"] for row in results["table"]] == [
        fig4b.PLAIN,
        fig4b.DUMO,
        fig4b.MEANFLOW,
        fig4b.SPARING,
        "DuMo",
    ]
    counted = [row["F_per_step"] for row in results["table"]]
    assert counted[2] > counted[1] > counted[3] > counted[0]
    assert all(row["low"] <= row["time_over_flow_matching"] <= row["high"] for row in results["table"])
    assert results["cells"][0]["card"]["rounds"] == 2
    for name in ("fig4b.png", "fig4b-all.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("name", ["fair", "fig4a", "fig4c", "ours"])
def test_charts_are_drawn(name: str) -> None:
    plan = PLANS[name]
    drawn = plan.charts(plan.table(finished_by_hand(list(plan.cells("smoke")))))
    assert drawn
    for picture in drawn.values():
        assert min(picture.size) > 300
        assert len(picture.getcolors(1 << 24) or ()) > 50  # not blank


def test_what_a_file_holds_leads_a_table() -> None:
    """With its own spread, and `fd` beside it with its own."""
    rows = [{"nfe": 1, "solver": "s", "fd": float(i), "fd_grey": 10.0 * i, "kid": 1.0, "kid_sd": 9.0} for i in (1, 3)]
    row = arm.over_seeds(rows)
    assert list(row) == ["nfe", "solver", "fd_grey", "fd_grey_sd", "fd", "fd_sd", "kid", "seeds"]
    assert (row["fd_grey"], row["fd"], row["seeds"]) == (20, 2, 2)
    assert row["fd_grey_sd"] == pytest.approx(10 * row["fd_sd"])
    assert arm.measure({"objective": "x", **row}) == "fd_grey"
    assert arm.measure({"fd": 1, "fd_sd": 2, "fd_grey": 3}) == "fd_grey"  # a stored one, without the spread


def test_a_ranking_has_the_best_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(arm.chart, "dots", lambda *given: seen.append(given))
    rows = [("a", 1, 3.0), ("a", 2, 0.1), ("b", 2, 0.05), ("c", 1, 2.0), ("c", 2, 9.0)]  # b has no single pass
    arm.ranking("T", [{"objective": name, "nfe": n, "fd": value, "fd_sd": None} for name, n, value in rows])
    (_, x, points) = seen[0]
    assert list(points) == ["c", "a", "b"]
    assert [*points["a"]] == ["1 pass", "2 passes"]
    assert "not FID" in x


@pytest.mark.parametrize("name", ["zoo", "ours", "fair"])
def test_results_that_ship_are_drawn_again(name: str, tmp_path: Path) -> None:
    """Of the numbers as they were measured: the spread of what counts today is in the cells."""
    found = recipes.results(name)
    assert found is not None
    for stored, row in zip(found["table"], arm.respread(found), strict=True):
        assert row.items() >= {key: stored[key] for key in ("nfe", "steps", "fd_grey")}.items()
        assert row["fd_sd"] == pytest.approx(stored["fd_sd"])
        assert 0 < row["fd_grey_sd"] < 10
    files = redraw(name, tmp_path)
    assert [file.name for file in files] == ([f"{name}.png"] if name != "fair" else ["fair-nfe1.png", "fair-nfe2.png"])
    assert all(file.is_file() for file in files)
    with pytest.raises(UserError, match="no results of 'sec43' come with dumo"):
        redraw("sec43", tmp_path)


def test_samples_stand_best_first_below_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(arm.figure, "gathered", lambda blocks, note: seen.append((list(blocks), note)))
    monkeypatch.setattr(arm, "sample", lambda opened, nfe, c: Samples(torch.zeros(len(c), 1, 8, 8), nfe))
    done = finished_by_hand(list(PLANS["latents"].cells("laptop"))[::3])[::-1]
    digits = load("digits")
    arm.side_by_side([replace(one, opened=replace(one.opened, run=digits)) for one in done])
    ((names, note),) = seen
    assert names == ["DuMo, 2", "MeanFlow, 3", "Flow matching, 4"]  # they came the other way round
    assert "lower is better; not FID" in note


@pytest.mark.parametrize("scale", SMALL_SCALES)
def test_trajectories_are_of_equal_steps_and_milestones(scale: str) -> None:
    dumo, meanflow = fig5.cells(scale)
    assert [one.labels["objective"] for one in (dumo, meanflow)] == ["DuMo", "MeanFlow"]
    assert dumo.spec.train == meanflow.spec.train
    for part in ("data", "net", "evaluate"):
        assert getattr(dumo.spec, part) == getattr(meanflow.spec, part)
    assert dumo.spec.train.milestones[0] == 0
    assert max(dumo.spec.train.milestones) < dumo.spec.train.steps


@pytest.mark.slow
def test_trajectories_are_drawn_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both objectives, both readings, every milestone; the last is what the cell's own report says."""
    monkeypatch.setattr(fig5, "JUDGED", (1, 2))
    tiny = ["net.width=8", "net.depth=1", "train.batch=4", "train.steps=3", "train.milestones=[0,2]"]
    tiny += ["evaluate.protocol.samples=500", "evaluate.nfe=[1,2]"]
    cells = [Cell(name, load(name, tiny), {"objective": title}) for title, name in fig5.RECIPES.items()]
    done = [finish(one, tmp_path / "cells", device="cpu", bar=no_bar) for one in cells]
    table = fig5.table(done)
    keys = [(row["objective"], row["step"], row["reading"], row["nfe"]) for row in table]
    assert keys == list(product(("DuMo", "MeanFlow"), (0, 2, 3), "uv", (1, 2)))
    for one in done:
        last = [row for row in table if row["objective"] == one.cell.labels["objective"] and row["step"] == 3]
        own = [row["fd_grey"] for row in one.report["results"]]
        assert [row["fd_grey"] for row in last if row["reading"] == "u"] == own
    files = fig5.draw(done, tmp_path / "out")
    assert files[0].name == "fig5.png"
    assert len(files) == len(set(files)) == 1 + 2 * (3 * 2 + 1 + 2)
    assert all(file.is_file() for file in files)
