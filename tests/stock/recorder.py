"""Runs the Python blocks of cards where dumo cannot be imported, and records the noise that they draw and their images.

Each line of stdin is a JSON list: the block's file, where the record goes, the folder to work in, and where what is
printed goes. For each, the block's exit code is written to stdout, on a line. A block runs as it stands, in a fork of
its own: torch and diffusers, which take longer to import than a tiny pipeline takes to run, are imported once.

A record is a safetensors file: image n is `n.image`, and the noises that were drawn for it are `n.0`, `n.1` and so on.
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

import diffusers
import torch
from diffusers import StableDiffusion3Pipeline  # noqa: F401, with all that most pipelines import
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from safetensors.torch import save_file
from torch import Tensor

noises: list[Tensor] = []  # drawn since the last image
record: dict[str, Tensor] = {}
torch_randn = torch.randn


def recording_randn(*shape: Any, **options: Any) -> Tensor:  # noqa: ANN401, of torch
    """torch.randn, which records what a pipeline or a scheduler draws; layers draw as well, and are not recorded."""
    noise = torch_randn(*shape, **options)
    caller = sys._getframe(1).f_code.co_name
    if caller == "randn_tensor":  # by which diffusers draws
        noises.append(noise.clone())
    return noise


def record_images(processor: type, method_name: str) -> None:
    """Let a processor of diffusers record each image that it finishes, and the noises that were drawn for it."""
    process = getattr(processor, method_name)

    def recording_process(self: Any, image: Tensor, *args: Any, **options: Any) -> object:  # noqa: ANN401
        if noises:  # else the image is a frame of a video that is recorded already
            n = sum(name.endswith("image") for name in record)
            record[f"{n}.image"] = image.detach().clone().float().contiguous()
            for k, noise in enumerate(noises):
                record[f"{n}.{k}"] = noise.float().contiguous()
            noises.clear()
        return process(self, image, *args, **options)

    setattr(processor, method_name, recording_process)


def run_block(block_file: str, record_file: str) -> None:
    """Run a block, verbatim, and write its record."""
    record_images(VaeImageProcessor, "postprocess")
    record_images(VideoProcessor, "postprocess_video")
    torch.randn = recording_randn
    code = compile(Path(block_file).read_text(encoding="utf-8"), block_file, "exec")
    exec(code, {"__name__": "__main__"})
    save_file(record, record_file, {"diffusers": diffusers.__version__})


def run_in_fork(block_file: str, record_file: str, folder: str, printed_file: str) -> int:
    """Run a block in a fork of this process, in a folder; return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    exit_code = 1
    try:
        with Path(printed_file).open("w", encoding="utf-8") as printed:
            for stream in (1, 2):  # stdout and stderr
                os.dup2(printed.fileno(), stream)
            os.chdir(folder)
            run_block(block_file, record_file)
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(exit_code)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(run_in_fork(*json.loads(line)), flush=True)
