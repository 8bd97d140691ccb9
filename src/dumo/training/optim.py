"""Optimizers and learning rate schedules, as values.

An optimizer spec holds the peak learning rate; `moments` is how many numbers it keeps per weight, at least. A schedule
is a pure function of (step, steps) to a factor in [0, 1], so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Generic, Literal, TypeVar, cast

import torch
from pydantic import Field
from torch import nn

from dumo.runtime.bound import FACTOR, STEPS
from dumo.training import muon
from dumo.types import CHANGES, QUIET, Spec, UserError

Kind = TypeVar("Kind", bound=str)
LearningRate = Annotated[float, Field(gt=0, le=FACTOR, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, le=FACTOR, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Adaptive(Spec, Generic[Kind]):
    """A step from two moments of the gradient. The defaults are the paper's (Sec. 4.1); eps is torch's."""

    of: ClassVar[type[torch.optim.Adam]]
    moments: ClassVar[int] = 2
    kind: Kind
    lr: LearningRate = Field(default=1e-4, json_schema_extra=CHANGES)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: Decay = Field(default=0.0, json_schema_extra=QUIET)
    eps: LearningRate = Field(default=1e-8, json_schema_extra=QUIET)

    def __call__(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a net's trained weights."""
        return self.of_these(learned(net))

    def of_these(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters: on a GPU a fused kernel, which rounds unlike a CPU's."""
        fused = True if all(p.is_cuda for p in params) else None
        return self.of(params, self.lr, self.betas, self.eps, self.weight_decay, fused=fused)


class AdamW(Adaptive[Literal["adamw"]]):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    of = torch.optim.AdamW
    kind: Literal["adamw"] = "adamw"


class Adam(Adaptive[Literal["adam"]]):
    """Adam (arXiv 1412.6980); weight decay is added to the gradient."""

    of = torch.optim.Adam
    kind: Literal["adam"] = "adam"


class Muon(Spec):
    """Muon (Jordan et al. 2024) for the matrices of a net's blocks, AdamW for all else (`dumo.training.muon`).

    Matrices are the weights of linear layers and, with filters as rows, of convolutions. Embeddings, heads, label
    tables, biases and norms are AdamW's. Fused layers (`fused`: queries, keys and values; shifts, scales and gates; the
    two halves of a SwiGLU) are orthogonalized one by one.
    """

    moments: ClassVar[int] = 1
    kind: Literal["muon"] = "muon"
    lr: LearningRate = Field(default=1e-3, json_schema_extra=CHANGES)  # of matrices, as large as AdamW's
    momentum: Beta = 0.95  # Jordan et al.
    # Of matrices and all else; Moonlight (Liu et al. 2025) takes 0.1.
    weight_decay: Decay = Field(default=0.0, json_schema_extra=QUIET)
    adamw_lr: LearningRate | None = Field(default=None, json_schema_extra=CHANGES)  # AdamW's; None: lr
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # AdamW's, as is eps
    eps: LearningRate = Field(default=1e-8, json_schema_extra=QUIET)

    def __call__(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a net's trained weights. Raises UserError if its blocks have no matrix."""
        parts = matrices(net)
        if not parts:
            raise UserError("this net trains no matrix in blocks, so there is nothing for muon: take adamw")
        grouped = {n: [p for p, count in parts.items() if count == n] for n in sorted({*parts.values()})}
        adamw = AdamW(lr=self.adamw_lr or self.lr, betas=self.betas, weight_decay=self.weight_decay, eps=self.eps)
        others = [p for p in learned(net) if p not in parts]
        rest = adamw.of_these(others) if others else None
        for group in rest.param_groups if rest else ():
            group["ratio"] = group["lr"] / self.lr
        return muon.Muon(grouped, rest, **self.model_dump(include={"lr", "momentum", "weight_decay"}))


Optimizer = Annotated[AdamW | Adam | Muon, Field(discriminator="kind")]


def learned(net: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of a net."""
    return [p for p in net.parameters() if p.requires_grad]


def matrices(net: nn.Module) -> dict[nn.Parameter, int]:
    """The trained weights of linear layers and convolutions in a net's blocks, each with its number of parts."""
    found: dict[nn.Parameter, int] = {}
    for parent in nn.ModuleList(getattr(net, "blocks", getattr(net, "layers", ()))).modules():
        fused: Mapping[str, int] = getattr(parent, "fused", {})
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.requires_grad:
                found[cast(nn.Parameter, layer.weight)] = fused.get(name, 1)
    return found


class Constant(Spec):
    """Full rate after the warm-up. Without one it is the paper's schedule (App. C.1)."""

    kind: Literal["constant"] = "constant"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps

    def __call__(self, step: int, steps: int) -> float:
        """The factor of the update that follows `step` done ones; `steps` does not matter."""
        return climb(step, self.warmup)


class Cosine(Spec):
    """Half a cosine from full rate at the end of the warm-up down to none (arXiv 1608.03983, without restarts)."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps

    def __call__(self, step: int, steps: int) -> float:
        """The factor of the update that follows `step` done ones, of `steps` in all."""
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return climb(step, self.warmup) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2


class WSD(Spec):
    """Warm-up, stable, decay (MiniCPM, Hu et al. 2024): full rate up to the last fifth of the steps, then down.

    A run of more steps is the same up to where this one decays: resume it from a checkpoint before, with more. Share
    and shape of the decay are Hägele et al.'s (2024, Sec. 4): a fifth, as 1 - sqrt.
    """

    DECAY: ClassVar[float] = 0.2
    kind: Literal["wsd"] = "wsd"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps

    def __call__(self, step: int, steps: int) -> float:
        """The factor of the update that follows `step` done ones, of `steps` in all."""
        start = max(self.warmup, (1 - self.DECAY) * steps)
        done = min(max((step - start) / max(1, steps - start), 0.0), 1.0)
        return climb(step, self.warmup) * (1 - math.sqrt(done))


Schedule = Annotated[Constant | Cosine | WSD, Field(discriminator="kind")]


def climb(step: int, warmup: int) -> float:
    """Linear warm-up: 1/warmup at the first update, 1 from the end of the warm-up on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
