"""A Python module that a user passes to `dumo.train` as the network.

1. `ModuleSpec.of` creates the spec of a module and stores the module for the lifetime of the process. The spec, which
   is written to run.yaml, contains only the class name and hashes of the layout and the weights.
2. `ModuleSpec.build` copies the module with these weights. In another process the user passes the module again: the
   last one of the same layout is then copied, and the weights of the run are loaded into it.
"""

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from dumo.io import digest
from dumo.types import FREE, Needs, UserError
from dumo.types.outside import NetSpec, name_of

# Users' modules by layout and by weights, in the order of `ModuleSpec.of`.
MODULES: dict[str, dict[str, nn.Module]] = {}


class ModuleSpec(NetSpec):
    """The spec of a user's module. Training uses a copy that is initialized with its weights.

    name: `module:Class`.
    layout: a hash of the structure, and of the names, shapes and dtypes of the tensors.
    weights: a hash of the values of the tensors.
    """

    kind: Literal["module"] = "module"  # pyright: ignore[reportIncompatibleVariableOverride]
    name: str
    layout: str
    weights: str = Field(json_schema_extra=FREE)

    @classmethod
    def of(cls, module: nn.Module) -> "ModuleSpec":
        """Create the spec of a module, and store the module. Raises UserError if it has no trainable parameter."""
        state = module.state_dict()
        class_name = name_of(type(module))
        if not any(p.requires_grad for p in module.parameters()):
            raise UserError(f"net {class_name} has no trainable parameter: set requires_grad of its parameters")
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
                f"this run needs the Python module {self.name}: pass a module with the same parameters, "
                f"dumo.load(RUN, net={self.name.rpartition(':')[2]}(...))"
            )
        module = same_layout.get(self.weights)
        if module is None:
            module = list(same_layout.values())[-1]
        return copy.deepcopy(module).to(torch.get_default_device())
