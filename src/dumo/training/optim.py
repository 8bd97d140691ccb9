"""Optimizers and learning rate schedules, as values of a run: the fields `train.optimizer` and `train.schedule`.

An optimizer spec (`AdamW`, `Adam`, `AdamW8bit`, `Muon`) holds the peak learning rate. Called with a net it builds the
torch optimizer of the trained weights. Its `moments` are the numbers of 4 bytes that it keeps per weight, at least. A
schedule (`Constant`, `Cosine`, `WSD`) is a pure function of (step, steps) to a factor in [0, 1], so a resumed run needs
no scheduler state. A run that ends by the clock (`dumo.training.deadline`) calls it with a share of the steps.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dumo.runtime.limits import FACTOR, STEPS
from dumo.training.layout import full_tensor, shard_like
from dumo.types import CHANGES, QUIET, Spec, UserError
from dumo.types.family import is_instance_of

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from dumo.training.eightbit import AdamW8bitOptimizer

Matrices = Float[Tensor, "parts rows columns"]

_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c: Jordan et al.'s
_ITERATIONS = 5  # Newton-Schulz iterations: Jordan et al.'s
EPS = 1e-7  # the least norm that is divided by: Jordan et al.'s
_ADAMW_UPDATE_RMS = 0.2  # of a matrix's update, so that one lr serves both: Moonlight (Liu et al. 2025), Eq. 4


def orthogonalize(m: Matrices) -> Matrices:
    """Bring the singular values of each matrix near 1 by Newton-Schulz iterations, in its dtype.

    Matrix products approximate U V^T: the odd polynomial p(s) = a s + b s^3 + c s^5, applied five times to the singular
    values, brings all between .0015 and 1 of the matrix's norm to somewhere from .68 to 1.2. Lower ones stay smaller:
    .001 comes to .47.
    """
    a, b, c = _COEFFICIENTS
    is_tall = m.shape[1] > m.shape[2]
    x = m.mT if is_tall else m
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)  # so that no singular value is above 1
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonOptimizer(torch.optim.Optimizer):
    """Muon for matrices, and another optimizer for all else, as one: one list of groups, one memory.

    A matrix moves by its orthogonalized momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): if
    that is U S V^T, the step is along U V^T, as far in rare directions as in common ones. `torch.optim.Muon` makes the
    same steps, but takes fused matrices for one, and rounds to bf16 on a CPU, too, so that a sharded matrix makes
    another step than a whole one.

    A group of matrices has `parts`, the number of matrices stacked in each: they are orthogonalized one by one, which
    Jordan et al. find better for queries, keys and values. A convolution's filters are rows. The momentum of a sharded
    matrix is gathered, one matrix at a time, so that the step is that of one process.
    """

    def __init__(
        self, matrices: Mapping[int, Sequence[nn.Parameter]], rest: torch.optim.Optimizer | None, **options: object
    ) -> None:
        """`matrices` by their parts; `rest` moves all else; `options` are lr, momentum and weight_decay."""
        self.rest = rest
        groups = [{"params": [*params], "parts": parts, **options} for parts, params in matrices.items()]
        if rest:
            groups += rest.param_groups
        super().__init__(groups, {})

    def __getstate__(self) -> dict[str, Any]:
        """The fields of a copy and a pickle: torch's method has its own fields alone."""
        return {**super().__getstate__(), "rest": self.rest}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ANN401, as torch's
        """Move all parameters that have a gradient; no closure is called."""
        for group in self.param_groups:
            if "parts" not in group:
                continue
            for p in group["params"]:
                if p.grad is not None:
                    self._update_matrix(p, p.grad, group)
        if self.rest:
            self.rest.state = self.state
            self.rest.param_groups = [group for group in self.param_groups if "parts" not in group]
            self.rest.step()

    def _update_matrix(self, p: nn.Parameter, grad: Tensor, group: Mapping[str, Any]) -> None:
        """Move one matrix: decay, then a step along its orthogonalized momentum."""
        state = self.state[p]
        momentum = group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        direction = full_tensor(grad.lerp(mean, momentum))  # Nesterov's
        if direction.is_cuda:
            direction = direction.bfloat16()  # which is enough (Jordan et al.)
        update = orthogonalize(direction.flatten(1).unflatten(0, (group["parts"], -1)))
        step_size = group["lr"] * (_ADAMW_UPDATE_RMS * sqrt(max(update.shape[1:])))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(shard_like(update.reshape(p.shape).to(p.dtype), p), alpha=-step_size)


