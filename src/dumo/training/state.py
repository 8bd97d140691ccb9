"""All that training changes: what a checkpoint holds, and a resumed run needs.

The trend of the error is part of it. A loss may be weighted by its own size, and is then constant or of any sign; its
parts are mean squares. Their sum over a batch is the error e of a step, and the level a running geometric mean of it,

    log level_n = d log level_{n-1} + (1 - d) log e_n,        d = 0.95, ours: about twenty steps,

which one batch that is a thousand times worse multiplies by 1.4 only. A run that learns ends below where it began, so
a level far above the lowest means that it diverged, though every number is finite.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import exp, isfinite, log
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from dumo.io.deferred import Deferred
from dumo.io.weights import compare, outline
from dumo.training import frozen, layout
from dumo.training.burst import Gradients, modules
from dumo.training.eightbit import AdamW8bitOptimizer
from dumo.training.ema import Key, MovingAverage
from dumo.training.spec import Train
from dumo.types import UserError

DECAY = 0.95
FAR = 10.0  # times the lowest level: ours; guidance, growing targets and noise move it less
LEAST = 1e-12  # an error below it counts as that: its logarithm would say nothing


class Diverged(RuntimeError):  # noqa: N818, a state of the run
    """Numbers are not finite: of too many steps in a row, or of a checkpoint."""


class Trend(BaseModel):
    """The level of the error, and its lowest; None before the first step."""

    model_config = ConfigDict(frozen=True)

    level: float | None = None
    lowest: float | None = None

    def after(self, error: float) -> "Trend":
        """The trend after one more step, of this error >= 0; the same if it is not finite."""
        if not isfinite(error):  # a part that is only logged may be so
            return self
        error = max(error, LEAST)
        level = error if self.level is None else exp(DECAY * log(self.level) + (1 - DECAY) * log(error))
        return Trend(level=level, lowest=level if self.lowest is None else min(level, self.lowest))

    @property
    def good(self) -> bool:
        """Whether the level is within FAR of the lowest."""
        return self.level is None or self.lowest is None or self.level <= FAR * self.lowest


@dataclass
class State:
    """A run between two steps. No generator state: every draw is keyed by (seed, step)."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    averages: dict[Key, MovingAverage] = field(default_factory=dict[Key, MovingAverage])
    step: int = 0  # steps done, skipped ones included
    images: int = 0  # images seen, repeats counted
    skips: int = 0  # skipped steps in a row, up to now
    trend: Trend = field(default_factory=Trend)  # of the error, over steps that were applied
    gradients: Gradients = field(default_factory=Gradients)  # their norms by module, of steps that were applied
    frozen: str | None = None  # the digest of the frozen weights (`dumo.training.frozen`); None: there are none

    @cached_property
    def modules(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by top module (`burst.modules`)."""
        return modules(self.net)

    @property
    def shown(self) -> nn.Module:
        """The net that is sampled and evaluated: the first average, or the net itself without one."""
        return next((average.module for average in self.averages.values()), self.net)


def begin(
    net: nn.Module,
    spec: Train,
    device: torch.device | None = None,
    weights: Deferred | None = None,
    *,
    restored: bool = False,
) -> State:
    """The state before the first step; on several ranks it is sharded as the spec says, each rank's on its `device`.

    `weights` makes those that the net lacks, and of several ranks each keeps its part; `restored`: what is trained is
    read from a checkpoint later, and has no numbers until then. Raises UserError if all weights of the net are frozen.
    """
    if not any(p.requires_grad for p in net.parameters()):
        raise UserError("all weights of this net are frozen, so there is nothing to train: let it train some")
    mesh = layout.mesh_of(spec.share, here := device or next(net.parameters()).device)
    if weights and mesh is None:
        weights.fill(net, here)
    fixed = frozen.digest(net, weights.made if weights else torch.detach)
    averages = {ema.key: MovingAverage(ema, net) for ema in spec.ema}
    copies = [average.module for average in averages.values()]
    half = spec.weights == "bfloat16"
    layout.lay(net, mesh, copies, weights, reshard=spec.reshard, restored=restored, half=half)
    optimizer = spec.optimizer(net)
    if isinstance(optimizer, AdamW8bitOptimizer):
        optimizer.seed = spec.seed
    return State(net, optimizer, averages, frozen=fixed)


def flatten(state: State) -> dict[str, Tensor]:
    """The optimizer's memory by `<state name>.<parameter name>`, such as exp_avg.blocks.0.bias.

    A parameter that never had a gradient has none.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.net.named_parameters()}
    memory = state.optimizer.state
    return {f"{key}.{names[p]}": value for p, values in memory.items() for key, value in values.items()}


def blank(place: Path, state: State, way_out: str) -> dict[str, Tensor]:
    """Empty tensors for the memory in a file or a folder of shards, each laid out as its parameter.

    Raises UserError as `load` and `compare`.
    """
    found = outline(place)
    parameters = dict(state.net.named_parameters())
    names = {p: name for name, p in parameters.items()}
    like: dict[str, torch.Tensor] = {}
    for group in state.optimizer.param_groups:  # whose parameters have the same names of memory
        here = {names[p] for p in group["params"]}
        held = [(key, name) for key, _, name in (full.partition(".") for full in found) if name in here]
        pairs = product({key for key, _ in held}, {name for _, name in held})
        like |= {f"{key}.{name}": memory_like(state.optimizer, key, parameters[name]) for key, name in pairs}
    compare(place, found, like, "the run", way_out)
    return {name: torch.empty_like(x, requires_grad=False) for name, x in like.items()}


def memory_like(optimizer: torch.optim.Optimizer, key: str, p: Tensor) -> Tensor:
    """A tensor of the shape, type and layout of this entry of an optimizer's memory of a parameter."""
    if key == "step":
        return torch.zeros(())
    return optimizer.like(key, p) if isinstance(optimizer, AdamW8bitOptimizer) else p


def by_place(memory: dict[str, Tensor], state: State) -> dict[int, dict[str, Tensor]]:
    """The memory as torch keys it: by the index of each parameter in the optimizer's groups."""
    names = {parameter: name for name, parameter in state.net.named_parameters()}
    order = [names[p] for group in state.optimizer.param_groups for p in group["params"]]
    number = {name: i for i, name in enumerate(order)}
    out: dict[int, dict[str, Tensor]] = {}
    for name, value in sorted(memory.items()):
        key, _, parameter = name.partition(".")
        out.setdefault(number[parameter], {})[key] = value
    return out
