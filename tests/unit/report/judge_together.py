"""`main(RANK, FILE)` is one of two processes that judge the images of `few` and `many`, here, together.

They meet in FILE; the first writes PLACE-together.json. See test_images.py.
"""

from pathlib import Path
from typing import Any

import torch

from dumo.report.evaluate_images import judge
from meeting import meeting


def judged(place: str) -> dict[str, Any]:
    """The report of one place against the other."""
    other = {"few": "many", "many": "few"}[place]
    return judge(place, against=other, out=Path(f"{place}-together.json"), device="cpu")


def main(number: str, file: str) -> None:
    """This rank's part."""
    torch.set_num_threads(1)
    with meeting(file, int(number)):
        for place in ("few", "many"):
            judged(place)
