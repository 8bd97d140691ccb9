"""How a run's weights are laid out over ranks: by torch's `fully_shard`, in place, on a mesh of copies by shares.

    share 1                every rank holds all weights, gradients are averaged        (replicated, as DDP)
    share of all ranks     each holds a part, weights are gathered for a pass          (sharded, as FSDP)
    between                parts within a copy, copies averaged with one another       (hybrid, as HSDP)

One process has no mesh, leaves its net unchanged, and never imports torch's sharding, which is slow to import. The
rest of dumo rarely needs to know: parameters are `DTensor`s, which optimizers, averages and clipping take as tensors.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from math import prod
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dumo.flow.precision import HALVES
from dumo.io.deferred import Deferred
from dumo.runtime import dist
from dumo.training.frozen import share, trained
from dumo.types import UserError, unwrap

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def share_of(asked: int, ranks: int) -> int:
    """How many ranks share one copy of the weights: `asked`, or all ranks if there are fewer.

    Raises UserError if that does not divide the number of ranks.
    """
    if ranks % (share := min(asked, ranks)):
        divisors = " or ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UserError(f"train.share = {share} does not divide {ranks} ranks: set train.share={divisors}")
    return share


def mesh_of(share: int, device: torch.device) -> "DeviceMesh | None":
    """All ranks as copies by shares; None for one process. Every rank must call it."""
    if dist.world() == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    copies = dist.world() // (share := share_of(share, dist.world()))
    if copies == 1:
        return init_device_mesh(device.type, (share,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (copies, share), mesh_dim_names=("replicate", "shard"))


def shard(
    net: nn.Module,
    mesh: "DeviceMesh | None",
    copies: Sequence[nn.Module] = (),
    weights: Deferred | None = None,
    *,
    reshard: bool,
    restored: bool = False,
    half: bool = False,
) -> None:
    """Shard a net over a mesh in place, block by block (`net.blocks`), onto its device, and its averages `copies`.

    Every rank must hold the same numbers, and copies its part of them; those that `weights` makes it makes one by one,
    and keeps its part, of what is trained none if it will be `restored`. The averages go on sharing frozen parameters
    with the net, and begin as it is before its trained parameters are rounded to bf16, if `half`. `reshard`: free
    gathered weights after each pass, else after the backward pass; an average, which has none, always does.
    """
    if mesh is None:
        if half:
            convert(net, halved)
        return
    from torch.distributed.fsdp import fully_shard

    weights = weights or Deferred()
    # Outputs may be views, of which torch warns at every pass; no objective changes one in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for copy in copies:  # else a copy would keep the unsharded frozen weights alive
        share(copy, outline(net))
    unmade = {name: p for name, p in net.named_parameters() if p in weights}
    for module, back in ((net, reshard), *((copy, True) for copy in copies)):
        for part in (*getattr(module, "blocks", ()), module):
            fully_shard(part, mesh=mesh, reshard_after_forward=back)
        lacks = unmade if module is net else {name: p for name, p in unmade.items() if p.requires_grad}
        first = {} if module is net else dict(net.named_parameters())

        def begin(name: str, like: Tensor, first: Mapping[str, Tensor] = first) -> Tensor:
            mine = torch.empty_like(like, device=mesh.device_type)
            if restored and unmade[name].requires_grad:
                return mine
            return mine.copy_(first[name] if first else laid(weights.made(unmade[name]), mine))

        put(module, lacks, begin)
    if half:
        convert(net, halved)
    for copy in copies:  # fully_shard takes what it finds there at the first pass
        share(copy, net)


@torch.no_grad()
def put(module: nn.Module, names: Collection[str], make: Callable[[str, Tensor], Tensor]) -> None:
    """Let a sharded module's parameters of these names be what `make` makes of the name and the parameter."""
    named: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if name in names}
    convert(module, lambda x: make(named[x], x) if x in named else x)


