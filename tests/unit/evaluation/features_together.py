"""`main(RANK, FILE)` is one of two processes that judge the images of `made` by the model of `dinov2`, together.

They meet in FILE, in the folder of both; the first writes together.json. See test_features.py.
"""

import os
from pathlib import Path
from typing import Any

import torch

from dumo.io.read import CACHE_VARIABLE
from dumo.report.evaluate_images import judge
from meeting import meeting

MODEL = ["evaluate.protocol.model=dinov2"]


def judged(out: str) -> dict[str, Any]:
    """The report."""
    return judge("made", "dinov2", against="real", fields=MODEL, out=Path(out), device="cpu")


def main(number: str, file: str) -> None:
    """This rank's part."""
    torch.set_num_threads(1)
    os.environ[CACHE_VARIABLE] = "cache"
    with meeting(file, int(number)):
        judged("together.json")
