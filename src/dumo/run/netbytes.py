"""Bytes of tensors that exist or may exist: of a net, on any device, and of rows. Sums of sizes, known at once.

`least_bytes` is a lower bound of what a training holds, before anything is made. `weight_bytes` is what a net takes,
`row_bytes` what samples take. `net_tensors` and `tensor_bytes` are for sums over other tensors. What a training takes
in all is counted by `dumo.run.memory`.
"""

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor, nn


def weight_bytes(net: nn.Module) -> int:
    """Bytes of a net's parameters and buffers."""
    return tensor_bytes(net_tensors(net))


def row_bytes(rows: int, shape: Sequence[int]) -> int:
    """Bytes of `rows` samples of a shape, in float32."""
    return rows * prod(shape) * torch.float32.itemsize


def least_bytes(net: nn.Module, copies: float = 0) -> int:
    """The least bytes that a net takes with `copies` of its trained weights (`Train.copies`)."""
    trained = tensor_bytes(p for p in net.parameters() if p.requires_grad)
    return weight_bytes(net) + int(copies * trained)


def net_tensors(net: nn.Module) -> tuple[Tensor, ...]:
    """A net's parameters and buffers."""
    return (*net.parameters(), *net.buffers())


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(x.nbytes for x in tensors)
