"""What passes compute in, by name: `using` around a pass in evaluation; in training its two parts, around what each is
for: `product_precision` around the whole loop, `autocast` around a pass forward.

    fp32   products of matrices and convolutions as they are: cuDNN's, which take TF32 by default, too
    tf32   of a GPU's products and convolutions the factors are rounded to TF32, 10 bits of 23; elsewhere as fp32
    bf16   autocast: layers compute in bf16, 7 bits, what is sensitive in fp32; weights and their gradients stay fp32

A rounding is a setting of the process, which holds for backward passes, too; autocast is of a piece of code, around
passes forward alone: it keeps the weights it has cast by default, so no optimizer may step inside.

`uses_tf32` and `precision_of` say what holds now. A loss that multiplies the rounding of its net asks for fp32 by
`require_precise_passes`, before it makes a pass; `require_precision` is the same rule for a precision by name.

`to_float32` and `round_stochastically` are for single tensors that are stored in 16 bits.
"""

from collections.abc import Generator
from contextlib import contextmanager
from math import isinf
from typing import Literal

import torch
from torch import Tensor

from dumo.autodiff.cast import autocast_dtype
from dumo.types import Noised, Sample, UserError

Precision = Literal["fp32", "tf32", "bf16"]
HALVES = (torch.bfloat16, torch.float16)  # the types of 16 bits
# The largest gain below fp32: rounding to bf16, 2^-8 of u, is then 8 % of the residual: ours
MAX_GAIN = 20


@contextmanager
def using(precision: Precision, device: torch.device | str) -> Generator[None, None, None]:
    """Inside, passes forward on this device compute in this precision."""
    with product_precision(precision, device), autocast(precision, device):
        yield


def autocast(precision: Precision, device: torch.device | str, *, keep: bool = True) -> torch.autocast:
    """Inside, layers compute in bf16 where that is the precision, else as their inputs have it.

    `keep`: a weight is cast once for all passes, and held in bf16 to the end; else for each use of it.
    """
    device_type = torch.device(device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=keep)


@contextmanager
def product_precision(precision: Precision, device: torch.device | str) -> Generator[None, None, None]:
    """Inside, products and convolutions of a GPU in fp32 round to TF32 for "tf32", else not. A CPU has no such setting.

    Of the whole process; afterwards as before.
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
    """`matmul`: torch's name, "highest" for no rounding; `convolutions`: whether cuDNN's may use TF32."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


def uses_tf32(device_type: str) -> bool:
    """Whether products on this type of device are rounded to TF32 now."""
    return device_type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def precision_of(x: Sample) -> str:
    """The name of the precision of a pass on x: "fp32", also for float64; "tf32"; or a dtype, with "autocast"."""
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        return f"{dtype} autocast"
    if x.dtype == torch.float32 and uses_tf32(x.device.type):
        return "tf32"
    if x.dtype in (torch.float32, torch.float64):
        return "fp32"
    return str(x.dtype)


def require_precise_passes(b: Noised, gain: float, kind: str) -> None:
    """Raise UserError where passes on this record would be too coarse for an objective (`require_precision`)."""
    require_precision(precision_of(b.x_t), gain, kind)


def require_precision(precision: str, gain: float, kind: str) -> None:
    """Raise UserError where passes of this precision are too coarse: below fp32 a gain above MAX_GAIN is refused.

    gain: by how much objective `kind` multiplies the rounding of the net, at most; infinite: without bound.
    """
    if gain > MAX_GAIN and precision != "fp32":
        times = "without bound" if isinf(gain) else f"by up to {gain:g}"
        raise UserError(
            f"objective '{kind}' needs precision fp32, not {precision}: it multiplies the rounding of the net {times}. "
            "Use train.precision=fp32, a longer step, or objective 'meanflow' with slope 'dual'"
        )


def to_float32(x: Tensor) -> Tensor:
    """A tensor of 16 bits in float32; any other as it is."""
    return x.float() if x.dtype in HALVES else x


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """A tensor of float32 in bf16: each value goes to either neighbour, with the chances that keep its mean.

    `bits`: random whole numbers of x's shape, of which the last 16 bits count. What is not finite stays.
    """
    raised = x.contiguous().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    cut = (raised & -0x10000).view(torch.float32)  # the upper 16 bits are those of bf16
    return torch.where(x.isfinite(), cut, x).bfloat16()
