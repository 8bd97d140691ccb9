"""einops takes Duals: it asks its backends whose a tensor is, by type, and knows none of ours."""

import sys
from functools import cache
from typing import Any

from dumo.autodiff.dual import Dual


def teach_einops() -> None:
    """Make Duals known to einops, once it is imported."""
    if "einops" in sys.modules:
        _backend()


@cache
def _backend() -> type:
    """The backend, which einops finds among the subclasses of its own."""
    from einops._backends import TorchBackend  # the one place where a type of tensors can be added

    class DualBackend(TorchBackend):
        """Duals answer to torch's functions, so all is done as there."""

        framework_name = "dumo"

        def is_appropriate_type(self, tensor: Any) -> bool:  # noqa: ANN401, whatever einops is given
            return isinstance(tensor, Dual)

    return DualBackend
