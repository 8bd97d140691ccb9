"""Tables are means over seeds; curves are read off rightly; charts have the best on top."""

from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch

import measured
from dumo.config.load import load
from dumo.flow.generate import Samples
from dumo.lab import arm_picture, fig4b, ours, paper, table
from dumo.lab.cell import Result
from dumo.lab.plan import Cell, read_plan
from dumo.lab.reproduce import VIEWS, View, write_charts
from dumo.run.index import Index
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.types import Cond

NET = torch.nn.Identity()


def result(
    labels: dict[str, Any], seed: int, rows: list[dict[str, Any]], source: str = "digits", **report: object
) -> Result:
    """A cell with these rows in its report."""
    spec = load(source, [f"train.seed={seed}"])
    name = "-".join(map(str, labels.values()))
    found = {"step": 1, "results": rows, "contrast": [], **report}
    return Result(Cell(f"{name}-{seed}", spec, labels), RunFolder(spec, Index.read(Path("x")), NET, 1, "w"), found)


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
    first, second, third, _ = table.average_by_arm(done)
    keys = ["arm", "nfe", "solver", "mmd", "mmd_sd", "fd", "fd_sd", "kid", "seeds"]  # kid_sd is of another kind
    assert list(first) == keys
    lacking = table.average_by_arm(
        [result({"arm": "a"}, seed, [row(1, 2.0, auc=auc)]) for seed, auc in enumerate((0.5, None))]
    )
    assert lacking[0]["auc"] is None  # a score that one cell has not
    assert (first["mmd"], first["mmd_sd"], first["fd"], first["seeds"]) == (2, pytest.approx(2**0.5), 1, 2)
    assert (second["nfe"], second["mmd_sd"], third["arm"], third["mmd"]) == (2, 0, "b", 6)
    assert table.average_by_arm(done[:1])[0]["mmd_sd"] is None
    report = {"results": [row(1, 1.0), row(2, 2.0)], "contrast": [row(2, 7.0), row(50, 3.0)]}
    by_passes = table.rows_of_all_passes(report)
    assert [one["mmd"] for one in by_passes] == [1.0, 2.0, 3.0]  # Euler's where there is no other
    assert table.main_score(first) == "mmd"
    assert table.main_score({"fd": 1, "fd_sd": 2, "kid": 3}) == "fd"
    assert table.main_score({"mmd": 1, "mmd_sd": 2, "fd": 1, "fd_sd": 2}) == "mmd"
    assert table.main_score({"class_mmd": None, "class_mmd_sd": None, "mmd": 1, "mmd_sd": 2}) == "mmd"
    assert table.main_score({"mmd": 1, "mmd_sd": 2, "class_mmd": 3, "class_mmd_sd": 4}) == "class_mmd"


def test_a_spread_over_subsets_is_no_error_of_a_table() -> None:
    scores = {"nfe": 1, "solver": "s", "kid": 1.0, "kid_sd": 9.0}
    (averages,) = table.average_by_arm([result({"arm": "a"}, seed, [scores]) for seed in range(2)])
    assert (averages["kid"], averages["kid_sd"]) == (1, 0)
    assert "error" not in averages


def test_seeds_that_failed_are_named_by_their_arm() -> None:
    """Which is told by all columns of the plan."""
    cells = [result({"arm": "x", "at": at}, seed, []).cell for at in (0.1, 0.2) for seed in (0, 1)]
    rows = [{"arm": "x", "at": at, "nfe": 1} for at in (0.1, 0.2)]
    named = table.with_diverged_seeds(rows, ["arm", "at"], cells, ["x-0.2-0", "x-0.2-1"])
    assert [row["diverged"] for row in named] == ["", "0, 1"]


def test_markdown() -> None:
    rows = [{"a": 1, "b": 0.123456, "c": None}, {"a": 20, "b": 1e-9, "c": "x"}]
    lines = table.markdown("T", rows).splitlines()
    assert lines == ["# T", "", "| a | b | c |", "| --- | --- | --- |", "| 1 | 0.1235 | None |", "| 20 | 1e-09 | x |"]


def test_the_zoo_says_why_an_arm_is_far() -> None:
    done = [
        result({"objective": name}, 1, [row(1, far), row(2, far)]) for name, far in (("DuMo", 2), ("CM", 7), ("x", 6))
    ]
    found = paper.zoo_table(read_plan("zoo"), done)
    assert [one["over_dumo_1_pass"] for one in found] == [1, 1, 3.5, 3.5, 3, 3]
    assert [bool(one["why"]) for one in found] == [False, False, True, False, False, False]
    assert found[2]["why"] == read_plan("zoo").why["CM"]


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


def test_the_power_by_which_distances_fall_has_an_error_by_seeds() -> None:
    """Of seed 0 by the root of the budget, of seed 1 in proportion to it; in two passes not at all."""
    exact = {"mmd_sd": 0.0}
    done = [
        result({"arm": "a", "budget": budget}, seed, [row(1, 5 / budget**power, **exact), row(2, 7.0, **exact)])
        for budget in (1, 3, 10)
        for seed, power in enumerate((0.5, 1.0))
    ]
    done.append(result({"arm": "a", "budget": 3}, 2, [row(1, 9.0, **exact), row(2, 7.0, **exact)]))  # no curve
    done.append(result({"arm": "b", "budget": 3}, 0, [row(1, 9.0, **exact), row(2, 7.0, **exact)]))
    found = ours.scaling_table(read_plan("scaling"), done)
    slopes = {(row["arm"], row["nfe"]): (row["slope"], row["slope_error"]) for row in found}
    assert slopes["a", 1] == pytest.approx((-0.75, 0.25))
    assert slopes["a", 2] == pytest.approx((0, 0))
    assert slopes["b", 1] == slopes["b", 2] == (None, None)  # no seed has a curve


