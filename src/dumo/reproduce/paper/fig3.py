"""Figure 3: what the velocity ratio does to MeanFlow, with DuMo beside it, on moons, in one pass."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from dumo.config.load import load
from dumo.io import archive, picture
from dumo.report import figure
from dumo.reproduce.plan import Cell, Finished, Plan
from dumo.run.sample import sample
from dumo.sampling import generate

RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def cells(scale: str) -> Iterator[Cell]:
    """MeanFlow at six velocity ratios, and DuMo, which needs none; equal data, net and steps."""
    sets = {
        "smoke": ["train.steps=40", "train.batch=128", "net.width=64", "evaluate.protocol.samples=200"],
        "laptop": ["train.steps=2000", "train.batch=512"],
    }[scale]
    for ratio in RATIOS:
        spec = load("moons-meanflow", [*sets, f"objective.times.velocity_ratio={ratio}", "evaluate.nfe=[1]"])
        yield Cell(f"meanflow-{ratio}", spec, {"objective": "MeanFlow", "velocity_ratio": ratio})
    spec = load("moons", [*sets, "evaluate.nfe=[1]"])
    yield Cell("dumo", spec, {"objective": "DuMo", "velocity_ratio": None})


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per cell: MMD^2 of one-step samples, with the sd of its null."""
    return [
        {
            **one.cell.labels,
            "steps": one.report["step"],
            "mmd2": one.report["results"][0]["mmd2"],
            "null_sd": one.report["baselines"]["null"]["sd"],
        }
        for one in done
    ]


def draw(done: list[Finished], folder: Path) -> list[Path]:
    """A panel per cell as the paper's: grey truth, red one-step samples; and at the end what the colours are."""
    real, _ = done[0].opened.run.data.open().reference(4000, 0)
    panels: dict[str, Image.Image] = {}
    for one in done:
        ratio, mmd2 = one.cell.labels["velocity_ratio"], one.report["results"][0]["mmd2"]
        title = "DuMo" if ratio is None else f"MeanFlow, velocity ratio {ratio:g}"
        made = sample(one.opened, nfe=1, c=generate.labels(2000, 0)).x
        panels[f"{title}\nMMD² {mmd2:.2g}"] = picture.scatter(real, {"": made})
    panels["grey: data\nred: samples of one pass"] = picture.scatter(real, {"": real[:0]})
    path = folder / "fig3.png"
    archive.write_picture(path, figure.gathered(panels, 4))
    return [path]


PLAN = Plan(
    "Velocity ratio on moons, one pass (Fig. 3)",
    cells,
    table,
    draw,
    unpublished="the paper gives neither net, times nor steps of its Fig. 3",
)
