"""Tables are means over seeds, in which arms are compared seed by seed; charts have the best on top."""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from dumo.config.load import load
from dumo.flow.sampling import Samples
from dumo.lab import arm_picture, fig4b, paper, result_table
from dumo.lab.cell import Result
from dumo.lab.experiment import Cell, read_plan
from dumo.run.folder import RunFolder
from dumo.run.trained import TrainedRun
from dumo.types import Cond

NET = torch.nn.Identity()


def result(
    labels: dict[str, Any], seed: int, rows: list[dict[str, Any]], source: str = "digits", **report: object
) -> Result:
    """A cell with these rows in its report."""
    spec = load(source, [f"train.seed={seed}"])
    name = "-".join(map(str, labels.values()))
    found = {"step": 1, "results": rows, "contrast": [], **report}
    made = Result(Cell(f"{name}-{seed}", spec, labels), Path("x"), found)
    made.__dict__["trained"] = TrainedRun(spec, RunFolder(Path("x")), NET, 1, "w")
    return made


def row(nfe: int, distance: float, **more: float | None) -> dict[str, Any]:
    """A row of a report."""
    return {"nfe": nfe, "solver": "s", "mmd": distance, "fd": distance / 2, "kid": 1.0, "kid_sd": 9.0, **more}


def test_a_table_is_means_over_seeds() -> None:
    """The main score first, and `fd`, each with its own deviation."""
    done = [
        result({"arm": arm}, seed, [row(1, far + seed), row(2, far)])
        for arm, far in (("a", 1), ("b", 5))
        for seed in (0, 2)
    ]
    first, second, third, _ = result_table.average_by_arm(done)
    keys = ["arm", "nfe", "solver", "mmd", "mmd_sd", "fd", "fd_sd", "kid", "seeds"]  # kid_sd is of another kind
    assert list(first) == keys
    lacking = result_table.average_by_arm(
        [result({"arm": "a"}, seed, [row(1, 2.0, auc=auc)]) for seed, auc in enumerate((0.5, None))]
    )
    assert lacking[0]["auc"] is None  # a score that one cell has not
    assert (first["mmd"], first["mmd_sd"], first["fd"], first["seeds"]) == (2, pytest.approx(2**0.5), 1, 2)
    assert (second["nfe"], second["mmd_sd"], third["arm"], third["mmd"]) == (2, 0, "b", 6)
    assert result_table.average_by_arm(done[:1])[0]["mmd_sd"] is None
    report = {"results": [row(1, 1.0), row(2, 2.0)], "contrast": [row(2, 7.0), row(50, 3.0)]}
    by_passes = result_table.rows_of_all_nfes(report)
    assert [one["mmd"] for one in by_passes] == [1.0, 2.0, 3.0]  # Euler's where there is no other
    assert result_table.main_score(first) == "mmd"
    assert result_table.main_score({"fd": 1, "fd_sd": 2, "kid": 3}) == "fd"
    assert result_table.main_score({"mmd": 1, "mmd_sd": 2, "fd": 1, "fd_sd": 2}) == "mmd"
    assert result_table.main_score({"class_mmd": None, "class_mmd_sd": None, "mmd": 1, "mmd_sd": 2}) == "mmd"
    assert result_table.main_score({"mmd": 1, "mmd_sd": 2, "class_mmd": 3, "class_mmd_sd": 4}) == "class_mmd"


def test_a_spread_over_subsets_is_no_error_of_a_table() -> None:
    scores = {"nfe": 1, "solver": "s", "kid": 1.0, "kid_sd": 9.0}
    (averages,) = result_table.average_by_arm([result({"arm": "a"}, seed, [scores]) for seed in range(2)])
    assert (averages["kid"], averages["kid_sd"]) == (1, 0)
    assert "error" not in averages


def scored(arm: str, seed: int, distance: float, score: str = "mmd", error: float | None = 0.01) -> Result:
    """A cell with one score in one pass."""
    row: dict[str, Any] = {"nfe": 1, "solver": "hop", score: distance}
    if error is not None:
        row[f"{score}_sd"] = error
    return result({"objective": arm}, seed, [row])


def test_arms_are_compared_seed_by_seed() -> None:
    """Seeds scatter more than the arms differ: what is common to both cancels."""
    results = [scored("a", seed, x) for seed, x in enumerate((1.0, 1.3, 1.6))]
    results += [scored("b", seed, x) for seed, x in enumerate((1.1, 1.4, 1.73))]
    results += [scored("c", seed, x) for seed, x in enumerate((1.2, 1.2, 1.6))]
    a, b, c = result_table.ranked_table(results)
    assert [row["best"] for row in (a, b, c)] == ["*", "", "*"]
    assert (a["behind"], a["margin"]) == (None, None)
    assert b["behind"] == pytest.approx(0.11)
    assert b["margin"] == pytest.approx(4.302653 * sqrt(0.0003) / sqrt(3), rel=1e-5)  # t(0.975, 2)
    assert [*a][:4] == ["objective", "nfe", "best", "mmd"]


def test_an_arm_near_zero_is_best_and_so_is_what_is_level_with_it() -> None:
    """An unbiased distance may be 0, and its error then is above it."""
    distances = {"a": (0.02, -0.01, 0.0), "b": (0.03, 0.01, -0.01), "c": (1.0, 1.1, 1.2)}
    results = [scored(arm, seed, x) for arm, values in distances.items() for seed, x in enumerate(values)]
    assert [row["best"] for row in result_table.ranked_table(results)] == ["*", "*", ""]


