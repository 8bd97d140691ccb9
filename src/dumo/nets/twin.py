"""Several heads for a model that has one: its last layer, once per head, in the old layer's place.

`HeadLayer` copies the last layer for a head, `Outs` calls those of all heads, and `with_submodules` puts it into the
model. `heads_of` cuts the output into heads. `set_channels`, `drop_from_state` and `with_buffers_in_state` adapt what
the model says of itself. `dumo.nets.dualized` calls all of these.

The model's own tail, which makes an image of patches, then makes one with the channels of all heads, so no model is
forked. Each head starts as a copy of the old layer: all give the model's own output, to the bit.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from dumo.types import Array

M = TypeVar("M", bound=nn.Module)


class HeadLayer(nn.Module):
    """A head's own last layer."""

    out: nn.Linear | nn.Conv2d

    def __init__(self, out: nn.Linear | nn.Conv2d) -> None:
        """A copy of the layer, with gradients."""
        super().__init__()
        self.out = copy.deepcopy(out).requires_grad_(True)

    @property
    def channels(self) -> int:
        """The number of channels of its output."""
        return self.out.out_channels if isinstance(self.out, nn.Conv2d) else self.out.out_features


class Outs(nn.Module):
    """The last layers of all heads, as one layer. It has no parameters of its own: the net holds the heads."""

    layers: tuple[nn.Module, ...]

    def __init__(self, layers: Sequence[nn.Module], channels: int | None) -> None:
        """`channels` of a head, where they are a patch's last axis."""
        super().__init__()
        self.layers = tuple(layers)
        self.channels = channels

    def forward(self, h: Array) -> Array:
        """h (..., width), or (b, width, h, w) of a UNet; returns as many numbers of a place, heads times."""
        outs = [layer(h) for layer in self.layers]
        if isinstance(self.layers[0], nn.Conv2d):
            return torch.cat(outs, 1)
        if self.channels is None:
            return torch.cat(outs, -1)
        return torch.cat([out.unflatten(-1, (-1, self.channels)) for out in outs], -1).flatten(-2)


def bias_or_none(layer: nn.Linear | nn.Conv2d) -> nn.Parameter | None:
    """A layer's bias; None where it was made without. torch types it as always there."""
    return cast("nn.Parameter | None", layer.bias)


def with_submodules(model: M, parts: Mapping[str, nn.Module]) -> M:
    """A model with `parts`, by path, as submodules. It shares all else with `model`, which stays as it is."""
    new = copy.copy(model)
    new._modules = dict(model._modules)
    parts_of_child: dict[str, dict[str, nn.Module]] = {}
    for path, part in parts.items():
        child, _, path_in_child = path.partition(".")
        if path_in_child:
            parts_of_child.setdefault(child, {})[path_in_child] = part
        else:
            setattr(new, child, part)
    for child, child_parts in parts_of_child.items():
        setattr(new, child, with_submodules(model.get_submodule(child), child_parts))
    return new


def drop_from_state(layer: nn.Module) -> list[str]:
    """Remove a layer's own buffers, fixed numbers in these models, from its state dict; returns their names."""
    buffers = dict(layer.named_buffers(recurse=False, remove_duplicate=False))
    in_state = layer.state_dict() if buffers else {}
    names = [name for name in buffers if name in in_state]
    for name in names:
        layer.register_buffer(name, buffers[name], persistent=False)
    return names


def with_buffers_in_state(layer: M, names: Collection[str]) -> M:
    """A layer that shares everything with `layer`, and has the buffers `names` in its state dict."""
    new = copy.copy(layer)
    new._non_persistent_buffers_set = layer._non_persistent_buffers_set - set(names)
    return new


def set_channels(model: Any, where: str, channels: int) -> None:  # noqa: ANN401, a model of diffusers
    """Set the number of output channels where a model reads it: in an "attribute", its "config", or nowhere."""
    if where == "attribute":
        model.out_channels = channels
    elif where == "config":
        model.register_to_config(out_channels=channels)


def heads_of(out: Array | list[Array], heads: int) -> tuple[Array, ...]:
    """A model's output, one frame where it is a video, cut into its heads."""
    image = torch.stack(out) if isinstance(out, list) else out
    return (image.squeeze(2) if image.ndim == 5 else image).chunk(heads, 1)
