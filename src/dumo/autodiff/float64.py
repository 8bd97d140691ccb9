"""The derivative of a net's outputs in float64, without a copy of the weights of dumo's own nets.

`exact_derivative` takes it, as the truth that other ways are compared with. `copied_bytes` counts the memory of weights
that it needs besides the net, and `copy_sharing_weights` makes a copy of a net whose mode may be changed.

A float64 copy of a large net would not fit next to it. So the modules of one of dumo's nets are copied, and their
parameters are shared: `deepcopy` is given them in its memo, as if they were copied already. Then the parameters outside
of blocks are replaced in float64, and those of a block while it runs (`_BlockCast`). What must hold: a replacement
binds another tensor to a module of the copy by `setattr`, and never writes to a shared tensor. So the net itself
keeps its weights, whatever happens to the copy.

A user's own net is copied whole, because its passes may write to its weights, and not call its blocks.
"""

import copy
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.types import Cond, Heads, Sample, Time


def exact_derivative(net: nn.Module, x_t: Sample, direction: Sample, c: Cond, /, **inputs: Time) -> Heads:
    """d/dt of every output of a net in float64, by forward-mode differentiation.

    x_t (b, *d) moves along `direction`, dx_t/dt, and t, which is among `inputs`, with 1. It is computed on the device
    of x_t, on the CPU where that has no float64. The weights and the mode of the net stay as they are.
    """
    device = torch.device("cpu") if x_t.device.type == "mps" else x_t.device
    float64_net = float64_copy(net, device)
    x_t = x_t.to(device).double()
    direction = direction.to(x_t)
    c = c.to(device)
    other_inputs = {name: value.to(device).double() for name, value in inputs.items()}
    t = other_inputs.pop("t")

    def outputs(x_t: Sample, t: Time) -> Heads:
        return float64_net(x_t, c, t=t, **other_inputs)

    # no fused kernel has a forward derivative
    with torch.no_grad(), torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        result = torch.func.jvp(outputs, (x_t, t), (direction, torch.ones_like(t)))
    derivatives = result[1]
    return cast(Heads, derivatives)


def copy_sharing_weights(net: nn.Module) -> nn.Module:
    """Copy a net. The copy shares the parameters of one of dumo's own nets; a user's own net is copied whole."""
    if not is_from_dumo(net):
        return copy.deepcopy(net)
    shared = {id(p): p for p in net.parameters()}
    return copy.deepcopy(net, shared)


def copied_bytes(net: nn.Module) -> int:
    """The most bytes of weights that `exact_derivative` of a copy holds besides the net. `net` may be a meta model.

    Of dumo's nets these are the largest block and all outside of blocks, in float64. Of a user's own they are all
    weights, twice: as they are and in float64.
    """
    block_bytes = [_bytes_in_float64(block) for block in _cast_blocks(net)]
    bytes_outside_blocks = _bytes_in_float64(net) - sum(block_bytes)
    float64_bytes = bytes_outside_blocks + max(block_bytes, default=0)
    if is_from_dumo(net):
        return float64_bytes
    return float64_bytes + sum(p.nbytes for p in net.parameters())


def is_from_dumo(net: nn.Module) -> bool:
    """Whether a net's class is one of dumo's."""
    package, _, _ = type(net).__module__.partition(".")
    return package == "dumo"


def _cast_blocks(net: nn.Module) -> Iterable[nn.Module]:
    """The blocks whose weights are in float64 only while they run: none of a user's net, which may not call them."""
    return getattr(net, "blocks", ()) if is_from_dumo(net) else ()


def _bytes_in_float64(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers once floating-point ones are in float64."""
    total = 0
    for x in (*module.parameters(), *module.buffers()):
        itemsize = torch.float64.itemsize if x.is_floating_point() else x.itemsize
        total += x.numel() * itemsize
    return total


def float64_copy(net: nn.Module, device: torch.device) -> nn.Module:
    """Copy a net to a device, to compute in float64. The weights of blocks are cast when the block is called."""
    float64_net = copy_sharing_weights(net)
    modules_in_blocks: set[nn.Module] = set()
    for block in _cast_blocks(float64_net):
        modules = [*block.modules()]
        modules_in_blocks.update(modules)
        block_cast = _BlockCast(modules, device)
        block.register_forward_pre_hook(block_cast.cast)
        block.register_forward_hook(block_cast.restore)
    for module in float64_net.modules():
        if module not in modules_in_blocks:
            _cast(module, device)
    return float64_net


class _BlockCast:
    """Casts a block's weights to float64 before it runs, and puts back the shared ones afterwards."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        """Remember the weights of all modules of a block, the block among them."""
        self.modules = modules
        self.device = device
        self.weights = [_own_weights(module) for module in modules]

    def cast(self, *_: object) -> None:
        """Cast the weights; a hook before a pass."""
        for module in self.modules:
            _cast(module, self.device)

    def restore(self, *_: object) -> None:
        """Put back the weights, which frees those in float64; a hook after a pass."""
        for module, weights in zip(self.modules, self.weights, strict=True):
            for name, x in weights.items():
                setattr(module, name, x)


def _own_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers by name, without those of modules in it."""
    named_parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    named_buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return {**dict(named_parameters), **dict(named_buffers)}


def _cast(module: nn.Module, device: torch.device) -> None:
    """Bind copies on a device, floating-point ones in float64, in place of a module's own parameters and buffers."""
    for name, x in _own_weights(module).items():
        dtype = torch.float64 if x.is_floating_point() else x.dtype
        values = x.detach().to(device, dtype)
        if isinstance(x, nn.Parameter):
            values = nn.Parameter(values, requires_grad=False)
        setattr(module, name, values)
