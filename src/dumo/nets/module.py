"""A module that a user of `dumo.train` made in Python, as a net.

1. `ModuleSpec.of` makes the spec of a module and remembers the module while the process lives. The spec itself, which
   run.yaml holds, names only the class and hashes of the layout and the weights.
2. `ModuleSpec.build` copies the module with these weights. In another process the user gives the module anew, with
   weights of its own: then the last one of the same layout is copied, and the weights of the run are loaded into it.
3. `require_heads` tries a pass, as it also does for nets of other packages (`dumo.run.contract`).
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dumo.flow.generate import eval_mode
from dumo.io import digest
from dumo.types import FREE, Needs, UserError
from dumo.types.outside import NetSpec, name_of

MODULES: dict[str, dict[str, nn.Module]] = {}  # users' modules, by layout, then by weights, in the order of `of`


class ModuleSpec(NetSpec):
    """The spec of a user's module. Copies of it are trained, which begin with its weights; it is left as it is."""

    kind: Literal["module"] = "module"  # pyright: ignore[reportIncompatibleVariableOverride]
    name: str  # module:Class
    layout: str  # a hash of its structure, and of the names, shapes and types of its tensors
    weights: str = Field(json_schema_extra=FREE)  # a hash of the tensors' values

    @classmethod
    def of(cls, module: nn.Module) -> "ModuleSpec":
        """Make the spec of a module, and remember the module. Raises UserError if it has no parameter to train."""
        state = module.state_dict()
        class_name = name_of(type(module))
        if not any(p.requires_grad for p in module.parameters()):
            raise UserError(f"net {class_name} has no parameter to train")
        lines = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in state.items()]
        layout = digest.short(class_name, repr(module), *lines)
        weights = digest.short(*map(digest.of_tensor, state.values()))
        same_layout = MODULES.setdefault(layout, {})
        same_layout.pop(weights, None)
        same_layout[weights] = module
        return cls(name=class_name, layout=layout, weights=weights)

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Copy the module to torch's default device.

        Raises UserError if this process has no module of this layout, or its heads do not fit (`require_heads`).
        """
        same_layout = MODULES.get(self.layout)
        if not same_layout:
            raise UserError(
                f"the net is a module of Python, {self.name}, that this process does not have: give it in Python, "
                f"dumo.load(RUN, net={self.name.rpartition(':')[2]}(...)), in the same layout"
            )
        module = same_layout.get(self.weights)
        if module is None:
            module = list(same_layout.values())[-1]
        net = copy.deepcopy(module)
        device = torch.get_default_device()
        with torch.device(next(net.parameters()).device):
            require_heads(net, needs, shape, classes)
        return net.to(device)


def require_heads(net: nn.Module, needs: Needs, shape: tuple[int, ...], classes: int) -> None:
    """Raise UserError unless a net on the default device takes the inputs of `needs` and returns its heads and gauges.

    The net is called in evaluation mode on x (2, *shape) of zeros, times 0.5, and c `classes`, which is no class.
    """
    x = torch.zeros(2, *shape)
    c = torch.full((2,), classes)
    t = torch.full((2,), 0.5)
    inputs = ", ".join(f"{name}={name}" for name in needs.names)
    call = f"net(x, c, {inputs})"
    try:
        with torch.no_grad(), eval_mode(net):
            output: object = net(x, c, **dict.fromkeys(needs.names, t))
    except Exception as error:  # a module of somebody else may raise anything
        raise UserError(
            f"{call}, with x {tuple(x.shape)}, times (2,) and c up to {classes} (no class), raised "
            f"{type(error).__name__}: {error}"
        ) from error
    expected_shapes = [x.shape] * len(needs.heads) + [t.shape] * len(needs.gauges)
    if isinstance(output, tuple) and _shapes(output) == expected_shapes:
        return
    names = ", ".join((*needs.heads, *needs.gauges))
    expected = ", ".join(str(tuple(expected_shape)) for expected_shape in expected_shapes)
    raise UserError(f"{call} gave {_describe(output)}; this objective wants a tuple ({names}) of {expected}")


def _shapes(parts: Sequence[object]) -> list[torch.Size | None]:
    """The shape of each tensor, and None for anything else."""
    return [part.shape if isinstance(part, Tensor) else None for part in parts]


def _describe(output: object) -> str:
    """What a net returned, in words."""
    if not isinstance(output, tuple):
        return f"a {type(output).__name__}"
    if not output:
        return "an empty tuple"
    descriptions: list[str] = []
    for part in output:
        if isinstance(part, Tensor):
            descriptions.append(str(tuple(part.shape)))
        else:
            descriptions.append(f"a {type(part).__name__}")
    return "a tuple of " + ", ".join(descriptions)
