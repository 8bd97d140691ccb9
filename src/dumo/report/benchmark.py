"""Generate four images for each prompt of a benchmark, in the layout of its evaluator.

Image j of prompt i is sample 4 i + j of the seed.

GenEval (Ghosh et al. 2023, evaluation/evaluate_images.py) reads every folder whose name is a number:

    00000/metadata.jsonl      line 0 of evaluation_metadata.jsonl
    00000/samples/0000.png    four images, 0000.png to 0003.png

DPG-Bench (Hu et al. 2024, dpg_bench/compute_dpg_bench.py) reads a picture for each of its text files, 0.png for 0.txt:
a 2 x 2 grid of four images without gaps.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dumo.encoders.caption_ids import Prompt, read_prompts
from dumo.io import file, picture
from dumo.report.sample_to_files import sampling_changes, sampling_settings
from dumo.run.trained import TrainedRun
from dumo.runtime import dist, signals
from dumo.runtime.progress import Bar, no_bar

LAYOUTS = ("geneval", "dpg")
IMAGES_PER_PROMPT = 4


def make_images(
    trained: TrainedRun,
    layout: str,
    source: Path,
    folder: Path,
    *,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: str | None = None,
    bar: Bar = no_bar,
) -> list[Path]:
    """Generate four images for each prompt of `source`, in a new folder for each NFE; return the folders.

    Several ranks share the prompts. Raises UserError for a run without text conditions, or a solver or nfe that it does
    not support, and FileExistsError if a folder exists, because an evaluator would read its files.
    """
    prompts = read_prompts(source)
    spec = sampling_settings(trained.spec, nfe=nfe, seed=seed, solver=solver)
    c = trained.conditions(prompts=[prompt.text for prompt in prompts]).repeat_interleave(IMAGES_PER_PROMPT)
    solver_kind = spec.solver.kind
    name_parts = [source.stem, *sampling_changes(trained, spec)]
    folders = [folder / "-".join([layout, solver_kind, f"nfe{n}", *name_parts]) for n in spec.nfe]
    if dist.is_main():
        for image_folder in folders:
            image_folder.mkdir(parents=True)
    dist.barrier()

    own_prompts = list(range(dist.rank(), len(prompts), dist.world()))
    indices = [IMAGES_PER_PROMPT * i + j for i in own_prompts for j in range(IMAGES_PER_PROMPT)]
    for n, image_folder in zip(spec.nfe, folders, strict=True):
        with bar(f"sampling, {solver_kind} at {n}", len(c)) as tick:
            remaining_prompts = iter(own_prompts)
            # A batch may end in the middle of a prompt.
            pending: list[torch.Tensor] = []
            done = 0
            batches = trained.make_batches(c, nfe=n, seed=spec.seed, solver=spec.solver, indices=indices)
            for batch in batches:
                signals.check()
                pending += picture.to_rows(batch.x)
                while len(pending) >= IMAGES_PER_PROMPT:
                    pixels = torch.stack(pending[:IMAGES_PER_PROMPT])
                    _write_images(layout, image_folder, prompts[next(remaining_prompts)], pixels)
                    del pending[:IMAGES_PER_PROMPT]
                done += len(batch.index) * dist.world()
                tick(min(done, len(c)), "")
    dist.barrier()
    return folders


def _write_images(layout: str, folder: Path, prompt: Prompt, pixels: picture.PixelRows) -> None:
    """Write the images `pixels` (4, h, w, channels) of a prompt in the layout of a benchmark."""
    if layout == "dpg":
        picture.write_picture(folder / f"{prompt.name}.png", picture.sheet(pixels, 2, scale=1, gap=0))
        return
    file.write(folder / prompt.name / "metadata.jsonl", prompt.line.encode())
    for j, image in enumerate(pixels):
        picture.write_picture(folder / prompt.name / f"samples/{j:04d}.png", Image.fromarray(image.numpy()))
