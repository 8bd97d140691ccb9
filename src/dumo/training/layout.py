"""Shard a run's weights over ranks with torch's `fully_shard`, in place, on a mesh of replicas x shards.

    train.share = 1            every rank has all weights, gradients are averaged         (replicated, as DDP)
    train.share = all ranks    every rank has a shard, weights are gathered for a pass    (sharded, as FSDP)
    between                    shards within a replica, replicas are averaged             (hybrid, as HSDP)

The order of events:

1. Before the first step, `mesh_of` creates the mesh, and `shard` shards a net and its averages over it.
2. A step calls `prepare_backward` before each backward pass.
3. A weight is read as a whole (`full_tensor`) or as this rank's shard (`local_tensor`). `gather_net` returns an
   unsharded net for sampling.

A single process has no mesh and does not import torch's sharding, which is slow to import; its net is unchanged except
for weights trained in bf16. Sharded parameters are `DTensor`s, which optimizers, averages and gradient clipping accept
as tensors.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from math import prod
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dumo.flow.precision import HALVES
from dumo.io.deferred import Loaders
from dumo.runtime import dist
from dumo.training.frozen import copy_buffers, share_frozen, trained_state_dict
from dumo.types import UserError, unwrap

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def share_of(requested: int, ranks: int) -> int:
    """Return the number of shards of the weights: `requested`, or the number of ranks if that is less.

    Raise UserError if it does not divide the number of ranks.
    """
    share = min(requested, ranks)
    if ranks % share:
        divisors = " or ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UserError(f"train.share = {share} does not divide {ranks} ranks: set train.share={divisors}")
    return share


def mesh_of(share: int, device: torch.device) -> "DeviceMesh | None":
    """Create the mesh of replicas with `share` ranks each; None for one process. Every rank must call it."""
    if dist.world() == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    share = share_of(share, dist.world())
    replicas = dist.world() // share
    if replicas == 1:
        return init_device_mesh(device.type, (share,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, share), mesh_dim_names=("replicate", "shard"))


def shard(
    net: nn.Module,
    mesh: "DeviceMesh | None",
    averages: Sequence[nn.Module] = (),
    loaders: Loaders | None = None,
    *,
    reshard: bool,
    restored: bool = False,
    in_bfloat16: bool = False,
) -> None:
    """Shard a net and its averages over a mesh in place, block by block (`net.blocks`), onto the mesh's device.

    Every rank must have the same values, and keeps its shard. Averages are on the meta device (`meta_copy`), and are
    initialized with the values of the net.

    - `loaders`: read the parameters on the meta device, one by one
    - `reshard`: free gathered weights after each pass, else after the backward pass; averages always free them
    - `restored`: do not read trained weights, because a checkpoint will be loaded
    - `in_bfloat16`: round the net's trained parameters to bf16, after the averages are initialized

    Averages keep sharing frozen parameters with the net. Without a mesh only `in_bfloat16` has an effect.
    """
    if mesh is None:
        if in_bfloat16:
            _convert(net, _to_bfloat16)
        return
    # torch warns about outputs that are views at every pass; no objective changes an output in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    _shard_net(net, mesh, loaders or {}, reshard=reshard, restored=restored)
    for average in averages:
        _shard_average(average, net, mesh, restored=restored)
    if in_bfloat16:
        _convert(net, _to_bfloat16)
    # fully_shard collects the parameters at the first pass.
    for average in averages:
        share_frozen(average, net)


def _shard_net(
    net: nn.Module,
    mesh: "DeviceMesh",
    loaders: Loaders,
    *,
    reshard: bool,
    restored: bool,
) -> None:
    """Shard a net and read this rank's shard of each parameter. With `restored`, trained ones stay uninitialized."""

    def read_part(name: str, like: Tensor) -> Tensor:
        part = torch.empty_like(like, device=mesh.device_type)
        if restored and like.requires_grad:
            return part
        return part.copy_(shard_like(loaders[name](), part))

    _shard_blocks(net, mesh, reshard=reshard)
    replace_parameters(net, loaders.keys(), read_part)


def _shard_average(average: nn.Module, net: nn.Module, mesh: "DeviceMesh", *, restored: bool) -> None:
    """Shard an average and copy the values of the sharded net. With `restored`, trained ones stay uninitialized."""
    net_parameters = dict(net.named_parameters())
    trained_names = [name for name, p in net_parameters.items() if p.requires_grad]

    def copy_part(name: str, like: Tensor) -> Tensor:
        part = torch.empty_like(like, device=mesh.device_type)
        if restored:
            return part
        return part.copy_(net_parameters[name])

    _shard_blocks(average, mesh, reshard=True)
    replace_parameters(average, trained_names, copy_part)
    copy_buffers(average, net)


def _shard_blocks(module: nn.Module, mesh: "DeviceMesh", *, reshard: bool) -> None:
    """Shard a module's blocks, then the rest of it. With `reshard`, free gathered weights after each forward pass."""
    from torch.distributed.fsdp import fully_shard

    for part in (*getattr(module, "blocks", ()), module):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)


