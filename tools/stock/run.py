"""The release gate: every family from a folder of diffusers to the Python block of its exported card, run verbatim.

    python tools/stock/run.py [NAME ...] --json tools/stock/stock.json
    python tools/stock/run.py [NAME ...] --stored --json FILE

For each pipeline, a row: its run is made and trained in full (`Case.of`), sampled by a prompt, exported, guided and
exported again; then trained by adapters, and exported merged and as a LoRA. Each export's card runs in stock diffusers.
The other columns say how the stock pipeline behaves without a card (`unprompted_facts`, `euler_error`). Exit code 1
where an image of a card is not dumo's. Float32, on a CPU.

With --stored the pipelines are stored in float32, bf16 and fp16, and each card computes in the dtype that it names. A
table is printed, too; tests/e2e/test_card.py has the limits.
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
from stock.case import FULL, GUIDED, LIMITS, LORA, Case, must, relative_error

VERBS = ("encode", "doctor", "train")
DTYPES = ("float32", "bfloat16", "float16")  # of STORED, whose others have the same weights under other names
USUAL_ARGUMENTS = ("prompt", "height", "width", "image", "max_area")  # of a call; the table has the others


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One family's row; errors are lists, of one, two and four passes."""
    full = Case.of(name, folder / "full", *FULL, verbs=VERBS)
    source_image = ["--source", full.image] if full.image else []
    must(call("sample", full.run, "--prompt", PROMPT, *source_image, "--nfe", "1"))
    out = full.export("out")
    row: dict[str, Any] = {"family": name, "pipeline": full.stock.pipeline, "full": full.image_errors(out)}

    # how the stock pipeline is called, and what it does uncalled for
    extra_arguments = [word.partition("=")[0] for word in full.stock.extra_arguments]
    row["call"] = {
        argument: value
        for argument, value in full.pipeline_arguments(2).items()
        if argument not in (*USUAL_ARGUMENTS, *extra_arguments)
    }
    pipe = full.pipeline(out)
    row["bare"] = unprompted_facts(full, pipe)
    row["seeded"] = full.seeds_scheduler(pipe)
    row["euler"] = euler_error(full, pipe)

    row["guided"] = None
    if full.can_guide:
        full.guide(GUIDED)
        row["guided"] = full.image_errors(full.export("guided"), GUIDED)

    lora = Case.of(name, folder / "lora", *LORA)
    row["merged"] = lora.image_errors(lora.export("out"))
    row["lora"] = None
    if lora.stock.loads_lora:
        row["lora"] = lora.image_errors(lora.export("tuned", "--to", "lora"))
    return row


def unprompted_facts(case: Case, pipe: Any) -> dict[str, Any]:  # noqa: ANN401, a pipeline of diffusers
    """What `pipe(prompt)` does, where nobody says passes or guidance.

    Its steps, the rows that go through the model, its last time, and how far its image is from that of one pass, as it
    guides by itself and unguided.
    """
    rows_of_passes: list[int] = []
    model = getattr(pipe, case.opened.run.pipeline.model_part)
    handle = model.register_forward_hook(lambda _, inputs, output: rows_of_passes.append(len(output[0])))
    image = case.pipeline_latent(pipe, None)
    handle.remove()
    scheduler = pipe.scheduler
    times = scheduler.sigmas[:-1]
    if case.stock.indexed_times:
        times = scheduler.timesteps / len(scheduler.alphas_cumprod)
    one_pass = case.pipeline_latent(pipe, 1)
    unguided: dict[str, Any] = {}
    if case.stock.guide_argument:
        unguided[case.stock.guide_argument] = case.stock.unguided_scale
    return {
        "steps": len(times),
        "passes": sum(rows_of_passes),
        "last": times[-1].item(),
        "off": relative_error(image, one_pass),
        "off_unguided": relative_error(case.pipeline_latent(pipe, None, **unguided), one_pass),
    }


def euler_error(case: Case, pipe: Any) -> float | None:  # noqa: ANN401
    """How far two Euler steps along u are from two jumps; None where stock steps cannot be at the same times.

    It leaves the pipeline with an Euler scheduler.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not case.stock.time_arguments or case.stock.indexed_times:
        return None
    jumps = case.pipeline_latent(pipe, 2)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    return relative_error(case.pipeline_latent(pipe, 2), jumps)


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each error above its limit."""
    lines: list[str] = []
    for row in rows:
        for kind, limit in LIMITS.items():
            errors = row[kind]
            if errors and max(errors) > limit:
                lines.append(f"{row['family']}, {kind}: {errors}")
    return lines


def measure_stored(name: str, folder: Path) -> dict[str, Any]:
    """One family's row by how it is stored: the largest distance of a card's images, as a folder and as a LoRA."""
    row: dict[str, Any] = {"family": name}
    for stored in DTYPES:
        case = Case.of(name, folder / stored, *LORA, stored=stored)
        lora = case.image_errors(case.export("lora", "--to", "lora")) if case.stock.loads_lora else None
        row[stored] = {"folder": case.image_errors(case.export("out")), "lora": lora}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `measure_stored` in Markdown: the largest distance of both forms, of one, two and four passes."""
    lines = [" | ".join(["| pipeline", *DTYPES]) + " |", "|---" * (len(DTYPES) + 1) + "|"]
    for row in rows:
        cells = [row["family"]]
        for stored in DTYPES:
            distances = [max(x) for x in row[stored].values() if x is not None]
            cells.append(f"{max(distances):.1g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Pipelines of tests/pipelines.py. Default: all.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the rows go.")] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Measure by the dtype that is stored.")] = False,
) -> None:
    """Measure each pipeline, print and write its row, and list the faults."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    measure_row = measure_stored if stored else measure
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for name in names or PIPELINES:
            row = measure_row(name, Path(folder) / name)
            print(json.dumps(row), flush=True)
            rows.append(row)
    if json_file is not None:
        json_file.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    if stored:
        print(table(rows))
        return
    lines = faults(rows)
    for line in lines:
        print(line)
    raise typer.Exit(bool(lines))


if __name__ == "__main__":
    typer.run(main)
