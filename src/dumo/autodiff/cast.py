"""Whether a type of device has autocast, and computes in it now."""

import torch


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace torch's own function
def has_autocast(device_type: str) -> bool:
    """Whether torch.autocast takes this type of device."""
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What layers compute in on this type of device; None: autocast is off, or there is none."""
    if has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
