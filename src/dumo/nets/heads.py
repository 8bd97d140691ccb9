"""Add output heads to a diffusers model, by replacing its last layer with one layer per head.

`dumo.nets.dualized` uses these functions:

1. `drop_from_state` removes the model's constant buffers from its state dict.
2. `HeadLayer` copies the last layer, once per head. `JoinedHeads` replaces the last layer and calls all copies, and
   `set_channels` sets the model's number of output channels. The model's code then joins patches to an image with the
   channels of all heads. Each head is initially bit-identical to the model's output.
3. After a pass, `split_into_heads` splits the output into heads.
4. For an export, `with_submodules` creates a model with a single head, and `with_buffers_in_state` undoes step 1. Both
   return copies that share all weights with the given model.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from dumo.types import Array

M = TypeVar("M", bound=nn.Module)


class HeadLayer(nn.Module):
    """The last layer of one head."""

    out: nn.Linear | nn.Conv2d

    def __init__(self, out: nn.Linear | nn.Conv2d) -> None:
        """Copy the model's last layer. The copy is trained."""
        super().__init__()
        self.out = copy.deepcopy(out).requires_grad_(True)

    @property
    def channels(self) -> int:
        """The number of output channels of a convolution, or output features of a linear layer."""
        return self.out.out_channels if isinstance(self.out, nn.Conv2d) else self.out.out_features


class JoinedHeads(nn.Module):
    """The last layers of all heads, called as one layer. It has no parameters, because the network owns the heads."""

    # nn.Module does not register a tuple of modules.
    layers: tuple[nn.Module, ...]

    def __init__(self, layers: Sequence[nn.Module], channels: int | None) -> None:
        """Join one layer per head.

        channels: the number of channels of one head, if a token's output has the order (pixel, channel); None if the
            channels come first.
        """
        super().__init__()
        self.layers = tuple(layers)
        self.channels = channels

    def forward(self, h: Array) -> Array:
        """Join the heads' outputs along the channels.

        Linear layers map h (..., width) to (..., n) per head, and this returns (..., heads * n). Convolutions map h
        (b, width, rows, columns) to (b, n, rows, columns), and this returns (b, heads * n, rows, columns).
        """
        outputs = [layer(h) for layer in self.layers]
        if isinstance(self.layers[0], nn.Conv2d):
            return torch.cat(outputs, 1)
        if self.channels is None:
            return torch.cat(outputs, -1)
        # Unflatten (..., pixels * channels) of each head to (..., pixels, channels), and join at each pixel.
        outputs_by_pixel = [out.unflatten(-1, (-1, self.channels)) for out in outputs]
        joined = torch.cat(outputs_by_pixel, -1)
        return joined.flatten(-2)


def bias_or_none(layer: nn.Linear | nn.Conv2d) -> nn.Parameter | None:
    """Return a layer's bias, or None. torch's types omit None."""
    return cast("nn.Parameter | None", layer.bias)


def with_submodules(model: M, parts: Mapping[str, nn.Module]) -> M:
    """Return a copy of a model in which the submodules at the paths of `parts` are replaced.

    The copy shares everything else with `model`, including hooks, so do not register hooks on it.
    """
    new = copy.copy(model)
    # A shallow copy shares its dict of submodules. Copy the dict, so that setattr does not change `model`.
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
    """Remove a layer's own buffers, which are constant in these models, from its state dict, and return their names."""
    buffers = dict(layer.named_buffers(recurse=False, remove_duplicate=False))
    in_state = layer.state_dict() if buffers else {}
    names = [name for name in buffers if name in in_state]
    for name in names:
        layer.register_buffer(name, buffers[name], persistent=False)
    return names


def with_buffers_in_state(layer: M, names: Collection[str]) -> M:
    """Return a copy of a layer with the buffers `names` in its state dict. It shares everything else with `layer`."""
    new = copy.copy(layer)
    # register_buffer would change this set of `layer`, which a shallow copy shares.
    new._non_persistent_buffers_set = layer._non_persistent_buffers_set - set(names)
    return new


def set_channels(model: Any, where: str, channels: int) -> None:  # noqa: ANN401, a model of diffusers
    """Set a model's number of output channels in an "attribute", in its "config", or nowhere ("")."""
    if where == "attribute":
        model.out_channels = channels
    elif where == "config":
        model.register_to_config(out_channels=channels)


def split_into_heads(out: Array | list[Array], num_heads: int) -> tuple[Array, ...]:
    """Split a model's output into heads, each (b, channels, rows, columns).

    out: (b, num_heads * channels, rows, columns), or a list of its rows without b. The frame axis of a video model,
        after the channels, is removed.
    """
    images = torch.stack(out) if isinstance(out, list) else out
    if images.ndim == 5:
        images = images.squeeze(2)
    return images.chunk(num_heads, 1)