def test_the_error_of_a_slope_is_its_scatter_over_points_redrawn() -> None:
    """Points of errors of one percent and two, about a slope of -1.5."""
    g = torch.Generator().manual_seed(0)
    points: ours.Curve = [(x, x**-1.5, sd * x**-1.5) for x, sd in ((1, 0.01), (3, 0.02), (10, 0.01))]
    slope, error = ours.fit_power_law(points)
    draws = (torch.randn(3, generator=g).tolist() for _ in range(2000))
    found = [
        ours.fit_power_law([(x, y + sd * e, sd) for (x, y, sd), e in zip(points, es, strict=True)])[0] for es in draws
    ]
    assert slope == pytest.approx(-1.5)
    assert stdev(found) == pytest.approx(error, rel=0.06)


def test_a_ranking_has_the_best_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(arm_picture.chart, "dots", lambda *given: seen.append(given))
    rows = [("a", 1, 3.0), ("a", 2, 0.1), ("b", 2, 0.05), ("c", 1, 2.0), ("c", 2, 9.0)]  # b has no single pass
    arm_picture.ranking_chart(
        "T", [{"objective": name, "nfe": n, "fd": value, "fd_sd": None} for name, n, value in rows]
    )
    ((_, x, points, names),) = seen
    assert list(points) == ["c", "a", "b"]
    assert names == ["1 NFE", "2 NFE"]
    assert "not FID" in x


def test_samples_are_best_first_below_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the passes that were asked for: with guidance a row counts twice as many."""
    seen: list[Any] = []
    passes: list[int] = []

    def sample(sampler: Sampler, c: Cond, nfe: int) -> Samples:
        passes.append(nfe)
        return Samples(torch.zeros(len(c), 1, 8, 8), nfe)

    monkeypatch.setattr(arm_picture.picture, "named_blocks", lambda blocks, note: seen.append((list(blocks), note)))
    monkeypatch.setattr(Sampler, "sample", sample)
    card = {"nfe": [1]}
    results = [result({"arm": name}, 0, [row(2, far)], card=card) for name, far in (("x", 3.0), ("y", 2.0))]
    arm_picture.sample_sheets(results)
    assert passes == [1, 1]
    ((names, note),) = seen
    assert names == ["y, 2.00", "x, 3.00"]
    assert "kernel distance · 10³; lower is better" in note


@pytest.mark.parametrize(
    ("source", "shown"),
    [("imagenet256-xl2", range(0, 1000, 100)), ("digits", range(10)), ("cifar10", [0] * 10)],
)
def test_a_sheet_has_ten_columns_of_however_many_classes(
    source: str, shown: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_of: list[int] = []

    def sample(sampler: Sampler, c: Cond, nfe: int) -> Samples:
        made_of.extend(c.tolist())
        return Samples(torch.zeros(len(c), 3, 64, 64), nfe)

    monkeypatch.setattr(Sampler, "sample", sample)
    sheet = arm_picture._sheet(result({"arm": "x"}, 0, [row(1, 1.0)], source, card={"nfe": [1]}))
    assert made_of == [*shown, *shown]
    assert sheet.width == 10 * 66 - 2


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["best", "fair", "fig4a", "fig4c", "zoo"])
def test_results_are_drawn_again(name: str, tmp_path: Path) -> None:
    """Of the numbers as they were measured: the deviation of the main score is in the cells."""
    found = measured.results(name)
    for stored, again in zip(found["table"], table.from_cells(found), strict=True):
        assert again["fd"] == pytest.approx(stored["fd"])
        assert sum(row["fd"] for row in again["by_seed"].values()) == pytest.approx(again["seeds"] * again["fd"])
        assert again["fd_sd"] == pytest.approx(stored["fd_sd"])
    files = write_charts(read_plan(name), VIEWS.get(name, View()), table.from_cells(found), tmp_path)
    assert {file.stem.partition("-nfe")[0] for file in files} == {name}
    for file in files:
        with arm_picture.Image.open(file) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50  # not blank


def test_a_class_that_is_confused_is_far() -> None:
    """The class FD is near for a class's own images, and far where two classes are swapped."""
    run = load("digits", ["data.held=360"])
    trained = RunFolder(run, Index.read(Path("x")), NET, 1, "w")
    real = ours.class_moments(run.data, run.evaluate.protocol.kind)
    assert len(real) == 10
    x, c = run.data.open().reference(1797, 0)

    def as_class(swap: dict[int, int]) -> float:
        images = {k: x[c == swap.get(k, k)] for k in range(10)}

        def made(sampler: Sampler, c: Cond, nfe: int, seed: int) -> Samples:
            return Samples(torch.stack([images[k][i % 100] for i, k in enumerate(c.tolist())]), nfe)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sampler, "sample", made)
            return ours.class_fd(trained.sampler, run.evaluate, real)

    assert as_class({1: 7, 7: 1}) > 3 * as_class({})
