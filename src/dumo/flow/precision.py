"""The precision of a net's passes: what its products of matrices and its convolutions are made in.

`fp32` is IEEE's 24 bits throughout. `tf32` rounds the factors of products to 11 bits, on GPUs that can; elsewhere it is
fp32. `bf16` is autocast: products take 8 bits, norms and long sums stay in float32. Weights are always float32.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]


@contextmanager
def using(precision: Precision, device: torch.device | str) -> Generator[None, None, None]:
    """Inside, passes on this device are in this precision, whatever is set around; afterwards that is set again.

    torch itself lets convolutions round to TF32 unless it is told otherwise, and products not.
    """
    products, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = conv
