"""What a machine has room for: a size that is known before anything is made is compared with the memory there is."""

import os

import torch

from dumo.types import UserError


def memory(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require(size: int, what: str, way: str, device: torch.device | str = "cpu") -> None:
    """Raise UserError, with the way out, where `what` is more bytes than the device has; 'meta' has room for all."""
    device = torch.device(device)
    if device.type != "meta" and size > (most := memory(device)):
        raise UserError(f"{what} {size / 1e9:,.1f} GB of memory, and {device} has {most / 1e9:,.1f} GB: {way}")
