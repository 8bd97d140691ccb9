"""A net of random weights and some images, as torch-fidelity 0.4.0 read them once: inception.json has its numbers.

The weights are drawn by name, so that another Inception with the same names can be filled with them.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from dumo.encoders.inception import Inception
from dumo.runtime.random import stream

FILE = Path(__file__).with_name("inception.json")


def weight(name: str, shape: torch.Size) -> Tensor:
    """Normal weights of He et al. 2015, normalisations that keep about the scale but are nowhere the identity."""
    draws = stream("inception", name)
    if name.endswith("conv.weight") or name == "fc.weight":
        return torch.randn(shape, generator=draws) * (2 / shape[1:].numel()) ** 0.5
    if name.endswith(("bn.weight", "running_var")):
        return 0.5 + torch.rand(shape, generator=draws)
    return 0.2 * torch.randn(shape, generator=draws)


def net() -> Inception:
    """The whole network with those weights."""
    with torch.device("meta"):
        made = Inception()
    made.load_state_dict({name: weight(name, w.shape) for name, w in made.state_dict().items()}, assign=True)
    return made


def images(size: int) -> Tensor:
    """Two images: colours at random, and the same smoothed, which tells positions apart."""
    x = torch.randint(256, (2, 3, size, size), generator=stream("images", size), dtype=torch.uint8)
    smooth = torch.nn.functional.avg_pool2d(x[1:].float(), 9, 1, 4, count_include_pad=False)
    return torch.cat([x[:1], smooth.round().to(torch.uint8)])


def summary(x: Tensor) -> dict[str, object]:
    """What is kept of an output: a slice of both rows, mean and norm."""
    x = x.double()
    picked = x[:, :: max(1, x.shape[1] // 8)][:, :8]
    return {"shape": list(x.shape), "mean": x.mean().item(), "norm": x.norm().item(), "slice": picked.tolist()}


def golden() -> dict[str, dict[str, dict[str, object]]]:
    """By size of the images, then by output."""
    return json.loads(FILE.read_text())["outputs"]
