"""Figure 4b of the paper: the cost of a training step by network size and objective.

`dumo.lab.reproduce` calls `time_cells`, `table` and `charts`, in this order. Nothing is trained: weights and data are
random, and a step is timed as in `dumo bench`, without the optimizer, whose cost does not depend on the objective. All
objectives of one size are timed in turn, in rounds. Ratios of times are taken within each round and their median is
reported, so that a temporary slowdown affects numerator and denominator alike.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dumo.lab import bench
from dumo.lab.cell import Result, Row
from dumo.lab.experiment import Cell, Cost, Plan
from dumo.report import chart
from dumo.run.net import meta_net
from dumo.runtime.device import choose_device, software_versions
from dumo.runtime.progress import Bar
from dumo.runtime.stopwatch import Stopwatch, quartiles
from dumo.types import UserError

# The objectives of Fig. 4b in the column `objective`.
FLOW_MATCHING = "Flow matching"
DUMO = "DuMo, guided, central"
MEANFLOW = "MeanFlow, guided, central on all rows"
MEANFLOW_FEWER_ROWS = "MeanFlow, guided, central where r < t"
# Sec. 4.4: steps per second on XL, relative to MeanFlow.
_PAPER_SPEEDS = {DUMO: 1.126, MEANFLOW: 1.0}


def time_cells(
    cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar
) -> tuple[list[Result], dict[str, str]]:
    """Time the training steps of all cells, size by size, without training. Raises UserError if `jobs` > 1."""
    if jobs > 1:
        raise UserError(
            "fig4b times its cells one at a time, because parallel cells slow each other down: remove --jobs"
        )
    torch_device = choose_device(device)
    results: list[Result] = []
    for size in dict.fromkeys(cell.labels["size"] for cell in cells):
        cells_of_size = [cell for cell in cells if cell.labels["size"] == size]
        steps: list[bench.Step] = []
        for cell in cells_of_size:
            # Time a step from the middle of training, since some losses change with its progress.
            prepared = bench.prepare(cell.spec, torch_device, progress=0.5)
            steps.append(prepared.make_step(cell.spec.objective, cell.spec.train.precision, "none"))
        rounds = cells_of_size[0].labels["rounds"]
        seconds = Stopwatch.for_bench(torch_device).time_rounds(steps, rounds, bar=bar, title=f"steps of size {size}")
        for cell, cell_seconds in zip(cells_of_size, seconds, strict=True):
            report: dict[str, Any] = {
                "card": {
                    "rounds": rounds,
                    "rows": cell.spec.train.batch,
                    "precision": cell.spec.train.precision,
                    "machine": bench.device_name(torch_device),
                    "threads": torch.get_num_threads(),
                    "versions": software_versions(),
                },
                "parameters": sum(p.numel() for p in meta_net(cell.spec).parameters()),
                "F_per_step": Cost(cell.spec).forwards_per_step,
                "seconds": cell_seconds.tolist(),
            }
            results.append(Result(cell, folder / cell.name, report))
    return results, {}


def table(plan: Plan, results: list[Result]) -> list[Row]:
    """Tabulate, by size and objective, the counted and timed cost of a step in forward passes, and steps per second.

    Ratios of times are taken within each round, before the median.
    """
    reports: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        labels = result.cell.labels
        reports[labels["size"], labels["objective"]] = result.report
    rows: list[Row] = []
    for (size, objective), report in reports.items():
        seconds = torch.tensor(report["seconds"])
        flow_matching = reports[size, FLOW_MATCHING]
        flow_matching_seconds = torch.tensor(flow_matching["seconds"])
        meanflow_seconds = torch.tensor(reports[size, MEANFLOW]["seconds"])
        low, ratio, high = quartiles(seconds / flow_matching_seconds)
        rows.append(
            {
                "size": size,
                "objective": objective,
                "parameters": report["parameters"],
                "F_per_step": report["F_per_step"],
                "F_by_time": ratio * flow_matching["F_per_step"],
                "steps_per_second": 1 / seconds.median().item(),
                "time_over_flow_matching": ratio,
                "low": low,
                "high": high,
                "speed_over_guided_meanflow": (meanflow_seconds / seconds).median().item(),
                "paper_speed_over_meanflow_xl": _PAPER_SPEEDS.get(objective),
            }
        )
    return rows


def charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """Draw the paper's bars of steps per second of DuMo and MeanFlow, and a dot chart with times of all objectives."""
    bars: dict[str, dict[str, float]] = {}
    dots: dict[str, dict[str, chart.Dot]] = {}
    for timing in table:
        size = timing["size"]
        objective = timing["objective"]
        dots.setdefault(objective, {})[size] = chart.Dot(timing["time_over_flow_matching"], None)
        if objective in (DUMO, MEANFLOW, MEANFLOW_FEWER_ROWS):
            bars.setdefault(size, {})[objective] = timing["steps_per_second"]
    return {
        "fig4b": chart.bars("Training steps", "network size", "steps per second", bars),
        "fig4b-all": chart.dots("Time of a training step", "time relative to flow matching", dots),
    }
