"""How a run's weights are laid out over ranks: by torch's `fully_shard`, in place, on a mesh of replicas x shards.

    train.share = 1            every rank holds all weights, gradients are averaged       (replicated, as DDP)
    train.share = all ranks    each holds a shard, weights are gathered for a pass        (sharded, as FSDP)
    between                    shards within a replica, replicas are averaged             (hybrid, as HSDP)

The order of events:

1. `mesh_of` makes the mesh, and `shard` lays a net and its averages out over it, once, before the first step.
2. A step calls `prepare_backward` before each backward pass. After a forward pass without a backward one it calls
   `release`.
3. A weight is read as a whole (`full_tensor`) or as this rank's part (`local_tensor`). `gather_net` makes a net in one
   piece, for sampling.

One process has no mesh, and never imports torch's sharding, which is slow to import; its net stays as it is, but for
weights that are to be trained in bf16. The rest of dumo rarely needs to know: sharded parameters are `DTensor`s, which
optimizers, averages and clipping take as tensors.
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
    """How many ranks share one copy of the weights: `requested`, or all ranks if there are fewer.

    Raises UserError if that does not divide the number of ranks.
    """
    share = min(requested, ranks)
    if ranks % share:
        divisors = " or ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UserError(f"train.share = {share} does not divide {ranks} ranks: set train.share={divisors}")
    return share


def mesh_of(share: int, device: torch.device) -> "DeviceMesh | None":
    """The mesh of all ranks, replicas of `share` ranks each; None for one process. Every rank must call it."""
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
    """Shard a net and its averages over a mesh in place, block by block (`net.blocks`), onto its device.

    Every rank must hold the same values, and keeps its part of them. Averages are on the meta device (`meta_copy`), and
    get the values of the net.

    - `loaders`: reads the parameters that are on the meta device, one by one
    - `reshard`: free gathered weights after each pass, else after the backward pass; averages always free them
    - `restored`: trained weights are read from a checkpoint later, so they are not read
    - `in_bfloat16`: round the net's trained parameters to bf16; averages begin as the net was before

    Averages go on sharing frozen parameters with the net. Without a mesh only `in_bfloat16` does anything.
    """
    if mesh is None:
        if in_bfloat16:
            _convert(net, _to_bfloat16)
        return
    # Outputs may be views, of which torch warns at every pass; no objective changes one in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    _shard_net(net, mesh, loaders or {}, reshard=reshard, restored=restored)
    for average in averages:
        _shard_average(average, net, mesh, restored=restored)
    if in_bfloat16:
        _convert(net, _to_bfloat16)
    for average in averages:  # fully_shard takes what it finds there at the first pass
        share_frozen(average, net)


def _shard_net(
    net: nn.Module,
    mesh: "DeviceMesh",
    loaders: Loaders,
    *,
    reshard: bool,
    restored: bool,
) -> None:
    """Shard a net, and read this rank's part of each parameter; `restored`: those that are trained stay empty."""

    def read_part(name: str, like: Tensor) -> Tensor:
        part = torch.empty_like(like, device=mesh.device_type)
        if restored and like.requires_grad:
            return part
        return part.copy_(shard_like(loaders[name](), part))

    _shard_blocks(net, mesh, reshard=reshard)
    replace_parameters(net, loaders.keys(), read_part)


def _shard_average(average: nn.Module, net: nn.Module, mesh: "DeviceMesh", *, restored: bool) -> None:
    """Shard an average of a sharded net; it begins as the net, its trained parameters empty if `restored`."""
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
    """Shard a module's blocks, then all else in it; `reshard`: free gathered weights after each forward pass."""
    from torch.distributed.fsdp import fully_shard

    for part in (*getattr(module, "blocks", ()), module):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)


@torch.no_grad()
def replace_parameters(module: nn.Module, names: Collection[str], make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace a sharded module's parameters of these names by what `make` returns for the name and the parameter."""
    name_of: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if name in names}
    _convert(module, lambda x: make(name_of[x], x) if x in name_of else x)


