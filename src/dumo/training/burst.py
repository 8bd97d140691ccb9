"""Gradient norms by module, and bursts: steps at which one module's norm stays far above its median.

A training that breaks does so in one module first. In a measured run (ours) the time embedder's gradient grew from .10
to .72 within five steps while blocks and heads were calm; twenty steps later all had followed, and the error of u was
ten times as large. A log with a row in fifty steps cannot show that, so norms are measured at every step:

    a module bursts when each of its last LASTS norms is above FACTOR times the median of its last WINDOW norms.

A step measures `local_squares` of the net's modules (`parameters_by_module`), adds their norms to the window
(`Gradients.after`), and asks `new_bursts`. The window is part of a checkpoint, so a resumed run logs and warns as an
uninterrupted one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from statistics import median

import torch
from torch import Tensor, nn

from dumo.training.layout import local, shard_count

MODULES = 10  # at most, the smallest are taken together: ours
REST = "rest"  # the name of the modules that are taken together
WINDOW = 50  # steps whose norms are kept: ours, the default of `train.log_every`
START = 100  # steps before the first warning: ours
LASTS = 4  # steps in a row, for one batch alone may be far off: ours
FACTOR = 3.0  # times the median: ours
DIGITS = 4  # significant ones of a norm in the window: ours


@dataclass(frozen=True)
class Gradients:
    """The gradient norms of the last WINDOW applied steps, by module, the latest last."""

    norms: dict[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    steps: int = 0  # since the start, counted up to START
    calm: int = 0  # steps since any module was far above its median, or since the start; counted up to WINDOW

    def after(self, norms: Mapping[str, float]) -> "Gradients":
        """The window after one more step."""
        window: dict[str, tuple[float, ...]] = {}
        for name, norm in norms.items():
            window[name] = (*self.norms.get(name, ()), _rounded(norm))[-WINDOW:]
        new = Gradients(window, steps=min(self.steps + 1, START), calm=min(self.calm + 1, WINDOW))
        return replace(new, calm=0) if new.far_above() else new

    def far_above(self) -> dict[str, float]:
        """The modules that burst, the worst first, and how many times its median the last norm of each is."""
        times_median: dict[str, float] = {}
        for name, norms in self.norms.items():
            usual = median(norms)
            if 0 < FACTOR * usual < min(norms[-LASTS:]):
                times_median[name] = norms[-1] / usual
        return dict(sorted(times_median.items(), key=lambda item: -item[1]))

    def peaks(self) -> dict[str, float]:
        """The largest norm of each module in the window."""
        return {name: max(norms) for name, norms in self.norms.items()}


def new_bursts(before: Gradients, now: Gradients) -> dict[str, float]:
    """The modules whose burst begins with the last step, as `Gradients.far_above`; none while another goes on.

    Another one may begin WINDOW steps after its end. In the first START steps none does: heads start at zero, and so
    do the gradients of all else, which then grow tenfold in twenty steps.
    """
    return now.far_above() if before.steps >= START and before.calm >= WINDOW else {}


def _rounded(norm: float) -> float:
    """A norm to DIGITS significant digits; 0 where it is not finite."""
    return float(f"{norm:.{DIGITS}g}") if isfinite(norm) else 0.0


def parameters_by_module(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of a net by top module; each head is one, and so is each part of a `model` of others.

    Of more than MODULES the smallest are together REST.
    """
    modules: dict[str, list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            modules.setdefault(_module_of(name), []).append(parameter)
    if len(modules) <= MODULES:
        return modules
    by_size = sorted(modules, key=lambda name: sum(parameter.numel() for parameter in modules[name]))
    rest: list[nn.Parameter] = []
    for name in by_size[: len(modules) - MODULES + 1]:
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
    """The square of each group's gradient norm on this rank: their means over ranks are those of the whole.

    Of sharded weights each rank has the part of one shard, so its square counts as often as there are shards.
    """
    gradients: list[Tensor] = []  # of all groups, one after the other
    group_sizes: list[int] = []
    for group in groups:
        gradients_of_group = [parameter.grad for parameter in group if parameter.grad is not None]
        gradients += gradients_of_group
        group_sizes.append(len(gradients_of_group))
    if not gradients:
        return []
    norms = torch._foreach_norm([local(gradient) for gradient in gradients])  # pyright: ignore[reportPrivateImportUsage]
    squares = torch.stack([norm.float() for norm in norms]).square() * shard_count(gradients[0])
    return [squares_of_group.sum() for squares_of_group in squares.split(group_sizes)]
