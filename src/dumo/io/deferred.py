"""Parameters whose values are read later: a network too large for the host is built on the meta device.

A caller has such a network and its `Loaders`. A rank shards the network first, then loads one parameter after another
and keeps its part (`dumo.training.layout.shard`). `load_parameters` loads all of them, for a network in one piece. The
host then never holds more than one parameter in full, and what it keeps.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

# By the name of a parameter on the meta device, what returns its values on the CPU. They may be mapped from a file, so
# they are not to be changed.
Loaders = Mapping[str, Callable[[], Tensor]]
Net = TypeVar("Net", bound=nn.Module)


def load_parameters(net: Net, loaders: Loaders, device: torch.device | str = "cpu") -> Net:
    """Load the parameters of a network, one by one, onto a device. Returns the network.

    What is loaded onto the CPU stays mapped from its file.
    """
    for name, load in loaders.items():
        path, _, last = name.rpartition(".")
        module = net.get_submodule(path)
        parameter = getattr(module, last)
        setattr(module, last, nn.Parameter(load().to(device), parameter.requires_grad))
    return net


def is_fake(x: Tensor) -> bool:
    """Whether a tensor is torch's `FakeTensor`: a device and a shape without values, to count bytes."""
    return isinstance(x, FakeTensor)
