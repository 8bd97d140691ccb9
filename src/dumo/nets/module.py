"""A module that Python gave to `dumo.train`: known by its class and layout, there while the process lives."""

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from dumo.io import digest
from dumo.types import FREE, Needs, UserError
from dumo.types.outside import NetSpec, name_of

MODULES: dict[str, nn.Module] = {}  # by layout, as they were given


class Module(NetSpec):
    """Its copies are trained; what was given keeps its weights, which training begins with."""

    kind: Literal["module"] = "module"  # pyright: ignore[reportIncompatibleVariableOverride]
    name: str  # module:Class
    layout: str  # a hash of its structure, and the names, shapes and types of its numbers
    weights: str = Field(json_schema_extra=FREE)  # a hash of the numbers it was given with

    @classmethod
    def of(cls, module: nn.Module) -> "Module":
        """Remember a module. Raises UserError for one without parameters."""
        state = module.state_dict()
        if not any(p.requires_grad for p in module.parameters()):
            raise UserError(f"net {name_of(type(module))} has no parameter to train")
        lines = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in state.items()]
        layout = digest.short(name_of(type(module)), repr(module), *lines)
        MODULES[layout] = module
        return cls(
            name=name_of(type(module)), layout=layout, weights=digest.short(*map(digest.of_tensor, state.values()))
        )

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A copy. Raises UserError where this process was given none of this layout, and as `require_heads`."""
        if (module := MODULES.get(self.layout)) is None:
            raise UserError(
                f"the net is a module of Python, {self.name}, that this process does not have: give it in Python, "
                f"dumo.load(RUN, net={self.name.rpartition(':')[2]}(...)), in the same layout"
            )
        net = copy.deepcopy(module)
        device = torch.get_default_device()
        with torch.device(next(net.parameters()).device):
            require_heads(net, needs, shape, classes)
        return net.to(device)


def require_heads(net: nn.Module, needs: Needs, shape: tuple[int, ...], classes: int) -> None:
    """Raise UserError where a net on the default device does not take the inputs, or give the heads, of `needs`."""
    x, c, t = torch.zeros(2, *shape), torch.full((2,), classes), torch.full((2,), 0.5)
    call = f"net(x, c, {', '.join(f'{name}={name}' for name in needs.names)})"
    wanted = [x.shape] * len(needs.heads) + [t.shape] * len(needs.gauges)
    mode = net.training
    try:
        with torch.no_grad():
            found: object = net.eval()(x, c, **dict.fromkeys(needs.names, t))
    except Exception as error:  # a module of somebody else may raise anything
        raise UserError(
            f"{call}, with x {tuple(x.shape)}, times (2,) and c up to {classes} (no class), raised "
            f"{type(error).__name__}: {error}"
        ) from error
    net.train(mode)
    shapes = [part.shape for part in found] if isinstance(found, tuple) else None
    if shapes != wanted:
        got = "a tuple of " + ", ".join(str(tuple(s)) for s in shapes) if shapes else f"a {type(found).__name__}"
        raise UserError(
            f"{call} gave {got}; this objective wants a tuple ({', '.join((*needs.heads, *needs.gauges))}) of "
            f"{', '.join(str(tuple(s)) for s in wanted)}"
        )
