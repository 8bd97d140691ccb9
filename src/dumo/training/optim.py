"""Optimizers and learning rate schedules, as values.

An optimizer spec holds the peak learning rate, and in `moments` how many numbers it keeps for each weight, at least. A
schedule is a pure function of (step, steps) to a factor in [0, 1], so the rate of a step never depends on how the run
got there, and a resumed run needs no scheduler state.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from pydantic import Field, model_validator
from torch import nn

from dumo.bound import FACTOR, STEPS
from dumo.training import muon
from dumo.types import CHANGES, Spec, UserError

Kind = TypeVar("Kind", bound=str)
LearningRate = Annotated[float, Field(gt=0, le=FACTOR, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, le=FACTOR, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class HeadRate(Spec):
    """What is another for a head of the net: a critic wants betas of (0, 0.9), of AFM, where the trunk wants memory."""

    name: str  # of the head
    lr: LearningRate | None = None  # peak; None: that of all else
    betas: tuple[Beta, Beta] | None = None  # as lr


HeadRates = Annotated[tuple[HeadRate, ...], Field(exclude_if=lambda heads: not heads)]


class Adaptive(Spec, Generic[Kind]):
    """A step per parameter, of two moments of its gradient. The defaults are the paper's (Sec. 4.1); eps is torch's."""

    of: ClassVar[type[torch.optim.Adam | torch.optim.RAdam]]
    fuses: ClassVar[bool] = True  # whether torch has it in one kernel
    moments: ClassVar[int] = 2
    kind: Kind
    lr: LearningRate = Field(default=1e-4, json_schema_extra=CHANGES)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: Decay = 0.0
    eps: LearningRate = 1e-8
    heads: HeadRates = ()  # what is another for their own layers

    def __call__(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of what is trained of a net. Raises UserError as `own_heads`."""
        return self.of_these(learned(net), own_heads(net, self.heads))

    def of_these(
        self, params: list[nn.Parameter], own: Mapping[nn.Parameter, HeadRate] | None = None
    ) -> torch.optim.Optimizer:
        """The optimizer of these parameters: on a GPU in one kernel, which rounds in another order than a CPU's.

        Those of heads with rates of their `own` are groups, whose `ratio` is that of their rate to all else's.
        """
        own = own or {}
        fused = {"fused": True} if self.fuses and all(p.is_cuda for p in params) else {}
        groups: list[dict[str, Any]] = [{"params": [p for p in params if p not in own]}]
        for head in self.heads:
            lr = head.lr or self.lr
            mine = [p for p in params if own.get(p) == head]
            groups += [{"params": mine, "lr": lr, "betas": head.betas or self.betas, "ratio": lr / self.lr}]
        return self.of(groups, self.lr, self.betas, self.eps, self.weight_decay, **fused)


class AdamW(Adaptive[Literal["adamw"]]):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    of = torch.optim.AdamW
    kind: Literal["adamw"] = "adamw"


class Adam(Adaptive[Literal["adam"]]):
    """Adam (arXiv 1412.6980); weight decay is added to the gradient."""

    of = torch.optim.Adam
    kind: Literal["adam"] = "adam"


class RAdam(Adaptive[Literal["radam"]]):
    """Adam with a rectified first phase (arXiv 1908.03265); weight decay as in `Adam`."""

    of = torch.optim.RAdam
    fuses = False
    kind: Literal["radam"] = "radam"


