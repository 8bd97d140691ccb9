"""Every family's export in its stock pipeline beside dumo, and what the pipeline makes when it is told nothing.

    python tools/stock/run.py [NAME ...] --json tools/stock/stock.json

Tiny random models, trained two steps on digits, float32 on a CPU, one image.
"""

import json
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from stock.case import LORA, Case
from stock.family import ROWS

PASSES = (1, 2)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())


def bare(case: Case, pipe: Any) -> dict[str, Any]:  # noqa: ANN401, a pipeline of diffusers
    """What `pipe(prompt)` does: its passes, guidance and last time, and how far its image is from that of one pass."""
    rows = list[int]()
    handle = pipe.transformer.register_forward_hook(lambda _, given, out: rows.append(len(out[0])))
    image, _ = case.made(pipe, {}, negative=case.row.negative)
    handle.remove()
    times = pipe.scheduler.sigmas[:-1].tolist()
    one, _ = case.made(pipe, case.arguments(1))
    quiet = {case.stock.off: case.stock.none} if case.stock.off else {}
    unguided, _ = case.made(pipe, quiet)
    return {
        "steps": len(times),
        "passes": sum(rows),
        "last": times[-1],
        "off": apart(image, one),
        "off_unguided": apart(unguided, one),
        "finite": bool(image.isfinite().all()),
    }


def plain(case: Case, pipe: Any) -> float | None:  # noqa: ANN401
    """How far two Euler steps along u are from two jumps; None where stock steps cannot be at the same times."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not case.stock.told:
        return None
    image, _ = case.made(pipe, case.arguments(2))
    kept, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler()
    euler, _ = case.made(pipe, case.arguments(2))
    pipe.scheduler = kept
    return apart(euler, image)


def measured(name: str, folder: Path) -> dict[str, Any]:
    """One family's row."""
    case = Case.of(name, folder / "full")
    pipe = case.pipeline()
    row = {"family": name, "pipeline": case.stock.pipeline, "call": case.arguments(2)}
    row["off"] = [case.off(pipe, n) for n in PASSES]
    row |= {"euler": plain(case, pipe), "bare": bare(case, pipe), "seeded": case.seeded(pipe), "lora": None}
    if case.stock.lora:
        tuned = Case.of(name, folder / "lora", LORA, to="lora")
        row["lora"] = [tuned.off(tuned.tuned(), n) for n in PASSES]
    return row


def main(
    names: Annotated[list[str] | None, typer.Argument()] = None,
    to: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = list[dict[str, Any]]()
    with TemporaryDirectory() as folder:
        for name in names or ROWS:
            rows.append(measured(name, Path(folder) / name))
            print(json.dumps(rows[-1]), flush=True)
    if to is not None:
        to.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
