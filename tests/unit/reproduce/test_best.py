"""The steps to the best end at its recipe, rivals have its net and as many settings, curves are read off rightly."""

from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import pytest

from dumo import recipes
from dumo.config.load import load
from dumo.reproduce import arm
from dumo.reproduce.ours import best, setting
from dumo.reproduce.plan import Finished
from dumo.run.folder import RunFolder

COURSES = pytest.mark.parametrize("course", [best.ON_DIGITS, best.ON_LATENTS], ids=["digits", "latents"])


@COURSES
def test_the_steps_end_at_the_recipe(course: best.Course) -> None:
    """Setting after setting on the paper's recipe: the same run as ours, but for its length and its words."""
    ours = next(one for one in course.arms() if one.labels["arm"] == course.ours).load()
    recipe = load(course.ours, [*course.common, *best.JUDGED])
    train = ours.train.model_copy(update={"steps": recipe.train.steps})
    assert ours.model_copy(update={"about": recipe.about, "train": train}).model_dump() == recipe.model_dump()
    spent, given = (arm.work(one) * one.train.steps for one in (recipe, load(course.paper)))
    assert spent == pytest.approx(given, rel=1e-3)


@COURSES
def test_rivals_have_the_same_net_and_training(course: best.Course) -> None:
    arms = {one.labels["arm"]: one.load() for one in course.arms()}
    ours = arms[course.ours]
    same = {"coupling": None, "steps": 1}  # a setting, and what follows of the cost
    assert {*course.rivals} == {"MeanFlow", "α-Flow", "Flow matching"}
    for title, (recipe, _) in course.rivals.items():
        spec = arms[title]
        assert (spec.net, spec.data) == (ours.net, ours.data)
        assert spec.train.model_copy(update=same) == ours.train.model_copy(update=same)
        assert spec.objective.kind == load(recipe).objective.kind
        assert spec.sample.solver.kind == load(recipe).sample.solver.kind
    for spec in arms.values():
        assert 50 in (*spec.evaluate.nfe, *spec.evaluate.contrast)
        assert {1, 2, 4} <= {*spec.evaluate.nfe}


def test_rivals_have_as_many_settings() -> None:
    counts = {title: len(settings) for title, (_, settings) in setting.SETTINGS.items()}
    assert len({*counts.values()}) == 1, counts
    arms = {one.labels["setting"]: one.load() for one in best.tuned("laptop")}
    assert arms["MeanFlow: its own times"].objective.times == load("digits-meanflow").objective.times
    assert all(name in setting.SETTINGS[title][1] for title, name in setting.CHOSEN.items())


def test_the_nearest_are_chosen() -> None:
    """By the rule that `CHOSEN` states, of what ships."""
    found: dict[str, dict[int, float]] = {}
    for row in (recipes.results("best-tuning") or {})["table"]:
        found.setdefault(row["setting"], {})[row["nfe"]] = row["fd_grey"]
    for title, (_, settings) in setting.SETTINGS.items():
        own = {name: found[f"{title}: {name}"] for name in settings}
        far = {name: d[50] if title == "Flow matching" else d[1] * d[2] for name, d in own.items()}
        assert setting.CHOSEN[title] == min(far, key=far.__getitem__)


def test_seeds_that_choose_do_not_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm, "work", lambda spec: 3.0)
    monkeypatch.setattr(arm, "units", lambda spec: 3.0)
    assert {cell.spec.train.seed for cell in best.ALONE.cells("smoke")} == {0}
    assert {cell.spec.train.seed for cell in best.LATENTS.cells("smoke")} == {1}
    cells = list(best.DIGITS.cells("laptop"))
    assert {cell.spec.train.seed for cell in cells} == {1, 2, 3}
    wide = {cell.labels["arm"] for cell in cells if cell.labels["budget"] == 3}
    assert wide == {best.PAPER, setting.OURS, *best.ON_DIGITS.rivals}
    assert {cell.spec.train.steps for cell in cells if cell.labels["budget"] == 1} == {best.ON_DIGITS.steps}
    assert all(cell.spec.data.model_dump()["held"] == 360 for cell in cells)