OptimizerKind = TypeVar("OptimizerKind", bound=str)
LearningRate = Annotated[float, Field(gt=0, le=FACTOR, allow_inf_nan=False)]
WeightDecay = Annotated[float, Field(ge=0, le=FACTOR, allow_inf_nan=False)]
AdamBeta = Annotated[float, Field(ge=0, lt=1)]


class Adaptive(Spec, Generic[OptimizerKind]):
    """A step from two moments of the gradient. The defaults are the paper's (Sec. 4.1); eps is torch's."""

    torch_class: ClassVar[type[torch.optim.Adam]]
    moments: ClassVar[float] = 2
    kind: OptimizerKind
    lr: LearningRate = Field(default=1e-4, json_schema_extra=CHANGES)
    betas: tuple[AdamBeta, AdamBeta] = (0.9, 0.95)
    weight_decay: WeightDecay = Field(default=0.0, json_schema_extra=QUIET)
    eps: LearningRate = Field(default=1e-8, json_schema_extra=QUIET)

    def __call__(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a net's trained weights."""
        return self.optimizer_of(_trained_parameters(net))

    def optimizer_of(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer of some parameters; if all are on a GPU a fused kernel, which rounds unlike a CPU's."""
        fused = True if all(p.is_cuda for p in params) else None
        return self.torch_class(params, self.lr, self.betas, self.eps, self.weight_decay, fused=fused)


class AdamW(Adaptive[Literal["adamw"]]):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    torch_class = torch.optim.AdamW
    kind: Literal["adamw"] = "adamw"


class Adam(Adaptive[Literal["adam"]]):
    """Adam (arXiv 1412.6980); weight decay is added to the gradient."""

    torch_class = torch.optim.Adam
    kind: Literal["adam"] = "adam"


class AdamW8bit(Adaptive[Literal["adamw8bit"]]):
    """AdamW with moments of 8 bits, by bitsandbytes (`AdamW8bitOptimizer`): 2 bytes of memory to a weight, not 8."""

    moments: ClassVar[float] = 0.5
    kind: Literal["adamw8bit"] = "adamw8bit"

    def __call__(self, net: nn.Module) -> "AdamW8bitOptimizer":
        """The optimizer of a net's trained weights. Raises UserError where bitsandbytes is missing."""
        from dumo.training.eightbit import AdamW8bitOptimizer

        named_parameters = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        return AdamW8bitOptimizer(named_parameters, **self.model_dump(exclude={"kind"}))


def has_8bit_codes(optimizer: object) -> "TypeIs[AdamW8bitOptimizer]":
    """Whether an optimizer keeps its moments as codes of 8 bits."""
    return is_instance_of(optimizer, "dumo.training.eightbit:AdamW8bitOptimizer")


class Muon(Spec):
    """Muon (Jordan et al. 2024) for the matrices of a net's blocks, AdamW for all else (`MuonOptimizer`).

    Matrices are the weights of linear layers and, with filters as rows, of convolutions. Embeddings, heads, label
    tables, biases and norms are AdamW's. Fused layers (`fused`: queries, keys and values; shifts, scales and gates; the
    two halves of a SwiGLU) are orthogonalized one by one.
    """

    moments: ClassVar[float] = 1
    kind: Literal["muon"] = "muon"
    lr: LearningRate = Field(default=1e-3, json_schema_extra=CHANGES)  # of matrices, as large as AdamW's
    momentum: AdamBeta = 0.95  # Jordan et al.
    # Of matrices and all else; Moonlight (Liu et al. 2025) takes 0.1.
    weight_decay: WeightDecay = Field(default=0.0, json_schema_extra=QUIET)
    adamw_lr: LearningRate | None = Field(default=None, json_schema_extra=CHANGES)  # AdamW's; None: lr
    # AdamW's for the embedders of times (docs/mathematics.md#the-embedders-rate); None: adamw_lr
    time_lr: LearningRate | None = Field(default=None, json_schema_extra=CHANGES)
    betas: tuple[AdamBeta, AdamBeta] = (0.9, 0.95)  # AdamW's, as is eps
    eps: LearningRate = Field(default=1e-8, json_schema_extra=QUIET)

    @property
    def embedders_lr(self) -> float:
        """The rate of the embedders of times."""
        return self.time_lr or self.adamw_lr or self.lr

    def __call__(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a net's trained weights. Raises UserError if its blocks have no matrix."""
        parts = block_matrices(net)
        if not parts:
            raise UserError(
                "optimizer.kind=muon needs matrices in a net's blocks, and this net trains none: set "
                "optimizer.kind=adamw"
            )
        matrices_by_parts: dict[int, list[nn.Parameter]] = {count: [] for count in sorted({*parts.values()})}
        for p, count in parts.items():
            matrices_by_parts[count].append(p)
        other_parameters = [p for p in _trained_parameters(net) if p not in parts]
        rest = None
        if other_parameters:
            rest = self._adamw(other_parameters, time_embedder_parameters(net))
            for group in rest.param_groups:
                group["ratio"] = group["lr"] / self.lr
        return MuonOptimizer(matrices_by_parts, rest, **self.model_dump(include={"lr", "momentum", "weight_decay"}))

    def _adamw(self, parameters: list[nn.Parameter], time_embedders: Collection[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW of some parameters; with `time_lr` those of them in `time_embedders` are a second group."""
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
    """Half of each rate that an optimizer has, by field."""
    rates = {name: getattr(optimizer, name, None) for name in ("lr", "adamw_lr", "time_lr")}
    return {name: rate / 2 for name, rate in rates.items() if rate is not None}


def _trained_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of a net."""
    return [p for p in net.parameters() if p.requires_grad]


def time_embedder_parameters(net: nn.Module) -> set[nn.Parameter]:
    """The trained weights of a net's embedders of times: of modules that say so by `embeds_times`."""
    parameters: set[nn.Parameter] = set()
    for module in net.modules():
        if getattr(module, "embeds_times", False):
            parameters.update(_trained_parameters(module))
    return parameters


def block_matrices(net: nn.Module) -> dict[nn.Parameter, int]:
    """The trained weights of linear layers and convolutions in a net's blocks, each with its number of parts."""
    parts: dict[nn.Parameter, int] = {}
    blocks = getattr(net, "blocks", getattr(net, "layers", ()))
    for parent in nn.ModuleList(blocks).modules():
        fused: Mapping[str, int] = getattr(parent, "fused", {})
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.requires_grad:
                parts[cast(nn.Parameter, layer.weight)] = fused.get(name, 1)
    return parts


class Constant(Spec):
    """Full rate after the warm-up. Without one it is the paper's schedule (App. C.1)."""

    kind: Literal["constant"] = "constant"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps

    def __call__(self, step: float, steps: int) -> float:
        """The factor of the update that follows `step` done ones; `steps` does not matter."""
        return _warmup_factor(step, self.warmup)


class Cosine(Spec):
    """Half a cosine from full rate at the end of the warm-up down to none (arXiv 1608.03983, without restarts)."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps

    def __call__(self, step: float, steps: int) -> float:
        """The factor of the update that follows `step` done ones, of `steps` in all."""
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        progress = min(max(progress, 0.0), 1.0)
        return _warmup_factor(step, self.warmup) * (1 + math.cos(math.pi * progress)) / 2


class WSD(Spec):
    """Warm-up, stable, decay (MiniCPM, Hu et al. 2024): full rate up to the last fifth of the steps, then down.

    A run of more steps is the same up to where this one decays: to continue it, resume from a checkpoint before, with
    more steps. Share and shape of the decay are Hägele et al.'s (2024, Sec. 4): a fifth, as 1 - sqrt.
    """

    DECAY: ClassVar[float] = 0.2  # share of the steps
    kind: Literal["wsd"] = "wsd"
    warmup: int = Field(default=0, ge=0, le=STEPS)  # steps

    def __call__(self, step: float, steps: int) -> float:
        """The factor of the update that follows `step` done ones, of `steps` in all."""
        start = max(self.warmup, (1 - self.DECAY) * steps)
        progress = (step - start) / max(1, steps - start)  # of the decay
        progress = min(max(progress, 0.0), 1.0)
        return _warmup_factor(step, self.warmup) * (1 - math.sqrt(progress))


LearningRateSchedule = Annotated[Constant | Cosine | WSD, Field(discriminator="kind")]


def _warmup_factor(step: float, warmup: int) -> float:
    """Linear warm-up: 1/warmup at the first update, 1 from the end of the warm-up on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
