"""Compute the derivative of a network's outputs in float64, as a reference for the slopes.

`exact_derivative` computes it, `copied_bytes` predicts the extra memory for weights, and `copy_sharing_weights` copies
a network so that its training mode can be changed.

A float64 copy of a large network may not fit in memory. For dumo's own networks, the modules are copied and the
parameters are shared (`deepcopy` finds them in its memo). The parameters outside of blocks are then replaced by float64
copies, and those of a block only while the block runs (`_BlockCast`). Parameters are replaced by `setattr` on the
copied module and never modified in place, so the original network keeps its weights.

Other networks are copied completely, because they may modify their weights or bypass their blocks.
"""

import copy
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.types import Cond, Heads, Sample, Time


def exact_derivative(net: nn.Module, x_t: Sample, direction: Sample, c: Cond, /, **inputs: Time) -> Heads:
    """Compute d/dt of every output of a network in float64, by forward-mode differentiation.

    The tangents are `direction` = dx_t/dt for x_t (b, *d) and 1 for t, which is one of `inputs`. It runs on the device
    of x_t, or on the CPU if that device has no float64. The network keeps its weights and its mode.
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

    # Fused attention kernels have no forward derivative.
    with torch.no_grad(), torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        result = torch.func.jvp(outputs, (x_t, t), (direction, torch.ones_like(t)))
    derivatives = result[1]
    return cast(Heads, derivatives)


def copy_sharing_weights(net: nn.Module) -> nn.Module:
    """Copy a network. The copy of one of dumo's own networks shares its parameters."""
    if not is_from_dumo(net):
        return copy.deepcopy(net)
    shared = {id(p): p for p in net.parameters()}
    return copy.deepcopy(net, shared)


def copied_bytes(net: nn.Module) -> int:
    """Return the peak number of bytes of weights that `exact_derivative` allocates. `net` may be on the meta device.

    For dumo's networks, these are the largest block and all weights outside of blocks, in float64. For others, these
    are all weights twice: in their own dtype and in float64.
    """
    block_bytes = [_bytes_in_float64(block) for block in _cast_blocks(net)]
    bytes_outside_blocks = _bytes_in_float64(net) - sum(block_bytes)
    float64_bytes = bytes_outside_blocks + max(block_bytes, default=0)
    if is_from_dumo(net):
        return float64_bytes
    return float64_bytes + sum(p.nbytes for p in net.parameters())


def is_from_dumo(net: nn.Module) -> bool:
    """Whether a network's class is defined in dumo."""
    package, _, _ = type(net).__module__.partition(".")
    return package == "dumo"


def _cast_blocks(net: nn.Module) -> Iterable[nn.Module]:
    """Return the blocks to cast to float64 only while they run; none for networks from outside dumo."""
    return getattr(net, "blocks", ()) if is_from_dumo(net) else ()


def _bytes_in_float64(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers with floating-point tensors in float64."""
    total = 0
    for x in (*module.parameters(), *module.buffers()):
        itemsize = torch.float64.itemsize if x.is_floating_point() else x.itemsize
        total += x.numel() * itemsize
    return total


def float64_copy(net: nn.Module, device: torch.device) -> nn.Module:
    """Copy a network to a device in float64. The weights of a block are cast when the block is called."""
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
    """Cast a block's weights to float64 before it runs, and restore the shared weights afterwards."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        """Store the weights of the block and of all its submodules."""
        self.modules = modules
        self.device = device
        self.weights = [_own_weights(module) for module in modules]

    def cast(self, *_: object) -> None:
        """Cast the weights; a forward pre-hook."""
        for module in self.modules:
            _cast(module, self.device)

    def restore(self, *_: object) -> None:
        """Restore the weights and free the float64 copies; a forward hook."""
        for module, weights in zip(self.modules, self.weights, strict=True):
            for name, x in weights.items():
                setattr(module, name, x)


def _own_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and buffers by name, without those of its submodules."""
    named_parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    named_buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return {**dict(named_parameters), **dict(named_buffers)}


def _cast(module: nn.Module, device: torch.device) -> None:
    """Replace a module's own parameters and buffers by copies on a device, with floating-point tensors in float64."""
    for name, x in _own_weights(module).items():
        dtype = torch.float64 if x.is_floating_point() else x.dtype
        values = x.detach().to(device, dtype)
        if isinstance(x, nn.Parameter):
            values = nn.Parameter(values, requires_grad=False)
        setattr(module, name, values)
