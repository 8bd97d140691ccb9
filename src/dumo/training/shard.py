"""A tensor that may lie in parts on ranks: the whole of it, the part that is here, and a part of what is whole here."""

from typing import TYPE_CHECKING, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def whole(x: Tensor) -> Tensor:
    """A tensor in one piece, on every rank; itself where it is. Every rank must call it."""
    return cast("DTensor", x).full_tensor() if hasattr(x, "full_tensor") else x


def local(x: Tensor) -> Tensor:
    """The part of a tensor that is on this rank; itself where it is in one piece."""
    return cast("DTensor", x).to_local() if hasattr(x, "to_local") else x


def laid(x: Tensor, like: Tensor) -> Tensor:
    """What all ranks hold whole, laid out as another tensor of its shape: nothing is sent."""
    if not hasattr(like, "to_local"):
        return x
    from torch.distributed.tensor import distribute_tensor

    there = cast("DTensor", like)
    return distribute_tensor(x, there.device_mesh, there.placements, src_data_rank=None)
