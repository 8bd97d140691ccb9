"""Frozen tensors of a net: parameters without gradients, and fixed tables (buffers outside its state dict).

A net made from a pretrained model may train only a few weights or adapters. Frozen weights are in memory once: averages
share them with the net (`copy_net`, `share_frozen`), and checkpoints contain only the `trained_state_dict`.

`require` compares the `digest` of frozen weights, and refuses to resume a run if they have changed.
"""

from collections.abc import Collection, Iterator
from copy import deepcopy

from torch import Tensor, nn

from dumo.io import digest as digests
from dumo.io.deferred import Loaders, is_fake
from dumo.types import UserError


def frozen_weights(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the frozen parameters by name, a shared parameter under each of its names."""
    return {name: p for name, p in net.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _fixed_tables(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return a module's own buffers that are not in its state dict, with their names."""
    names = module._non_persistent_buffers_set
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return ((name, table) for name, table in buffers if name in names)


def trained_state_dict(net: nn.Module, module: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the state dict of a net, or of its copy `module`, without the net's frozen parameters."""
    frozen = frozen_weights(net)
    state_dict = net.state_dict() if module is None else module.state_dict()
    return {name: x for name, x in state_dict.items() if name not in frozen}


def copy_net(net: nn.Module) -> nn.Module:
    """Copy a net. The copy shares frozen parameters and fixed tables with it."""
    shared: dict[int, Tensor] = {id(p): p for p in frozen_weights(net).values()}
    for module in net.modules():
        for _, table in _fixed_tables(module):
            shared[id(table)] = table
    return deepcopy(net, shared)


def share_frozen(copy: nn.Module, net: nn.Module) -> None:
    """Restore the sharing of frozen parameters and fixed tables between a copy and its net."""
    for copy_module, net_module in zip(copy.modules(), net.modules(), strict=True):
        for name, p in net_module.named_parameters(recurse=False, remove_duplicate=False):
            if not p.requires_grad:
                setattr(copy_module, name, p)
        for name, table in _fixed_tables(net_module):
            setattr(copy_module, name, table)


def copy_buffers(copy: nn.Module, net: nn.Module) -> None:
    """Replace the buffers in the state dict of a copy by copies of the net's buffers."""
    for copy_module, net_module in zip(copy.modules(), net.modules(), strict=True):
        for name, buffer in net_module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in net_module._non_persistent_buffers_set:
                setattr(copy_module, name, buffer.clone())


def digest(net: nn.Module, loaders: Loaders | None = None, without: Collection[str] = ()) -> str | None:
    """Return a SHA-256 of the frozen parameters: names, shapes, dtypes, and evenly spaced values of each.

    `loaders` read the parameters on the meta device; parameters named in `without` are skipped. For a quantized layer
    (`dumo.nets.lowbit`) the digest of the original weight (`origin`) is used, because the codes depend on the version
    of bitsandbytes. Different models have different digests, but a change of a single value may go unnoticed. 20 B
    parameters take a second. The frozen biases of heads are skipped, because they are copies of the model's own and a
    run may start from a run with other heads. Return None if nothing is frozen, or if the net is on the meta device.
    """
    all_frozen = frozen_weights(net)
    frozen = {name: p for name, p in all_frozen.items() if name not in without and not _is_bias_of_head(name)}
    if not frozen or any(map(is_fake, frozen.values())):
        return None
    if any(p.is_meta for name, p in frozen.items() if name not in (loaders or {})):
        return None
    code_names: set[str] = set()
    for name in all_frozen:
        path, _, last = name.rpartition(".")
        if last == "origin":
            prefix = f"{path}." if path else ""
            code_names |= {f"{prefix}weight", f"{prefix}scales"}
    return digests.of_samples({name: p for name, p in frozen.items() if name not in code_names}, loaders)


def _is_bias_of_head(name: str) -> bool:
    """Whether a frozen parameter is the bias of a head (`dumo.nets.dualized`)."""
    return name.startswith("heads.") and name.endswith(".bias")


def require(now: str | None, before: str | None, whose: object) -> None:
    """Raise UserError if the digest of frozen weights differs from the recorded one. `whose` names the run."""
    if now != before:
        raise UserError(
            f"{whose} was trained on other frozen weights: restore them in its pipeline, set pipeline.source to their "
            "folder, keep net.lora.frozen unchanged, or start a new run in another folder"
        )
