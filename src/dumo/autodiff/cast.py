"""Query autocast by device type: `has_autocast` and `autocast_dtype`."""

import torch

# Computed at import, because torch 2.11 cannot trace `is_autocast_available`.
_AUTOCAST_DEVICE_TYPES = tuple(
    device_type
    for device_type in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "ipu", "xla", "maia")
    if torch.amp.is_autocast_available(device_type)
)


def has_autocast(device_type: str) -> bool:
    """Whether torch.autocast supports this device type."""
    return device_type in _AUTOCAST_DEVICE_TYPES


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype in which autocast layers compute on this device type, or None if autocast is off."""
    if has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
