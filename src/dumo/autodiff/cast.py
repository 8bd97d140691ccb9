"""What autocast does on a type of device: `has_autocast` and `autocast_dtype`."""

import torch

# Asked once, when this is imported: torch 2.11 cannot trace the question.
_AUTOCAST_DEVICE_TYPES = tuple(
    device_type
    for device_type in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "ipu", "xla", "maia")
    if torch.amp.is_autocast_available(device_type)
)


def has_autocast(device_type: str) -> bool:
    """Whether torch.autocast takes this type of device."""
    return device_type in _AUTOCAST_DEVICE_TYPES


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that layers compute in on this type of device; None: autocast is off, or there is none."""
    if has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