def fallen(power: float, at: tuple[float, ...] = (1 / 3, 1.0, 3.0)) -> list[tuple[float, float, float | None]]:
    """A curve that falls by a power of the budget, 1 at a budget of 1."""
    return [(budget, budget**-power, None) for budget in at]


@pytest.mark.parametrize("power", [0.5, 2.0])
@pytest.mark.parametrize("budget", [1 / 3, 0.5, 1.0, 2.7, 3.0])
def test_a_curve_is_read_off_between_its_points(power: float, budget: float) -> None:
    found = best.even(fallen(power), budget**-power)
    assert found == pytest.approx(budget, rel=1e-9)


def test_what_lies_beyond_a_curve_is_not_read_off() -> None:
    assert best.even(fallen(1.0), 4.0) is None
    assert best.even(fallen(1.0), 0.1) is None
    assert best.even([(1.0, 2.0, None)], 2.0) is None
    assert best.even([(1.0, 2.0, None), (3.0, 2.0, None)], 2.0) is None  # level: nowhere in particular


def finished(cells: list[Any], distance: dict[str, float]) -> list[Finished]:
    """Reports of arms whose distance falls by the root of the budget, doubles with the seed, and halves by passes."""
    net, done = load("digits", ["net.width=8", "net.depth=1"]).build(), list[Finished]()
    for one in cells:
        told, seed = one.labels, one.spec.train.seed
        near = distance[told["arm"]] / told["budget"] ** 0.5 * 2.0 ** (seed - 2)

        def row(n: int, near: float = near) -> dict[str, Any]:
            return {"nfe": n, "solver": "s", "fd_grey": near / n, "fd": near / n, "kid": 0.0, "recall": 0.5, "auc": 0.7}

        results = [row(n) for n in one.spec.evaluate.nfe]
        contrast = [row(n, near / 2) for n in (1, 2, 4, 50)] if 50 not in one.spec.evaluate.nfe else []
        report = {"step": one.spec.train.steps, "results": results, "contrast": contrast}
        done.append(Finished(replace(one), RunFolder(one.spec, Path("x"), net, 7, "w"), report))
    return done


def test_the_table_has_every_arm_at_every_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm, "work", lambda spec: 3.0)
    monkeypatch.setattr(arm, "units", lambda spec: 3.0)
    cells = list(best.DIGITS.cells("laptop"))
    arms = list(dict.fromkeys(cell.labels["arm"] for cell in cells))
    near = {name: 1.0 if name == best.PAPER else 0.75 if name == setting.OURS else 8.0 for name in arms}
    table = best.table(finished(cells, near))
    assert len(table) == 4 * (3 * 5 + len(setting.LADDER) - 1)
    rows = {(row["arm"], row["budget"], row["nfe"]): row for row in table}
    mean = (0.5 + 1 + 2) / 3
    assert rows[best.PAPER, 1.0, 2]["fd_grey"] == pytest.approx(mean / 2)
    assert rows[best.PAPER, 1.0, 50]["fd_grey"] == pytest.approx(mean / 2 / 50)  # Euler's, of the contrast
    assert rows["Flow matching", 1.0, 50]["fd_grey"] == pytest.approx(8 * mean / 50)  # its own
    assert rows[setting.OURS, 1.0, 1]["even_at"] == pytest.approx(exp(2 * log(0.75)))
    assert rows["MeanFlow", 1.0, 1]["even_at"] is None
    assert {row["seeds"] for row in table} == {3}
    drawn = best.charts(best.ON_DIGITS, "best", table)
    assert [*drawn] == ["best-nfe1", "best-nfe2"]
    assert all(min(picture.size) > 300 for picture in drawn.values())


@pytest.mark.parametrize("name", [name for name in ("best-options", "best-tuning") if recipes.results(name)])
def test_results_are_of_the_settings_there_are(name: str) -> None:
    """No setting was left out of what ships."""
    told = {row["option" if name == "best-options" else "setting"] for row in (recipes.results(name) or {})["table"]}
    plan = best.alone("laptop") if name == "best-options" else best.tuned("laptop")
    assert told == {next(iter(one.labels.values())) for one in plan}
