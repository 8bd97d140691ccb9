"""The precision in which passes compute, by name.

    fp32   products of matrices and convolutions in float32; also those of cuDNN, which take TF32 by default
    tf32   on a GPU their factors are rounded to TF32, which keeps 10 of 23 bits; elsewhere as fp32
    bf16   autocast: layers compute in bf16, of 7 bits, what is sensitive in float32; weights and gradients stay float32

- To set it in evaluation: put `using` around a pass.
- To set it in training, use its two halves separately. `product_precision` goes around the whole loop, because it is a
  setting of the process, and backward passes need it, too. `autocast` goes around each forward pass, because it keeps
  the weights that it has cast, so no optimizer may step inside.
- To ask what holds now: `uses_tf32` and `precision_of`.
- For single tensors that are stored in 16 bits: `to_float32` and `round_stochastically`.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from dumo.autodiff.cast import autocast_dtype
from dumo.types import Sample

Precision = Literal["fp32", "tf32", "bf16"]
HALVES = (torch.bfloat16, torch.float16)  # the floating-point types of 16 bits


@contextmanager
def using(precision: Precision, device: torch.device | str) -> Generator[None, None, None]:
    """Inside, passes forward on this device compute in this precision."""
    with product_precision(precision, device), autocast(precision, device):
        yield


def autocast(precision: Precision, device: torch.device | str, *, keep: bool = True) -> torch.autocast:
    """Inside, layers compute in bf16 if that is the precision, else in the type of their inputs.

    `keep`: whether a weight is cast once, and its copy in bf16 kept to the end; else it is cast for each use.
    """
    device_type = torch.device(device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=keep)


@contextmanager
def product_precision(precision: Precision, device: torch.device | str) -> Generator[None, None, None]:
    """Inside, a GPU's products and convolutions in float32 round their factors to TF32 for "tf32", else they do not.

    It is a setting of the whole process, and afterwards as before. A CPU has none.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    matmul_before = torch.get_float32_matmul_precision()
    convolutions_before = torch.backends.cudnn.allow_tf32
    if precision == "tf32":
        _set_rounding("high", True)
    else:
        _set_rounding("highest", False)
    try:
        yield
    finally:
        _set_rounding(matmul_before, convolutions_before)


def _set_rounding(matmul: str, convolutions: bool) -> None:
    """Set how float32 is rounded on GPUs.

    matmul: torch's name for products of matrices: "highest" for no rounding, "high" for TF32.
    convolutions: whether cuDNN's convolutions use TF32.
    """
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


def uses_tf32(device_type: str) -> bool:
    """Whether products on this type of device are rounded to TF32 now."""
    return device_type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def precision_of(x: Sample) -> str:
    """The name of the precision in which a pass on x would compute now.

    Under autocast the name is its dtype and "autocast"; for x in float32 or float64 "fp32", or "tf32" where float32 is
    rounded to it; else the dtype of x.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        return f"{dtype} autocast"
    if x.dtype == torch.float32 and uses_tf32(x.device.type):
        return "tf32"
    if x.dtype in (torch.float32, torch.float64):
        return "fp32"
    return str(x.dtype)


def to_float32(x: Tensor) -> Tensor:
    """A tensor of 16 bits in float32; any other as it is."""
    return x.float() if x.dtype in HALVES else x


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """A float32 tensor in bf16: each value goes to one of its two neighbours, with probabilities that keep the mean.

    bf16 has the upper 16 bits of a float32. A random number of 16 bits is added to the lower ones, which are then cut.
    `bits`: random whole numbers of x's shape, of which the last 16 bits count. What is not finite stays.
    """
    raised = x.contiguous().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    cut = (raised & -0x10000).view(torch.float32)  # the mask clears the lower 16 bits
    return torch.where(x.isfinite(), cut, x).bfloat16()
