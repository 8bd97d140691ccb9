"""Optimizer specs for the field `train.optimizer`.

A spec (`AdamW`, `Adam`, `AdamW8bit`, `Muon`) contains the peak learning rate. Calling it with a network creates the
torch optimizer of the trained weights. `half_rates` returns the fields to set after training diverged.
"""

from collections.abc import Collection
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import nn

from dumo.runtime.limits import FACTOR
from dumo.training.eightbit import AdamW8bitOptimizer
from dumo.training.muon import MuonOptimizer, block_matrices
from dumo.types import CHANGES, QUIET, Spec, UserError

OptimizerKind = TypeVar("OptimizerKind", bound=str)
LearningRate = Annotated[float, Field(gt=0, le=FACTOR, allow_inf_nan=False)]
WeightDecay = Annotated[float, Field(ge=0, le=FACTOR, allow_inf_nan=False)]
AdamBeta = Annotated[float, Field(ge=0, lt=1)]


class Adaptive(Spec, Generic[OptimizerKind]):
    """Base class of Adam and AdamW. The defaults are the paper's (Sec. 4.1), except eps, which is torch's."""

    torch_class: ClassVar[type[torch.optim.Adam]]
    kind: OptimizerKind
    lr: LearningRate = Field(default=1e-4, json_schema_extra=CHANGES)
    betas: tuple[AdamBeta, AdamBeta] = (0.9, 0.95)
    weight_decay: WeightDecay = Field(default=0.0, json_schema_extra=QUIET)
    eps: LearningRate = Field(default=1e-8, json_schema_extra=QUIET)
    # The learning rate of the fake score's adapters (objective dmd2). None means lr.
    fake_lr: LearningRate | None = Field(default=None, exclude_if=lambda lr: lr is None, json_schema_extra=CHANGES)

    def __call__(self, net: nn.Module) -> torch.optim.Optimizer:
        """Create the optimizer of a network's trained weights."""
        return self._with_fake_lr(self.optimizer_of(_trained_parameters(net)), net)

    def _with_fake_lr(self, optimizer: torch.optim.Optimizer, net: nn.Module) -> torch.optim.Optimizer:
        """Move the fake score's weights to parameter groups with `fake_lr`, if it is set."""
        if self.fake_lr is None:
            return optimizer
        fake_parameters = fake_score_parameters(net)
        for group in [*optimizer.param_groups]:
            moved = [p for p in group["params"] if p in fake_parameters]
            group["params"] = [p for p in group["params"] if p not in fake_parameters]
            # The trainer keeps this ratio when the schedule changes lr.
            optimizer.add_param_group({**group, "params": moved, "lr": self.fake_lr, "ratio": self.fake_lr / self.lr})
        return optimizer

    def optimizer_of(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Create the torch optimizer of some parameters. On GPUs it is fused, which rounds differently from a CPU."""
        fused = True if all(p.is_cuda for p in params) else None
        return self.torch_class(params, self.lr, self.betas, self.eps, self.weight_decay, fused=fused)


class AdamW(Adaptive[Literal["adamw"]]):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    torch_class = torch.optim.AdamW
    kind: Literal["adamw"] = "adamw"


class Adam(Adaptive[Literal["adam"]]):
    """Adam (arXiv 1412.6980). Weight decay is added to the gradient."""

    torch_class = torch.optim.Adam
    kind: Literal["adam"] = "adam"


class AdamW8bit(Adaptive[Literal["adamw8bit"]]):
    """AdamW with 8-bit moments from bitsandbytes (`AdamW8bitOptimizer`): 2 bytes per weight instead of 8."""

    kind: Literal["adamw8bit"] = "adamw8bit"

    def __call__(self, net: nn.Module) -> AdamW8bitOptimizer:
        """Create the optimizer of a network's trained weights. Raise UserError if bitsandbytes is missing."""
        named_parameters = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        optimizer = AdamW8bitOptimizer(named_parameters, **self.model_dump(exclude={"kind", "fake_lr"}))
        self._with_fake_lr(optimizer, net)
        return optimizer


class Muon(Spec):
    """Muon (Jordan et al. 2024) for the matrices in a network's blocks, AdamW for all other weights (`MuonOptimizer`).

    Matrices are the weights of linear layers and convolutions (one row per filter). Embeddings, heads, label tables,
    biases and norms use AdamW. The parts of fused layers (`fused`: queries, keys and values; shifts, scales and gates;
    the halves of a SwiGLU) are orthogonalized separately.
    """

    kind: Literal["muon"] = "muon"
    # For matrices. Updates are scaled so that AdamW's rates can be used.
    lr: LearningRate = Field(default=1e-3, json_schema_extra=CHANGES)
    momentum: AdamBeta = 0.95  # Jordan et al.
    # For all weights. Moonlight (Liu et al. 2025) uses 0.1.
    weight_decay: WeightDecay = Field(default=0.0, json_schema_extra=QUIET)
    # For the weights that use AdamW. None means lr.
    adamw_lr: LearningRate | None = Field(default=None, json_schema_extra=CHANGES)
    # For time embedders (docs/mathematics.md#the-embedders-rate). None means adamw_lr.
    time_lr: LearningRate | None = Field(default=None, json_schema_extra=CHANGES)
    # betas and eps are AdamW's.
    betas: tuple[AdamBeta, AdamBeta] = (0.9, 0.95)
    eps: LearningRate = Field(default=1e-8, json_schema_extra=QUIET)

    def __call__(self, net: nn.Module) -> torch.optim.Optimizer:
        """Create the optimizer of a network's trained weights.

        Raise UserError if no block has matrices, or if `time_lr` is set and there is no time embedder.
        """
        num_stacked = block_matrices(net)
        if not num_stacked:
            raise UserError(
                "optimizer.kind=muon needs weight matrices in blocks, but this network trains none: set "
                "optimizer.kind=adamw"
            )
        time_embedders = time_embedder_parameters(net)
        if self.time_lr and not time_embedders:
            raise UserError(
                f"train.optimizer.time_lr={self.time_lr:g} needs modules with embeds_times = True, but this network "
                "trains none: set train.optimizer.time_lr=null, or mark the module that embeds its times"
            )
        params_by_stack: dict[int, list[nn.Parameter]] = {count: [] for count in sorted({*num_stacked.values()})}
        for p, count in num_stacked.items():
            params_by_stack[count].append(p)
        other_parameters = [p for p in _trained_parameters(net) if p not in num_stacked]
        adamw = None
        if other_parameters:
            adamw = self._adamw(other_parameters, time_embedders)
            for group in adamw.param_groups:
                # The trainer keeps this ratio when the schedule changes lr.
                group["ratio"] = group["lr"] / self.lr
        return MuonOptimizer(params_by_stack, adamw, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def _adamw(self, parameters: list[nn.Parameter], time_embedders: Collection[nn.Parameter]) -> torch.optim.Optimizer:
        """Create AdamW for some parameters. With `time_lr`, time embedders form a separate parameter group."""
        lr = self.adamw_lr or self.lr
        adamw = AdamW(lr=lr, betas=self.betas, weight_decay=self.weight_decay, eps=self.eps).optimizer_of(parameters)
        time_parameters = [p for p in parameters if p in time_embedders]
        if self.time_lr and time_parameters:
            (group,) = adamw.param_groups
            group["params"] = [p for p in parameters if p not in time_embedders]
            adamw.add_param_group({**group, "params": time_parameters, "lr": self.time_lr})
        return adamw


Optimizer = Annotated[AdamW | Adam | AdamW8bit | Muon, Field(discriminator="kind")]


def half_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return half of each learning rate, by field."""
    rates = {name: getattr(optimizer, name, None) for name in ("lr", "adamw_lr", "time_lr", "fake_lr")}
    return {name: rate / 2 for name, rate in rates.items() if rate is not None}


def _trained_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters of a network."""
    return [p for p in net.parameters() if p.requires_grad]


def fake_score_parameters(net: nn.Module) -> set[nn.Parameter]:
    """Return the trained weights that belong only to the fake score."""
    return {*getattr(net, "fake_score_parameters", ())}


def time_embedder_parameters(net: nn.Module) -> set[nn.Parameter]:
    """Return the trained weights of time embedders, which are modules with `embeds_times = True`."""
    parameters: set[nn.Parameter] = set()
    for module in net.modules():
        if getattr(module, "embeds_times", False):
            parameters.update(_trained_parameters(module))
    return parameters
