"""Runs the Python blocks of cards where dumo cannot be imported, and records the noise that they draw and their images.

Each line of stdin is a JSON list: the block's file, where the record goes, the folder to work in, and where what is
printed goes. A block runs as it stands, in a fork of its own: torch and diffusers, which take longer to import than a
tiny pipeline takes to run, are imported once. Its exit code is the line that comes out.
"""

# ruff: noqa: E402

import sys

sys.modules["dumo"] = None  # it cannot be imported

import json
import os
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline  # noqa: F401, with all that most pipelines import
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from safetensors.torch import save_file
from torch import Tensor

drawn: list[Tensor] = []
made: dict[str, Tensor] = {}
torch_randn = torch.randn


def randn(*shape: Any, **how: Any) -> Tensor:  # noqa: ANN401, of torch
    """torch's own; what a pipeline or a scheduler draws, and no layer, is noted."""
    noise = torch_randn(*shape, **how)
    if sys._getframe(1).f_code.co_name == "randn_tensor":
        drawn.append(noise.clone())
    return noise


def record(kind: type, name: str) -> None:
    """Note the image that goes into this method, and the noise that was drawn for it."""
    process = getattr(kind, name)

    def post(self: Any, image: Tensor, *args: Any, **how: Any) -> object:  # noqa: ANN401, of diffusers
        if not drawn:  # a frame of a video that was recorded
            return process(self, image, *args, **how)
        n = sum(key.endswith("image") for key in made)
        made[f"{n}.image"] = image.detach().clone().float().contiguous()
        made.update({f"{n}.{k}": noise.float().contiguous() for k, noise in enumerate(drawn)})
        drawn.clear()
        return process(self, image, *args, **how)

    setattr(kind, name, post)


def run(block: str, to: str) -> None:
    """A block, verbatim."""
    record(VaeImageProcessor, "postprocess")
    record(VideoProcessor, "postprocess_video")
    torch.randn = randn
    exec(compile(Path(block).read_text(encoding="utf-8"), block, "exec"), {"__name__": "__main__"})
    save_file(made, to)


def in_a_fork(block: str, to: str, folder: str, printed: str) -> int:
    """Its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with Path(printed).open("w", encoding="utf-8") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            os.chdir(folder)
            run(block, to)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(in_a_fork(*json.loads(line)), flush=True)
