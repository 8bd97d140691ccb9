"""Several heads of a model that has one: its last linear layer, once per head, in the place of the one there was.

The model's own tail, which makes an image of patches, then makes one with the channels of all heads, so no model is
forked. Each head starts as a copy of the old layer: all give what the model gave, to the bit.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from dumo.types import Array

M = TypeVar("M", bound=nn.Module)


class Head(nn.Module):
    """What a head has for itself: its last layer, and perhaps the norm that feeds it."""

    out: nn.Linear
    norm: nn.Module | None

    def __init__(self, out: nn.Linear, norm: nn.Module | None) -> None:
        """Copies, with gradients."""
        super().__init__()
        self.out = copy.deepcopy(out).requires_grad_(True)
        self.norm = None if norm is None else copy.deepcopy(norm).requires_grad_(True)


class Outs(nn.Module):
    """In the place of the last layer. It holds no parameters of its own: the net holds the heads."""

    layers: tuple[nn.Module, ...]

    def __init__(self, layers: Sequence[nn.Module], channels: int | None, own: bool) -> None:
        """`channels` of a head, where they are a patch's last axis; `own`: each layer has features of its own."""
        super().__init__()
        self.layers, self.channels, self.own = tuple(layers), channels, own

    def forward(self, h: Array) -> Array:
        """h (..., width), or of all heads beside one another; returns (..., heads x numbers of a patch)."""
        parts = h.chunk(len(self.layers), -1) if self.own else [h] * len(self.layers)
        outs = [layer(part) for layer, part in zip(self.layers, parts, strict=True)]
        if self.channels is None:
            return torch.cat(outs, -1)
        return torch.cat([out.unflatten(-1, (-1, self.channels)) for out in outs], -1).flatten(-2)


class Norms(nn.Module):
    """In the place of the norm before the last layer: one per head."""

    layers: tuple[nn.Module, ...]

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """As `Outs`, it holds none."""
        super().__init__()
        self.layers = tuple(layers)

    def forward(self, *given: Array) -> Array:
        """Features of all heads, beside one another."""
        return torch.cat([layer(*given) for layer in self.layers], -1)


def put(model: nn.Module, path: str, part: nn.Module) -> None:
    """Set a part of a model, in place."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = part


def exchanged(model: M, parts: Mapping[str, nn.Module]) -> M:
    """The model with other parts, by path. All else is shared, and the model itself left as it is."""
    new = copy.copy(model)
    new._modules = dict(model._modules)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, part in parts.items():
        first, _, rest = path.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = part
        else:
            new._modules[first] = part
    for name, some in below.items():
        new._modules[name] = exchanged(model.get_submodule(name), some)
    return new


def unsaved(layer: nn.Module) -> list[str]:
    """Leave a layer's own buffers, fixed numbers in these models, out of its state dict; returns which were in it."""
    names = [name for name in layer._buffers if name not in layer._non_persistent_buffers_set]
    layer._non_persistent_buffers_set.update(names)
    return names


def saved(layer: M, names: Collection[str]) -> M:
    """A layer that shares all with this one, and has these buffers in its state dict."""
    new = copy.copy(layer)
    new._non_persistent_buffers_set = layer._non_persistent_buffers_set - set(names)
    return new


def tell(model: Any, told: str, channels: int) -> None:  # noqa: ANN401, a model of diffusers
    """Tell a model how many channels it gives, where it reads their number: in an "attribute", or its "config"."""
    if told == "attribute":
        model.out_channels = channels
    elif told == "config":
        model.register_to_config(out_channels=channels)


def heads_of(out: Array | list[Array], heads: int) -> tuple[Array, ...]:
    """A model's output, of one frame where it is a video, cut into its heads."""
    image = torch.stack(out) if isinstance(out, list) else out
    return (image.squeeze(2) if image.ndim == 5 else image).chunk(heads, 1)