@pytest.mark.parametrize(
    ("score", "error", "marks"),
    [
        ("mmd", 0.01, ["*", "*"]),  # by standard errors
        ("kid", 0.01, ["", ""]),  # a spread over subsets is no standard error
        ("fid", None, ["", ""]),  # nobody can say what is level with the best
        ("clip_score", 0.01, ["", ""]),  # higher is better
    ],
)
def test_arms_of_one_seed_are_ranked_by_standard_errors_alone(
    score: str, error: float | None, marks: list[str]
) -> None:
    rows = result_table.ranked_table([scored("a", 0, 1.0, score, error), scored("b", 0, 1.01, score, error)])
    assert [row["best"] for row in rows] == marks


def test_arms_are_compared_within_a_budget() -> None:
    rows = [({"arm": arm, "budget": budget}, x) for arm, budget, x in (("a", 1, 4.0), ("b", 1, 9.0), ("a", 3, 2.0))]
    results = [result(labels, 0, [{"nfe": 1, "solver": "hop", "mmd": x, "mmd_sd": 0.1}]) for labels, x in rows]
    assert [row["best"] for row in result_table.ranked_table(results)] == ["*", "", "*"]


def test_seeds_that_failed_are_named_by_their_arm() -> None:
    """Which is told by all columns of the plan."""
    cells = [result({"arm": "x", "at": at}, seed, []).cell for at in (0.1, 0.2) for seed in (0, 1)]
    rows = [{"arm": "x", "at": at, "nfe": 1} for at in (0.1, 0.2)]
    named = result_table.with_failed_seeds(rows, ["arm", "at"], cells, ["x-0.2-0", "x-0.2-1"])
    assert [row["failed"] for row in named] == ["", "0, 1"]


def test_markdown() -> None:
    rows = [{"a": 1, "b": 0.123456, "c": None}, {"a": 20, "b": 1e-9, "c": "x"}]
    lines = result_table.markdown("T", rows).splitlines()
    assert lines == ["# T", "", "| a | b | c |", "| --- | --- | --- |", "| 1 | 0.1235 | None |", "| 20 | 1e-09 | x |"]


def test_the_zoo_says_why_an_arm_is_far() -> None:
    done = [
        result({"objective": name}, 1, [row(1, far), row(2, far)]) for name, far in (("DuMo", 2), ("CM", 7), ("x", 6))
    ]
    found = paper.zoo_table(read_plan("zoo"), done)
    assert [one["over_dumo_1_pass"] for one in found] == [1, 1, 3.5, 3.5, 3, 3]
    assert [bool(one["why"]) for one in found] == [False, False, True, False, False, False]
    assert found[2]["why"] == read_plan("zoo").explanations["CM"]


def test_steps_are_compared_within_rounds() -> None:
    """A round that is slow for all changes no ratio."""
    cost = {fig4b.FLOW_MATCHING: 1.0, fig4b.DUMO: 2.0, fig4b.MEANFLOW: 4.0}
    facts = {"parameters": 7, "F_per_step": 3.0}
    done = [
        result({"size": "s", "objective": name}, 0, [], seconds=[each * slow for slow in (1, 1, 10)], **facts)
        for name, each in cost.items()
    ]
    found = {one["objective"]: one for one in fig4b.table(read_plan("fig4b"), done)}
    assert [found[name]["time_over_flow_matching"] for name in cost] == [1, 2, 4]
    assert [found[name]["speed_over_guided_meanflow"] for name in cost] == [4, 2, 1]
    assert (found[fig4b.DUMO]["F_by_time"], found[fig4b.DUMO]["steps_per_second"]) == (6, 0.5)


def test_a_ranking_has_the_best_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(arm_picture.chart, "dots", lambda *given: seen.append(given))
    rows = [("a", 1, 3.0), ("a", 2, 0.1), ("b", 2, 0.05), ("c", 1, 2.0), ("c", 2, 9.0)]  # b has no single pass
    plan = read_plan("latents")
    arm_picture.ranking_chart(
        plan, [{"objective": name, "nfe": n, "fd": value, "fd_sd": None} for name, n, value in rows]
    )
    ((_, x, points, names),) = seen
    assert list(points) == ["c", "a", "b"]
    assert names == ["1 NFE", "2 NFE"]
    assert "not FID" in x


def test_samples_are_best_first_below_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the passes that were asked for: with guidance a row counts twice as many."""
    seen: list[Any] = []
    passes: list[int] = []

    def sample(trained: TrainedRun, c: Cond, nfe: int) -> Samples:
        passes.append(nfe)
        return Samples(torch.zeros(len(c), 1, 8, 8), nfe)

    monkeypatch.setattr(arm_picture.picture, "labelled_grid", lambda cells, columns, titles, gap: seen.append(titles))
    monkeypatch.setattr(TrainedRun, "make_samples", sample)
    card = {"nfe": [1]}
    results = [result({"arm": name}, 0, [row(2, far)], card=card) for name, far in (("x", 3.0), ("y", 2.0))]
    arm_picture.sample_sheets(results)
    assert passes == [1, 1]
    assert seen[-1] == ["y\nkernel distance · 10³: 2.00", "x\nkernel distance · 10³: 3.00"]


@pytest.mark.parametrize(
    ("source", "shown"),
    [("imagenet256-xl2", range(0, 1000, 100)), ("digits", range(10)), ("cifar10", [0] * 10)],
)
def test_a_sheet_has_ten_columns_of_however_many_classes(
    source: str, shown: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_of: list[int] = []

    def sample(trained: TrainedRun, c: Cond, nfe: int) -> Samples:
        made_of.extend(c.tolist())
        return Samples(torch.zeros(len(c), 3, 64, 64), nfe)

    monkeypatch.setattr(TrainedRun, "make_samples", sample)
    sheet = arm_picture._draw_sheet(result({"arm": "x"}, 0, [row(1, 1.0)], source, card={"nfe": [1]}))
    assert made_of == [*shown, *shown]
    assert sheet.width == 10 * 66 - 2
