"""What is frozen in a net: parameters without gradients, and fixed tables (buffers outside its state dict).

A net made of a pretrained model may train a few of its weights, or adapters alone. The frozen ones are in memory once:
averages share them with the net (`copy_net`, `share_frozen`), and checkpoints hold the `trained_state_dict` alone.

`require` refuses to resume a run on other frozen weights than it began with, by their `digest`.
"""

from collections.abc import Collection, Iterator
from copy import deepcopy

from torch import Tensor, nn

from dumo.io import digest as digests
from dumo.io.deferred import Loaders, is_fake
from dumo.types import UserError


def frozen_weights(net: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen parameters by name; one with two names is there twice."""
    return {name: p for name, p in net.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _fixed_tables(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own buffers that are not in its state dict, by name."""
    names = module._non_persistent_buffers_set
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return ((name, table) for name, table in buffers if name in names)


def trained_state_dict(net: nn.Module, module: nn.Module | None = None) -> dict[str, Tensor]:
    """The state dict of a net, or of its copy `module`, without the net's frozen parameters."""
    frozen = frozen_weights(net)
    state_dict = net.state_dict() if module is None else module.state_dict()
    return {name: x for name, x in state_dict.items() if name not in frozen}


def copy_net(net: nn.Module) -> nn.Module:
    """Copy a net; the copy shares the frozen parameters and fixed tables with it."""
    shared: dict[int, Tensor] = {id(p): p for p in frozen_weights(net).values()}
    for module in net.modules():
        for _, table in _fixed_tables(module):
            shared[id(table)] = table
    return deepcopy(net, shared)


def share_frozen(copy: nn.Module, net: nn.Module) -> None:
    """Make a copy share the frozen parameters and fixed tables of the net again."""
    for copy_module, net_module in zip(copy.modules(), net.modules(), strict=True):
        for name, p in net_module.named_parameters(recurse=False, remove_duplicate=False):
            if not p.requires_grad:
                setattr(copy_module, name, p)
        for name, table in _fixed_tables(net_module):
            setattr(copy_module, name, table)


def copy_buffers(copy: nn.Module, net: nn.Module) -> None:
    """Replace the buffers of a copy that are in its state dict by copies of the net's."""
    for copy_module, net_module in zip(copy.modules(), net.modules(), strict=True):
        for name, buffer in net_module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in net_module._non_persistent_buffers_set:
                setattr(copy_module, name, buffer.clone())


def digest(net: nn.Module, loaders: Loaders | None = None, without: Collection[str] = ()) -> str | None:
    """A SHA-256 of the frozen parameters: names, shapes, types, and some values of each, spread evenly.

    `loaders` reads the parameters that are on the meta device; those named in `without` are left out. For a layer of
    codes (`dumo.nets.lowbit`) the digest of the original weight counts (`origin`), not the codes: another version of
    bitsandbytes may choose other ones. 20 B parameters take a second. Another model has another digest; a change of a
    single value may go unseen. The fixed biases of heads are copies of the model's own, and a run may begin with one of
    other heads, so these do not count. Returns None if nothing is frozen, or the net is on the meta device.
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
    """Raise UserError if a digest differs from that of the weights that `whose` training began with."""
    if now != before:
        raise UserError(
            f"{whose} was trained on other frozen weights than its net has now: put those back where its pipeline "
            f"is, or set pipeline.source to where they are; keep net.lora.frozen as it was; or train anew in another "
            "folder"
        )
