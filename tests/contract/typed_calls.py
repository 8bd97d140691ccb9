"""Calls of `import dumo` whose types a checker must know: `test_typing.py` runs pyright on this file."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dumo

run = dumo.load("digits-trained")
tensor: torch.Tensor = run.sample([3, 5], nfe=1)
same: torch.Tensor = run.sample(labels=run.classes, count=20, seed=0, output="pt")
array: np.ndarray = run.sample(3, output="np")
pictures: list[Image.Image] = run.sample(count=2, guidance=1.5, output="pil")
exported: Path = run.export("out", to="safetensors")
report: dict[str, object] = run.evaluate(metrics={"mean": lambda x: float(x.mean())})
again = dumo.train("digits", {"train.steps": 3}, minutes=5).step
names: list[str | None] = [row["name"] for row in dumo.recipes()]
rows: object = dumo.compare([run, "runs/other", Path("runs/third")])["rows"]

run.sample(num_inference_steps=3)  # pyright: ignore[reportCallIssue]
run.sample(output="jpg")  # pyright: ignore[reportArgumentType]
