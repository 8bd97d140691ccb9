"""An optimizer's memory as named tensors: `<state name>.<parameter name>`, such as exp_avg.blocks.0.bias."""

from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from dumo.io.weights import compare, outline
from dumo.training.state import State


def flatten(state: State) -> dict[str, Tensor]:
    """The memory by name. A parameter that never had a gradient has none."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.net.named_parameters()}
    memory = state.optimizer.state
    return {f"{key}.{names[p]}": value for p, values in memory.items() for key, value in values.items()}


def blank(place: Path, state: State, way_out: str) -> dict[str, Tensor]:
    """New tensors for the memory that lies in a file or a folder of shards, each laid out as its parameter is.

    Raises UserError as `load` and `compare`.
    """
    found = outline(place)
    parameters = dict(state.net.named_parameters())
    names = {p: name for name, p in parameters.items()}
    like: dict[str, torch.Tensor] = {}
    for group in state.optimizer.param_groups:  # in which all have the same
        here = {names[p] for p in group["params"]}
        held = [(key, name) for key, _, name in (full.partition(".") for full in found) if name in here]
        pairs = product({key for key, _ in held}, {name for _, name in held})
        like |= {f"{key}.{name}": torch.zeros(()) if key == "step" else parameters[name] for key, name in pairs}
    compare(place, found, like, "the run", way_out)
    return {name: torch.empty_like(x, requires_grad=False) for name, x in like.items()}


def by_place(memory: dict[str, Tensor], state: State) -> dict[int, dict[str, Tensor]]:
    """The memory as torch numbers it: by the place of each parameter in the optimizer's groups."""
    names = {parameter: name for name, parameter in state.net.named_parameters()}
    order = [names[p] for group in state.optimizer.param_groups for p in group["params"]]
    number = {name: i for i, name in enumerate(order)}
    out: dict[int, dict[str, Tensor]] = {}
    for name, value in sorted(memory.items()):
        key, _, parameter = name.partition(".")
        out.setdefault(number[parameter], {})[key] = value
    return out
