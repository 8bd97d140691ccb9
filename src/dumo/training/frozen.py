"""What of a net is not trained: parameters that ask for no gradient, and fixed tables, which no state dict holds.

A net that is made of another model's weights may train few of them, or adapters alone. What is frozen is then there
once: averages share it with the net, no checkpoint holds it, and a digest of it tells whether a run goes on from the
weights that it began with.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dumo.io import digest as digests
from dumo.types import UserError

SAMPLE = 64  # numbers of each tensor in the digest: ours


def frozen_weights(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not trained, by every name they have."""
    return {name: p for name, p in net.named_parameters(remove_duplicate=False) if not p.requires_grad}


def trained(net: nn.Module, module: nn.Module | None = None) -> dict[str, Tensor]:
    """The state dict of a net, or of a `module` that is a copy of it, without the net's frozen parameters."""
    fixed = frozen_weights(net)
    return {name: x for name, x in (net if module is None else module).state_dict().items() if name not in fixed}


def copied(net: nn.Module) -> nn.Module:
    """A copy that shares with the net, as the same tensors, its frozen parameters and its fixed tables."""
    tables = (m._buffers[name] for m in net.modules() for name in m._non_persistent_buffers_set)
    shared = [x for x in (*frozen_weights(net).values(), *tables) if x is not None]
    return deepcopy(net, {id(x): x for x in shared})


def share(copy: nn.Module, net: nn.Module) -> None:
    """Put a net's own frozen parameters and fixed tables into a copy, in the place of what it has there."""
    for mine, its in zip(copy.modules(), net.modules(), strict=True):
        frozen = {name: p for name, p in its._parameters.items() if p is not None and not p.requires_grad}
        mine._parameters.update(frozen)
        mine._buffers.update({name: its._buffers[name] for name in its._non_persistent_buffers_set})


def digest(net: nn.Module) -> str | None:
    """A SHA-256 of the frozen parameters: names, shapes, types, and some numbers of each, spread evenly.

    So 20 B numbers take a second, and those of another model are told apart; that one number alone was changed may not
    be seen. None where nothing is frozen, or the net holds no numbers.
    """
    fixed = frozen_weights(net)
    if not fixed or any(p.is_meta or isinstance(p, FakeTensor) for p in fixed.values()):
        return None
    return digests.of_bytes(*(part for name, p in sorted(fixed.items()) for part in _told(name, p.detach())))


def _told(name: str, x: Tensor) -> tuple[bytes, bytes]:
    """What the digest knows of a tensor."""
    count = min(SAMPLE, x.numel())
    some = x.flatten()[torch.arange(count, device=x.device) * x.numel() // max(count, 1)].cpu()
    return f"{name} {tuple(x.shape)} {x.dtype}\n".encode(), bytes(some.view(torch.uint8).numpy().data)


def require(now: str | None, then: str | None, whose: object) -> None:
    """Raise UserError where a digest is not what it was when `whose` weights were trained."""
    if now != then:
        raise UserError(
            f"{whose} was trained on other frozen weights than its net is built of now: put back those that it began "
            "with, where the net's fields name them, or train anew in another folder"
        )
