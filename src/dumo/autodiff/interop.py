"""Make other code accept Duals: `torch.is_tensor`, and einops where it is imported.

`teach_others` is the entrance: `dumo.jvp` and dual slopes call it before a pass.
"""

import sys
from functools import cache
from typing import Any

import torch

from dumo.autodiff.dual import Dual


def teach_others() -> None:
    """Make torch.is_tensor return True for a Dual, and einops take one. Later calls look for einops alone."""
    _teach_is_tensor()
    if "einops" in sys.modules:
        _define_einops_backend()


@cache
def _teach_is_tensor() -> None:
    """Make torch.is_tensor return True for a Dual from now on.

    Models of diffusers ask it of times, also when a checkpoint is recomputed.
    """
    is_tensor = torch.is_tensor
    torch.is_tensor = lambda obj: isinstance(obj, Dual) or is_tensor(obj)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _define_einops_backend() -> type:
    """Define a backend, which einops finds among the subclasses of its own: it knows no type of ours."""
    from einops._backends import TorchBackend  # the one place where a type of tensors can be added

    class DualBackend(TorchBackend):
        """The backend of torch, for Duals: they answer to torch's functions."""

        framework_name = "dumo"

        def is_appropriate_type(self, tensor: Any) -> bool:  # noqa: ANN401, whatever einops is given
            return isinstance(tensor, Dual)

    return DualBackend