def _convert(net: nn.Module, f: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter and buffer x by f(x), sharded ones too. torch's public casts would convert all of them."""
    net._apply(f)


def _to_bfloat16(x: Tensor) -> Tensor:
    """A trained parameter in bf16; what is frozen, or a buffer, as it is."""
    return x.bfloat16() if isinstance(x, nn.Parameter) and x.requires_grad else x


def trains_in_16_bits(net: nn.Module) -> bool:
    """Whether a net has trained weights of 16 bits, so that its passes need autocast."""
    return any(p.requires_grad and p.dtype in HALVES for p in net.parameters())


def meta_copy(net: nn.Module) -> nn.Module:
    """A copy of a net on the meta device, without values."""
    copies: dict[int, Tensor] = {}
    for p in net.parameters():
        copies[id(p)] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    for x in net.buffers():
        copies[id(x)] = x.to("meta")
    return deepcopy(net, copies)


def prepare_backward(net: nn.Module, is_last: bool, *, reshard: bool) -> None:
    """Let the next backward pass average gradients over ranks if it is a step's last, else add them up on each rank.

    Gathered weights stay gathered from pass to pass, unless `reshard`.
    """
    modules = _sharded_modules(net)
    if modules:
        root = modules[0]
        root.set_requires_gradient_sync(is_last)
        root.set_reshard_after_backward(is_last or reshard)


def frees_gathered_weights(reshard: bool) -> bool:
    """Whether gathered weights are freed after each pass, so that no cast of them may be kept either."""
    return reshard and dist.world() > 1


def _sharded_modules(net: nn.Module) -> "list[FSDPModule]":
    """The sharded modules of a net, the root first; none if it is in one piece."""
    if dist.world() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in net.modules() if isinstance(module, FSDPModule)]


def gather_net(net: nn.Module, build: Callable[[torch.device], nn.Module]) -> nn.Module:
    """Return the net in one piece on every rank, in float32.

    That is the net itself, unless it is sharded or trained in bf16; then `build`, which takes a device, makes a net
    that gets the trained weights. Every rank must call it.
    """
    if not _sharded_modules(net) and not trains_in_16_bits(net):
        return unwrap(net)
    whole_net = build(next(net.parameters()).device)
    weights = whole_net.state_dict()
    for name, x in trained_state_dict(net).items():  # one by one, so that there is no second whole net
        weights[name].copy_(full_tensor(x.detach()))
    return whole_net


def full_tensor(x: Tensor) -> Tensor:
    """The whole of a tensor, on every rank. Every rank must call it."""
    return cast("DTensor", x).full_tensor() if hasattr(x, "full_tensor") else x


def local_tensor(x: Tensor) -> Tensor:
    """The part of a tensor that is on this rank."""
    return cast("DTensor", x).to_local() if hasattr(x, "to_local") else x


def local_offset(x: Tensor) -> tuple[int, ...]:
    """Where the part of a tensor that is on this rank begins in the whole tensor, by dimension."""
    if not hasattr(x, "to_local"):
        return (0,) * x.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = cast("DTensor", x)
    return compute_local_shape_and_global_offset(x.shape, sharded.device_mesh, sharded.placements)[1]


def offset_on_rank(x: Tensor) -> int:
    """The number, in the whole of a tensor, of the first number on this rank; ranks share it by rows."""
    return local_offset(x)[0] * prod(x.shape[1:]) if hasattr(x, "to_local") else 0


def replica_of(x: Tensor) -> tuple[int, int]:
    """The number of this rank among those that hold the same part of a tensor, and how many they are."""
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
    """An empty float32 tensor with as many rows as `x`, of `width` numbers each, sharded by rows as `x` is."""
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
    """Shard `x`, which all ranks hold whole, like the tensor `like` of its shape, without communication."""
    if not hasattr(like, "to_local"):
        return x
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", like)
    return distribute_tensor(x, sharded.device_mesh, sharded.placements, src_data_rank=None)
