"""Second stages begin from first ones, and every way costs the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dumo.progress import no_bar
from dumo.reproduce import start
from dumo.reproduce.ours import stages
from dumo.reproduce.plan import Cell, Finished


def test_every_way_costs_two_stages() -> None:
    """The teacher's pairs among them."""
    cells = {cell.name: cell for cell in stages.cells("laptop")}
    cost = {n: c.spec.train.steps * c.labels["F_per_step"] + stages.teaching(c.spec) for n, c in cells.items()}
    one = cost.pop(stages.FLOW)
    assert cost.pop(stages.ECT) == pytest.approx(one, rel=5e-3)
    for seed in (1, 2, 3):
        parts = [cost.pop(f"{name}-{seed}") for name in ("start", "digits-after")]
        assert stages.teaching(cells[f"start-{seed}"].spec) == 1024  # pairs of 32 passes, in batches of 32
        assert sum(parts) == pytest.approx(one, rel=5e-3)
    for name, spent in cost.items():
        assert spent == pytest.approx(2 * one if "-alone-" in name else one, rel=5e-3), name


def test_a_cell_is_made_after_those_it_begins_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[str] = []

    def finish_all(cells: list[Cell], folder: Path, **_: object) -> list[Finished]:
        for cell in cells:
            assert start.sources(cell.spec) <= {str(folder / name) for name in made}, cell.name
        made.extend(cell.name for cell in cells)
        opened: Any = [SimpleNamespace(folder=folder / cell.name) for cell in cells]
        return [Finished(cell, one, {}) for cell, one in zip(cells, opened, strict=True)]

    monkeypatch.setattr(stages, "units", lambda spec: 4.0)
    monkeypatch.setattr(start, "finish_all", finish_all)
    monkeypatch.setattr(start, "alike", lambda done: None)
    cells = list(stages.cells("smoke"))
    done = start.finish(cells[::-1], tmp_path, jobs=1, device="cpu", bar=no_bar)
    assert [one.cell.name for one in done] == [cell.name for cell in cells[::-1]]
    assert len(made) == len({*made}) == len(cells)
    begun = cast(Any, next(one.cell.spec for one in done if one.cell.name == "digits-after-1")).start
    assert begun.source == str(tmp_path / "start-1")
    assert cells[0].spec.start is None
