"""Make einops accept Duals, by `teach_einops`.

einops asks each of its backends whether a tensor is of its type, and knows no type of ours. `dumo.jvp` and dual slopes
call this before a pass; it does nothing unless einops is imported.
"""

import sys
from functools import cache
from typing import Any

from dumo.autodiff.dual import Dual


def teach_einops() -> None:
    """Add the type of Duals to einops, if it is imported. A second call does nothing."""
    if "einops" in sys.modules:
        _define_backend()


@cache
def _define_backend() -> type:
    """Define a backend, which einops finds among the subclasses of its own."""
    from einops._backends import TorchBackend  # the one place where a type of tensors can be added

    class DualBackend(TorchBackend):
        """The backend of torch, for Duals: they answer to torch's functions."""

        framework_name = "dumo"

        def is_appropriate_type(self, tensor: Any) -> bool:  # noqa: ANN401, whatever einops is given
            return isinstance(tensor, Dual)

    return DualBackend
