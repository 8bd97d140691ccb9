"""The name of a device in reports."""

import platform
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    """A device's name."""

    text: str


def hardware(device: torch.device) -> Hardware:
    """The name of the GPU or processor."""
    if device.type == "cuda":
        return Hardware(torch.cuda.get_device_name(device))
    return Hardware(platform.processor() or platform.machine())