class Muon(Spec):
    """Muon (Jordan et al. 2024) for the matrices of a net's blocks, AdamW for all else (`dumo.training.muon`).

    Matrices are the weights of linear layers and, as rows of filters, of convolutions. Embeddings, heads, tables of
    labels, biases and norms are AdamW's. Layers that are several in one (`fused`: queries, keys and values; shifts,
    scales and gates; the two halves of a SwiGLU) are orthogonalized one by one.
    """

    moments: ClassVar[int] = 1
    kind: Literal["muon"] = "muon"
    lr: LearningRate = Field(default=1e-3, json_schema_extra=CHANGES)  # torch's; with match_rms_adamw as AdamW's
    momentum: Beta = 0.95  # Jordan et al.
    nesterov: bool = True  # Jordan et al.
    ns_steps: int = Field(default=5, ge=1, le=20)  # Newton-Schulz iterations: Jordan et al.
    weight_decay: Decay = 0.0  # of matrices and all else; Moonlight (Liu et al. 2025) takes 0.1
    # How far a matrix moves: match_rms_adamw, as far as AdamW would, so that one lr serves both (Moonlight, Eq. 4); or
    # original (Jordan et al.), with an lr of its own, such as 0.02.
    adjust_lr_fn: muon.Adjust = "match_rms_adamw"
    adamw_lr: LearningRate | None = Field(default=None, json_schema_extra=CHANGES)  # AdamW's; None: lr
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # AdamW's, as is eps
    eps: LearningRate = 1e-8
    heads: HeadRates = ()  # what is another of AdamW's for their own layers

    @model_validator(mode="after")
    def _rated(self) -> "Muon":
        if self.adjust_lr_fn == "original" and self.adamw_lr is None:
            raise ValueError("adjust_lr_fn 'original' takes an lr too large for AdamW: set adamw_lr, such as 0.001")
        return self

    def __call__(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of what is trained of a net. Raises UserError where its blocks have no matrix."""
        parts = matrices(net)
        if not parts:
            raise UserError("this net trains no matrix in blocks, so there is nothing for muon: take adamw")
        grouped = {n: [p for p, count in parts.items() if count == n] for n in sorted({*parts.values()})}
        lr = self.adamw_lr or self.lr
        adamw = AdamW(lr=lr, betas=self.betas, weight_decay=self.weight_decay, eps=self.eps, heads=self.heads)
        others = [p for p in learned(net) if p not in parts]
        rest = adamw.of_these(others, own_heads(net, self.heads)) if others else None
        for group in rest.param_groups if rest else ():
            group["ratio"] = group["lr"] / self.lr
        return muon.Muon(grouped, rest, **self.model_dump(exclude={"kind", "adamw_lr", "betas", "eps", "heads"}))


Optimizer = Annotated[AdamW | Adam | RAdam | Muon, Field(discriminator="kind")]


def learned(net: nn.Module) -> list[nn.Parameter]:
    """What is trained of a net."""
    return [p for p in net.parameters() if p.requires_grad]


def own_heads(net: nn.Module, heads: Sequence[HeadRate]) -> dict[nn.Parameter, HeadRate]:
    """What the layers of heads have of their own. Raises UserError for a head that the net has not, or named twice."""
    if len({head.name for head in heads}) < len(heads):
        raise UserError("train.optimizer.heads names a head twice: leave one out")
    named = dict(net.named_parameters())
    found = {head: [p for name, p in named.items() if name.startswith(f"heads.{head.name}.")] for head in heads}
    if strange := [head.name for head, params in found.items() if not params]:
        there = ", ".join(dict.fromkeys(name.split(".")[1] for name in named if name.startswith("heads.")))
        raise UserError(
            f"train.optimizer.heads: the net has no head '{strange[0]}', its heads are {there or 'unnamed'}"
        )
    return {p: head for head, params in found.items() for p in params}


def matrices(net: nn.Module) -> dict[nn.Parameter, int]:
    """The weights of the linear layers and convolutions in a net's blocks that are trained, each with its parts."""
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
    """Half a cosine from full rate at the end of the warm-up down to `floor` (arXiv 1608.03983, without restarts)."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps
    floor: float = Field(default=0.0, ge=0, le=1)  # the factor at the end

    def __call__(self, step: int, steps: int) -> float:
        """The factor of the update that follows `step` done ones, of `steps` in all."""
        done = (step - self.warmup) / max(1, steps - self.warmup)
        fall = (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
        return climb(step, self.warmup) * (self.floor + (1 - self.floor) * fall)


class WSD(Spec):
    """Warm-up, stable, decay (MiniCPM, Hu et al. 2024): full rate up to the last share of the steps, then down.

    A run of more steps is the same up to where this one decays: resume it from a checkpoint before, with more.
    """

    kind: Literal["wsd"] = "wsd"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps
    decay: float = Field(default=0.2, gt=0, le=1)  # share of the steps, at the end: Hägele et al. 2024
    shape: Literal["linear", "1-sqrt"] = "1-sqrt"  # the better one there (Hägele et al. 2024, Sec. 4)
    floor: float = Field(default=0.0, ge=0, le=1)  # the factor at the end

    def __call__(self, step: int, steps: int) -> float:
        """The factor of the update that follows `step` done ones, of `steps` in all."""
        start = max(self.warmup, (1 - self.decay) * steps)
        done = min(max((step - start) / max(1, steps - start), 0.0), 1.0)
        fall = 1 - (math.sqrt(done) if self.shape == "1-sqrt" else done)
        return climb(step, self.warmup) * (self.floor + (1 - self.floor) * fall)


Schedule = Annotated[Constant | Cosine | WSD, Field(discriminator="kind")]


def climb(step: int, warmup: int) -> float:
    """Linear warm-up: 1/warmup at the first update, 1 from the last one of the warm-up on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
