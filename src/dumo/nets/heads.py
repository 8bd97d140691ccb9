"""Several heads for a model of diffusers that has one: its last layer is replaced by one layer per head, joined.

The order of events, all of it in `dumo.nets.dualized`:

1. `drop_from_state` takes the model's fixed buffers out of its state dict.
2. `HeadLayer` copies the last layer, once per head. `JoinedHeads` calls all copies and takes the last layer's place,
   and `set_channels` tells the model how many channels it now has. The model's own code, which makes an image of
   patches, then makes one with the channels of all heads. Each copy gives the model's own output at first, to the bit.
3. After a pass, `split_into_heads` cuts the output into heads.
4. For an export, `with_submodules` makes a model with a single head and `with_buffers_in_state` undoes step 1. Both
   share all weights with the model that they are given, and leave it as it is.

`with_submodules` serves `dumo.run.flops`, too. `bias_or_none` is for all who read a layer's bias.
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
        """The size of its output: the channels of a convolution, or the numbers that a linear layer has per token."""
        return self.out.out_channels if isinstance(self.out, nn.Conv2d) else self.out.out_features


class JoinedHeads(nn.Module):
    """The last layers of all heads, called as one layer. It has no parameters: the net registers the heads."""

    layers: tuple[nn.Module, ...]  # a tuple, which nn.Module does not register

    def __init__(self, layers: Sequence[nn.Module], channels: int | None) -> None:
        """Take one layer per head.

        `channels` is the number of channels of one head, if a token's output has the channels last, (place, channel).
        It is None if the channels come first.
        """
        super().__init__()
        self.layers = tuple(layers)
        self.channels = channels

    def forward(self, h: Array) -> Array:
        """Join the heads' outputs along the channels.

        A linear layer takes h (..., width) and gives (..., n) per head; this returns (..., heads * n). A convolution
        takes h (b, width, rows, columns) and gives (b, n, rows, columns); this returns (b, heads * n, rows, columns).
        """
        outputs = [layer(h) for layer in self.layers]
        if isinstance(self.layers[0], nn.Conv2d):
            return torch.cat(outputs, 1)
        if self.channels is None:
            return torch.cat(outputs, -1)
        # (..., places * channels) to (..., places, channels) for each head, joined at each place of the patch
        outputs_by_place = [out.unflatten(-1, (-1, self.channels)) for out in outputs]
        joined = torch.cat(outputs_by_place, -1)
        return joined.flatten(-2)


def bias_or_none(layer: nn.Linear | nn.Conv2d) -> nn.Parameter | None:
    """Return a layer's bias, or None if it has none. torch's types say that there always is one."""
    return cast("nn.Parameter | None", layer.bias)


def with_submodules(model: M, parts: Mapping[str, nn.Module]) -> M:
    """Return a copy of a model in which the submodules at the paths of `parts` are replaced.

    The copy shares everything else with `model`, hooks too, so register none on it. `model` stays as it is.
    """
    new = copy.copy(model)
    # A shallow copy shares its table of submodules. With one of its own, setattr registers a part in the copy alone.
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
    """Take a layer's own buffers out of its state dict, and return their names. In these models they never change."""
    buffers = dict(layer.named_buffers(recurse=False, remove_duplicate=False))
    in_state = layer.state_dict() if buffers else {}
    names = [name for name in buffers if name in in_state]
    for name in names:
        layer.register_buffer(name, buffers[name], persistent=False)
    return names


def with_buffers_in_state(layer: M, names: Collection[str]) -> M:
    """Return a copy of a layer whose state dict has the buffers `names`. It shares everything else with `layer`."""
    new = copy.copy(layer)
    # torch lists here the buffers that a state dict leaves out. register_buffer would edit the list of `layer`, which
    # a shallow copy shares; a new set changes the copy alone.
    new._non_persistent_buffers_set = layer._non_persistent_buffers_set - set(names)
    return new


def set_channels(model: Any, where: str, channels: int) -> None:  # noqa: ANN401, a model of diffusers
    """Set the number of output channels where a model reads it: in an "attribute", its "config", or nowhere ("")."""
    if where == "attribute":
        model.out_channels = channels
    elif where == "config":
        model.register_to_config(out_channels=channels)


def split_into_heads(out: Array | list[Array], num_heads: int) -> tuple[Array, ...]:
    """Cut a model's output into its heads, each (b, channels, rows, columns).

    out: (b, num_heads * channels, rows, columns), or a list of its rows without b. A model of videos has an axis of one
    frame after the channels, which is dropped.
    """
    images = torch.stack(out) if isinstance(out, list) else out
    if images.ndim == 5:
        images = images.squeeze(2)
    return images.chunk(num_heads, 1)
