"""Gradient norms by module, and bursts: steps at which one module's norm stays far above its median.

A training that breaks does so in one module first. In a measured run (ours) the time embedder's gradient grew from .10
to .72 within five steps while blocks and heads were calm; twenty steps later all had followed, and the error of u was
ten times as large. A log with a row in fifty steps cannot show that, so norms are measured at every step:

    a module bursts when each of its last BURST_STEPS norms is above BURST_FACTOR times the median of its WINDOW norms.

The order of a step:

1. `local_squares` measures the gradients of the net's modules (`parameters_by_module`) on each rank.
2. `dumo.training.record` averages these squares over ranks, and takes their roots: the norms.
3. `GradientNorms.with_step` adds the norms to the window, once the step is applied.
4. `new_bursts` says which modules burst since this step.

The window and its fields are part of a checkpoint, so a resumed run logs and warns as an uninterrupted one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from statistics import median

import torch
from torch import Tensor, nn

from dumo.training.layout import local_tensor, shard_count

# our own choices, from no paper
MAX_MODULES = 10  # if a net has more, the smallest are counted as one, `REST`
REST = "rest"
WINDOW = 50  # steps whose norms are kept: the default of `train.log_every`
WARMUP_STEPS = 100  # steps before the first warning
BURST_STEPS = 4  # steps in a row, for one batch alone may be far off
BURST_FACTOR = 3.0  # times the median
_DIGITS = 4  # significant ones of a norm in the window


@dataclass(frozen=True)
class GradientNorms:
    """The gradient norms of the last WINDOW applied steps, by module, the latest last."""

    norms: dict[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    steps: int = 0  # since the start, at most WARMUP_STEPS
    calm: int = 0  # steps since a module burst, or since the start; at most WINDOW

    def with_step(self, norms: Mapping[str, float]) -> "GradientNorms":
        """The window after one more step, whose norms are `norms`, by module."""
        window: dict[str, tuple[float, ...]] = {}
        for name, norm in norms.items():
            window[name] = (*self.norms.get(name, ()), _round_norm(norm))[-WINDOW:]
        new = GradientNorms(window, steps=min(self.steps + 1, WARMUP_STEPS), calm=min(self.calm + 1, WINDOW))
        if new.bursting_modules():
            return replace(new, calm=0)
        return new

    def bursting_modules(self) -> dict[str, float]:
        """The modules that burst, the worst first, and how many times its median the last norm of each is."""
        times_median: dict[str, float] = {}
        for name, norms in self.norms.items():
            median_norm = median(norms)
            if median_norm == 0:  # no gradient for half of the window: there is no ratio
                continue
            if min(norms[-BURST_STEPS:]) > BURST_FACTOR * median_norm:
                times_median[name] = norms[-1] / median_norm
        return dict(sorted(times_median.items(), key=lambda item: -item[1]))

    def peaks(self) -> dict[str, float]:
        """The largest norm of each module in the window."""
        return {name: max(norms) for name, norms in self.norms.items()}


def new_bursts(before: GradientNorms, now: GradientNorms) -> dict[str, float]:
    """The modules that burst since the last step, with what `bursting_modules` says; {} while another burst goes on.

    The next burst may begin WINDOW steps after the last one's end. None begins in the first WARMUP_STEPS steps: heads
    start at zero, and so do the gradients of all else, which then grow tenfold in twenty steps.
    """
    if before.steps < WARMUP_STEPS or before.calm < WINDOW:
        return {}
    return now.bursting_modules()


def _round_norm(norm: float) -> float:
    """A norm to _DIGITS significant digits; 0 where it is not finite."""
    if not isfinite(norm):
        return 0.0
    return float(f"{norm:.{_DIGITS}g}")


def parameters_by_module(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of a net by top module; each head is one, and so is each part of a `model` of others.

    Of more than MAX_MODULES the smallest are together REST.
    """
    modules: dict[str, list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            modules.setdefault(_module_of(name), []).append(parameter)
    if len(modules) <= MAX_MODULES:
        return modules

    def num_parameters(name: str) -> int:
        return sum(parameter.numel() for parameter in modules[name])

    by_size = sorted(modules, key=num_parameters)
    rest: list[nn.Parameter] = []
    for name in by_size[: len(modules) - (MAX_MODULES - 1)]:  # REST takes one of the places
        rest += modules.pop(name)
    return {**modules, REST: rest}


def _module_of(name: str) -> str:
    """The module that a parameter is counted to: `blocks` for blocks.3.mlp.weight, `heads.u` for heads.u.out.bias."""
    first, *others = name.removeprefix("model.").split(".")
    if first == "heads" and len(others) > 1:
        return f"{first}.{others[0]}"
    return first


@torch.no_grad()
def local_squares(groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
    """This rank's estimate of the squared gradient norm of each group of parameters, a scalar tensor a group.

    The mean of the estimates over all ranks is the squared norm of the whole gradient. Of sharded weights a rank has
    one shard, so its square counts as often as there are shards. [] where no parameter has a gradient.
    """
    gradients: list[Tensor] = []  # of all groups, one after the other
    group_sizes: list[int] = []
    for group in groups:
        gradients_of_group = [parameter.grad for parameter in group if parameter.grad is not None]
        gradients += gradients_of_group
        group_sizes.append(len(gradients_of_group))
    if not gradients:
        return []
    norms = torch._foreach_norm([local_tensor(gradient) for gradient in gradients])  # pyright: ignore[reportPrivateImportUsage]
    squares = torch.stack([norm.float() for norm in norms]).square() * shard_count(gradients[0])
    return [squares_of_group.sum() for squares_of_group in squares.split(group_sizes)]