def convert(net: nn.Module, f: Callable[[Tensor], Tensor]) -> None:
    """Let f make each parameter and buffer anew, sharded ones too. The casts that torch makes public spare none."""
    net._apply(f)


def halved(x: Tensor) -> Tensor:
    """A trained parameter in bf16; what is frozen, or a buffer, as it is."""
    return x.bfloat16() if isinstance(x, nn.Parameter) and x.requires_grad else x


def outline(net: nn.Module) -> nn.Module:
    """A copy without numbers, on the meta device."""
    weights = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in net.parameters()}
    return deepcopy(net, weights | {id(x): x.to("meta") for x in net.buffers()})


def finish(net: nn.Module, step: bool, *, reshard: bool) -> None:
    """Let the next backward pass average gradients over ranks if it ends the `step`, else add them up on each rank.

    Gathered weights stay gathered from pass to pass, unless `reshard`.
    """
    for root in parts(net)[:1]:
        root.set_requires_gradient_sync(step)
        root.set_reshard_after_backward(step or reshard)


def gives_back(reshard: bool) -> bool:
    """Whether gathered weights are freed after each pass, so that no cast of them may be kept either."""
    return reshard and dist.world() > 1


def release(net: nn.Module) -> None:
    """Free the weights that a pass without a backward pass has gathered: later steps would not update them."""
    for part in parts(net):
        part.reshard()


def parts(net: nn.Module) -> "list[FSDPModule]":
    """The sharded modules of a net, the root first; none if it is in one piece."""
    if dist.world() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in net.modules() if isinstance(part, FSDPModule)]


def gathered(net: nn.Module, build: Callable[[torch.device], nn.Module]) -> nn.Module:
    """The net in one piece on every rank, in float32: itself if it is, else one from `build` with the trained weights.

    Every rank must call it.
    """
    if not parts(net) and not any(p.requires_grad and p.dtype in HALVES for p in net.parameters()):
        return unwrap(net)
    twin = build(next(net.parameters()).device)
    own = twin.state_dict()
    for name, x in trained(net).items():  # one by one, so that no second whole net is there
        own[name].copy_(whole(x.detach()))
    return twin


def whole(x: Tensor) -> Tensor:
    """The whole of a tensor, on every rank. Every rank must call it."""
    return cast("DTensor", x).full_tensor() if hasattr(x, "full_tensor") else x


def local(x: Tensor) -> Tensor:
    """The part of a tensor that is on this rank."""
    return cast("DTensor", x).to_local() if hasattr(x, "to_local") else x


def shards(x: Tensor) -> int:
    """Over how many ranks one copy of a tensor is shared; 1 if it is in one piece."""
    return cast("DTensor", x).device_mesh.shape[-1] if hasattr(x, "to_local") else 1


def begin(x: Tensor) -> int:
    """The number, in the whole of a tensor, of the first number on this rank; ranks share it by rows."""
    if not hasattr(x, "to_local"):
        return 0
    from dumo.io import shards

    return shards.begin(x)[0] * prod(x.shape[1:])


def like_rows(x: Tensor, width: int) -> Tensor:
    """An empty tensor in float32, with `width` numbers for each row of another one, and laid out as that."""
    here = torch.empty(local(x).shape[0], width, device=x.device)
    if not hasattr(x, "to_local"):
        return here
    from torch.distributed.tensor import DTensor

    there = cast("DTensor", x)
    shape = torch.Size([x.shape[0], width])
    return DTensor.from_local(
        here, there.device_mesh, there.placements, run_check=False, shape=shape, stride=(width, 1)
    )


def laid(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that all ranks hold whole, sharded like another one of its shape, without communication."""
    if not hasattr(like, "to_local"):
        return x
    from torch.distributed.tensor import distribute_tensor

    there = cast("DTensor", like)
    return distribute_tensor(x, there.device_mesh, there.placements, src_data_rank=None)
