"""How the weights of a run lie on its ranks: by torch's `fully_shard`, in place, on a mesh of copies by shares.

    share 1                every rank holds all weights, gradients are averaged        (replicated, as DDP)
    share of all ranks     each holds a part, weights are gathered for a pass          (sharded, as FSDP)
    between                parts within a copy, copies averaged with one another       (hybrid, as HSDP)

One process has no mesh, and its net is left as it is; torch's sharding, slow to import, is then not even imported.
Little else in dumo knows which of these it meets: parameters are `DTensor`s, which optimizers, averages and clipping
take as they take tensors.
"""

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn

from dumo import dist
from dumo.training.cut import share_of
from dumo.training.frozen import share, trained
from dumo.training.shard import local as local
from dumo.training.shard import whole as whole
from dumo.types import unwrap

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule


def mesh_of(share: int, device: torch.device) -> "DeviceMesh | None":
    """All ranks as copies by shares; None for one process. Every rank must call it."""
    if dist.world() == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    copies = dist.world() // (share := share_of(share, dist.world()))
    if copies == 1:
        return init_device_mesh(device.type, (share,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (copies, share), mesh_dim_names=("replicate", "shard"))


def lay(net: nn.Module, mesh: "DeviceMesh | None", copies: Sequence[nn.Module] = (), *, reshard: bool) -> None:
    """Spread a net over a mesh in place, its blocks (`net.blocks`, where it has them) one by one, onto its device; and
    its `copies`, averages, which go on sharing with it the parameters that they share.

    Every rank must hold the same numbers. `reshard`: gathered weights are given back after each pass, else after the
    backward one; of an average, which has none, they always are, for it is moved as a sharded one.
    """
    if mesh is None:
        return
    from torch.distributed.fsdp import fully_shard

    # The net's outputs may be views: no objective changes one in place, of which torch would warn at every pass.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for copy in copies:  # so that the whole of what is frozen is let go as the net is spread
        share(copy, outline(net))
    for module, back in ((net, reshard), *((copy, True) for copy in copies)):
        for part in (*getattr(module, "blocks", ()), module):
            fully_shard(part, mesh=mesh, reshard_after_forward=back)
    for copy in copies:  # fully_shard takes what it finds there at the first pass
        share(copy, net)


def outline(net: nn.Module) -> nn.Module:
    """A copy without numbers, on the meta device."""
    weights = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in net.parameters()}
    return deepcopy(net, weights | {id(x): x.to("meta") for x in net.buffers()})


def finish(net: nn.Module, step: bool, *, reshard: bool) -> None:
    """What the next backward pass ends in: a mean over ranks if it ends the `step`, else own gradients, added up.

    Weights that are gathered anyway stay so from pass to pass, unless `reshard`.
    """
    for root in parts(net)[:1]:
        root.set_requires_gradient_sync(step)
        root.set_reshard_after_backward(step or reshard)


def gives_back(reshard: bool) -> bool:
    """Whether gathered weights are given back after each pass, so that no cast of them may stay either."""
    return reshard and dist.world() > 1


def release(net: nn.Module) -> None:
    """Give back what a pass without a backward one has gathered: weights that a later step would not move."""
    for part in parts(net):
        part.reshard()


def parts(net: nn.Module) -> "list[FSDPModule]":
    """What of a net is gathered together, the root first; none where it is in one piece."""
    if dist.world() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in net.modules() if isinstance(part, FSDPModule)]


def gathered(net: nn.Module, build: Callable[[torch.device], nn.Module]) -> nn.Module:
    """The net in one piece on every rank: itself where it is, else one that `build` makes, with what was trained.

    Every rank must call it.
    """
    if not parts(net):
        return unwrap(net)
    twin = build(next(net.parameters()).device)
    twin.load_state_dict({name: whole(x) for name, x in trained(net).items()}, strict=False)
    return twin
