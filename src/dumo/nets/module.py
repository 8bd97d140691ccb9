"""A module that a user of `dumo.train` made in Python, as a net.

`Module.of` makes its spec and keeps the module in `MODULES` while the process lives; the spec itself names only its
class and layout. `Module.build` copies the module, and `require_heads` tries a pass, as it does for nets of other
packages (`dumo.run.contract`).
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from dumo.io import digest
from dumo.types import FREE, Needs, UserError
from dumo.types.outside import NetSpec, name_of

MODULES: dict[str, nn.Module] = {}  # the users' own modules, by layout


class Module(NetSpec):
    """The spec of a user's module. Copies of it are trained, which begin with its weights; it is left as it is."""

    kind: Literal["module"] = "module"  # pyright: ignore[reportIncompatibleVariableOverride]
    name: str  # module:Class
    layout: str  # a hash of its structure, and of the names, shapes and types of its tensors
    weights: str = Field(json_schema_extra=FREE)  # a hash of the tensors' values

    @classmethod
    def of(cls, module: nn.Module) -> "Module":
        """Make the spec of a module, and keep the module. Raises UserError for one that has no parameter to train."""
        state = module.state_dict()
        class_name = name_of(type(module))
        if not any(p.requires_grad for p in module.parameters()):
            raise UserError(f"net {class_name} has no parameter to train")
        lines = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in state.items()]
        layout = digest.short(class_name, repr(module), *lines)
        weights = digest.short(*map(digest.of_tensor, state.values()))
        MODULES[layout] = module
        return cls(name=class_name, layout=layout, weights=weights)

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Copy the module to torch's default device.

        Raises UserError where this process has no module of this layout, and as `require_heads`.
        """
        module = MODULES.get(self.layout)
        if module is None:
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
    """Raise UserError where a net on the default device does not take the inputs, or give the heads, of `needs`.

    It is called on two samples of `shape` without a class, number `classes`, at times 0.5.
    """
    x = torch.zeros(2, *shape)
    c = torch.full((2,), classes)
    t = torch.full((2,), 0.5)
    inputs = ", ".join(f"{name}={name}" for name in needs.names)
    call = f"net(x, c, {inputs})"
    expected_shapes = [x.shape] * len(needs.heads) + [t.shape] * len(needs.gauges)
    is_training = net.training
    try:
        with torch.no_grad():
            output: object = net.eval()(x, c, **dict.fromkeys(needs.names, t))
    except Exception as error:  # a module of somebody else may raise anything
        raise UserError(
            f"{call}, with x {tuple(x.shape)}, times (2,) and c up to {classes} (no class), raised "
            f"{type(error).__name__}: {error}"
        ) from error
    net.train(is_training)
    shapes = [part.shape for part in output] if isinstance(output, tuple) else None
    if shapes == expected_shapes:
        return
    got = f"a {type(output).__name__}"
    if shapes:
        got = "a tuple of " + _join_shapes(shapes)
    names = ", ".join((*needs.heads, *needs.gauges))
    raise UserError(f"{call} gave {got}; this objective wants a tuple ({names}) of {_join_shapes(expected_shapes)}")


def _join_shapes(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)
