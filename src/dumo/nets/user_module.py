"""A module that a user of `dumo.train` made in Python, as a net.

1. `ModuleSpec.of` makes the spec of a module and remembers the module while the process lives. The spec itself, which
   run.yaml holds, names only the class and hashes of the layout and the weights.
2. `ModuleSpec.build` copies the module with these weights. In another process the user gives the module anew, with
   weights of its own: then the last one of the same layout is copied, and the weights of the run are loaded into it.
"""

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import nn

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

        Raises UserError if this process has no module of this layout.
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
        return copy.deepcopy(module).to(torch.get_default_device())
