"""Load parameters on demand, for a network that is too large for host memory and is built on the meta device.

A caller has such a network and its `Loaders`. A rank first shards the network, then loads the parameters one by one and
keeps its shards (`dumo.training.layout.shard`). `load_parameters` loads all parameters of an unsharded network. At any
time, host memory has at most one full parameter besides the shards.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

# Functions that return the values of a parameter on the CPU, by its name. Values may be memory-mapped, so they must not
# be modified.
Loaders = Mapping[str, Callable[[], Tensor]]
Net = TypeVar("Net", bound=nn.Module)


def load_parameters(net: Net, loaders: Loaders, device: torch.device | str = "cpu") -> Net:
    """Load the parameters of a network, one by one, onto a device. Returns the network.

    Parameters on the CPU stay memory-mapped.
    """
    for name, load in loaders.items():
        path, _, last = name.rpartition(".")
        module = net.get_submodule(path)
        parameter = getattr(module, last)
        setattr(module, last, nn.Parameter(load().to(device), parameter.requires_grad))
    return net


def is_fake(x: Tensor) -> bool:
    """Whether a tensor is a `FakeTensor`, which has a device and a shape but no values."""
    return isinstance(x, FakeTensor)