@torch.no_grad()
def replace_parameters(module: nn.Module, names: Collection[str], make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace the named parameters of a sharded module by `make(name, parameter)`."""
    name_of: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if name in names}
    _convert(module, lambda x: make(name_of[x], x) if x in name_of else x)


def _convert(net: nn.Module, f: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter and buffer x, sharded or not, by f(x)."""
    net._apply(f)


def _to_bfloat16(x: Tensor) -> Tensor:
    """Convert a trained parameter to bf16; return frozen parameters and buffers unchanged."""
    return x.bfloat16() if isinstance(x, nn.Parameter) and x.requires_grad else x


def trains_in_16_bits(net: nn.Module) -> bool:
    """Whether a net has trained weights in 16 bits, so that its passes need autocast."""
    return any(p.requires_grad and p.dtype in HALVES for p in net.parameters())


def meta_copy(net: nn.Module) -> nn.Module:
    """Copy a net to the meta device."""
    copies: dict[int, Tensor] = {}
    for p in net.parameters():
        copies[id(p)] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    for x in net.buffers():
        copies[id(x)] = x.to("meta")
    return deepcopy(net, copies)


def prepare_backward(net: nn.Module, is_last: bool, *, reshard: bool) -> None:
    """Average gradients over ranks in the next backward pass if it is the step's last, else accumulate them locally.

    Weights stay gathered between passes unless `reshard` is set.
    """
    root = _sharded_root(net)
    if root is not None:
        root.set_requires_gradient_sync(is_last)
        root.set_reshard_after_backward(is_last or reshard)


def frees_gathered_weights(reshard: bool) -> bool:
    """Whether gathered weights are freed after each pass, so that their casts must not be cached either."""
    return reshard and dist.world() > 1


def _sharded_root(net: nn.Module) -> "FSDPModule | None":
    """Return the net if it is sharded, else None."""
    if dist.world() == 1:
        return None
    from torch.distributed.fsdp import FSDPModule

    return net if isinstance(net, FSDPModule) else None


def gather_net(net: nn.Module, build: Callable[[torch.device], nn.Module]) -> nn.Module:
    """Return the unsharded net in float32 on every rank.

    If the net is sharded or trained in bf16, `build(device)` creates a new net that receives the trained weights;
    otherwise the net itself is returned. Every rank must call it.
    """
    if _sharded_root(net) is None and not trains_in_16_bits(net):
        return unwrap(net)
    whole_net = build(next(net.parameters()).device)
    weights = whole_net.state_dict()
    # Gather one tensor at a time, to avoid a second full copy of the net.
    for name, x in trained_state_dict(net).items():
        weights[name].copy_(full_tensor(x.detach()))
    return whole_net


def full_tensor(x: Tensor) -> Tensor:
    """Return the full tensor on every rank. Every rank must call it."""
    return cast("DTensor", x).full_tensor() if hasattr(x, "full_tensor") else x


def local_tensor(x: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return cast("DTensor", x).to_local() if hasattr(x, "to_local") else x


def local_offset(x: Tensor) -> tuple[int, ...]:
    """Return the offset of this rank's shard in the full tensor, by dimension."""
    if not hasattr(x, "to_local"):
        return (0,) * x.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = cast("DTensor", x)
    return compute_local_shape_and_global_offset(x.shape, sharded.device_mesh, sharded.placements)[1]


def offset_on_rank(x: Tensor) -> int:
    """Return the flat index, in the full tensor, of the first element on this rank. Tensors are sharded by rows."""
    return local_offset(x)[0] * prod(x.shape[1:]) if hasattr(x, "to_local") else 0


def replica_of(x: Tensor) -> tuple[int, int]:
    """Return the index of this rank among the ranks with the same shard of a tensor, and the number of these ranks."""
    if not hasattr(x, "to_local"):
        return dist.rank(), dist.world()
    sharded = cast("DTensor", x)
    replica = 0
    num_replicas = 1
    coordinates = sharded.device_mesh.get_coordinate() or ()
    for size, coordinate, placement in zip(sharded.device_mesh.shape, coordinates, sharded.placements, strict=True):
        if not placement.is_shard():
            replica = replica * size + coordinate
            num_replicas *= size
    return replica, num_replicas


def empty_rows_like(x: Tensor, width: int) -> Tensor:
    """Return an uninitialized float32 tensor (rows of `x`, `width`), sharded by rows like `x`."""
    local_rows = torch.empty(local_tensor(x).shape[0], width, device=x.device)
    if not hasattr(x, "to_local"):
        return local_rows
    from torch.distributed.tensor import DTensor

    sharded = cast("DTensor", x)
    return DTensor.from_local(
        local_rows,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=torch.Size([x.shape[0], width]),
        stride=(width, 1),
    )


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """Shard the full tensor `x`, which is equal on all ranks, like the tensor `like`, without communication."""
    if not hasattr(like, "to_local"):
        return x
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", like)
    return distribute_tensor(x, sharded.device_mesh, sharded.placements, src_data_rank=None)
