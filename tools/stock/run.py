"""The release gate: every family from a folder of diffusers to the Python block of its exported card, run verbatim.

    python tools/stock/run.py [NAME ...] --json tools/stock/stock.json

A complete tiny pipeline of each is made on the spot, and the rest is typed: `dumo encode`, `doctor`, `train` in full
and by adapters, `sample --prompt`, `export`. Exit code 1 where an image of a card is not dumo's. Float32, on a CPU.
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

from dumo.export.card import PROMPT
from e2e.shell import call
from pipelines import PIPELINES
from stock.case import FULL, GUIDED, LIMITS, LORA, Case, must

ALL = ("encode", "doctor", "train")


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())


def bare(case: Case, pipe: Any) -> dict[str, Any]:  # noqa: ANN401, a pipeline of diffusers
    """What `pipe(prompt)` does: its passes, guidance and last time, and how far its image is from that of one pass."""
    rows = list[int]()
    model = getattr(pipe, case.opened.run.pipeline.model)
    handle = model.register_forward_hook(lambda _, given, out: rows.append(len(out[0])))
    image = case.made(pipe, None)
    handle.remove()
    table = pipe.scheduler
    times = (table.timesteps / len(table.alphas_cumprod) if case.stock.indexed_times else table.sigmas[:-1]).tolist()
    one = case.made(pipe, 1)
    quiet = {case.stock.guide_argument: case.stock.unguided} if case.stock.guide_argument else {}
    return {
        "steps": len(times),
        "passes": sum(rows),
        "last": times[-1],
        "off": apart(image, one),
        "off_unguided": apart(case.made(pipe, None, **quiet), one),
    }


def plain(case: Case, pipe: Any) -> float | None:  # noqa: ANN401
    """How far two Euler steps along u are from two jumps; None where stock steps cannot be at the same times."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not case.stock.time_arguments or case.stock.indexed_times:
        return None
    image, pipe.scheduler = case.made(pipe, 2), FlowMatchEulerDiscreteScheduler()
    return apart(case.made(pipe, 2), image)


def measured(name: str, folder: Path) -> dict[str, Any]:
    """One family's row."""
    case = Case.of(name, folder / "full", *FULL, verbs=ALL)
    edited = ["--source", case.image] if case.image else []
    must(call("sample", case.run, "--prompt", PROMPT, *edited, "--nfe", "1"))
    out = case.export("out")
    row: dict[str, Any] = {"family": name, "pipeline": case.stock.pipeline, "full": case.off(out)}
    said = (
        "prompt",
        "height",
        "width",
        "image",
        "max_area",
        *(word.split("=")[0] for word in case.stock.extra_arguments),
    )
    row["call"] = {key: value for key, value in case.call(2).items() if key not in said}
    pipe = case.pipeline(out)
    row |= {"bare": bare(case, pipe), "seeded": case.seeded(pipe), "euler": plain(case, pipe)}
    row["guided"] = None
    if case.guidable:
        case.guide(GUIDED)
        row["guided"] = case.off(case.export("guided"), GUIDED)
    tuned = Case.of(name, folder / "lora", *LORA)
    row["merged"] = tuned.off(tuned.export("out"))
    row["lora"] = tuned.off(tuned.export("tuned", "--to", "lora")) if case.stock.loads_lora else None
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
        for name in names or PIPELINES:
            rows.append(measured(name, Path(folder) / name))
            print(json.dumps(rows[-1]), flush=True)
    if to is not None:
        to.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    wrong = [
        f"{row['family']}, {kind}: {row[kind]}"
        for row in rows
        for kind, most in LIMITS.items()
        if max(row[kind] or [0]) > most
    ]
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
