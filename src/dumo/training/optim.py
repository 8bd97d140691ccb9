"""Optimizers and learning rate schedules, as values.

An optimizer spec holds the peak learning rate; `moments` is how many numbers of 4 bytes it keeps per weight, at least.
A schedule is a pure function of (step, steps) to a factor in [0, 1], so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from math import sqrt
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dumo.runtime.bound import FACTOR, STEPS
from dumo.training.eightbit import AdamW8bitOptimizer
from dumo.training.layout import laid, whole
from dumo.types import CHANGES, QUIET, Spec, UserError

Matrices = Float[Tensor, "parts rows columns"]

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c: Jordan et al.'s
ITERATIONS = 5  # iterations: Jordan et al.'s
EPS = 1e-7  # theirs: the least norm that is divided by
AS_ADAMW = 0.2  # as far as AdamW moves a matrix, so that one lr serves both: Moonlight (Liu et al. 2025), Eq. 4


def orthogonal(m: Matrices) -> Matrices:
    """Each matrix with its singular values brought near 1 by Newton-Schulz iterations, in its dtype.

    Matrix products approximate U V^T: the odd polynomial p(s) = a s + b s^3 + c s^5, applied five times to the singular
    values, brings all between .0015 and 1 of the matrix's norm to somewhere from .68 to 1.2. Lower ones stay smaller:
    .001 comes to .47.
    """
    a, b, c = COEFFICIENTS
    x = m.mT if m.shape[1] > m.shape[2] else m
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)  # so that no singular value is above 1
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if m.shape[1] > m.shape[2] else x


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
        """`matrices` by their parts; `options` are lr, momentum and weight_decay."""
        self.rest = rest
        groups = [{"params": [*params], "parts": parts, **options} for parts, params in matrices.items()]
        super().__init__([*groups, *(rest.param_groups if rest else ())], {})

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, and a pickle; torch's knows its own fields alone."""
        return {**super().__getstate__(), "rest": self.rest}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ANN401, as torch's
        """Move all parameters that have a gradient; no closure is called."""
        for group in self.param_groups:
            for p in group["params"] if "parts" in group else ():
                if p.grad is not None:
                    self.move(p, p.grad, group)
        if self.rest:
            self.rest.state, self.rest.param_groups = self.state, [g for g in self.param_groups if "parts" not in g]
            self.rest.step()

    def move(self, p: nn.Parameter, grad: Tensor, group: Mapping[str, Any]) -> None:
        """Move one matrix: decay, then a step along its orthogonalized momentum."""
        memory, momentum = self.state[p], group["momentum"]
        if not memory:
            memory["momentum_buffer"] = torch.zeros_like(p)
        mean = memory["momentum_buffer"].lerp_(grad, 1 - momentum)
        mean = whole(grad.lerp(mean, momentum))  # Nesterov's
        mean = mean.bfloat16() if mean.is_cuda else mean  # bf16 does (Jordan et al.)
        step = orthogonal(mean.flatten(1).unflatten(0, (group["parts"], -1)))
        far = group["lr"] * (AS_ADAMW * sqrt(max(step.shape[1:])))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(laid(step.reshape(p.shape).to(p.dtype), p), alpha=-far)


Kind = TypeVar("Kind", bound=str)
LearningRate = Annotated[float, Field(gt=0, le=FACTOR, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, le=FACTOR, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Adaptive(Spec, Generic[Kind]):
    """A step from two moments of the gradient. The defaults are the paper's (Sec. 4.1); eps is torch's."""

    of: ClassVar[type[torch.optim.Adam]]
    moments: ClassVar[float] = 2
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


class AdamW8bit(Adaptive[Literal["adamw8bit"]]):
    """AdamW with moments of 8 bits, by bitsandbytes (`AdamW8bitOptimizer`): 2 bytes of memory to a weight, not 8."""

    moments: ClassVar[float] = 0.5
    kind: Literal["adamw8bit"] = "adamw8bit"

    def __call__(self, net: nn.Module) -> AdamW8bitOptimizer:
        """The optimizer of a net's trained weights. Raises UserError where bitsandbytes is missing."""
        named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        return AdamW8bitOptimizer(named, **self.model_dump(exclude={"kind"}))


class Muon(Spec):
    """Muon (Jordan et al. 2024) for the matrices of a net's blocks, AdamW for all else (`MuonOptimizer`).

    Matrices are the weights of linear layers and, with filters as rows, of convolutions. Embeddings, heads, label
    tables, biases and norms are AdamW's. Fused layers (`fused`: queries, keys and values; shifts, scales and gates; the
    two halves of a SwiGLU) are orthogonalized one by one.
    """

    moments: ClassVar[float] = 1
    kind: Literal["muon"] = "muon"
    lr: LearningRate = Field(default=1e-3, json_schema_extra=CHANGES)  # of matrices, as large as AdamW's
    momentum: Beta = 0.95  # Jordan et al.
    # Of matrices and all else; Moonlight (Liu et al. 2025) takes 0.1.
    weight_decay: Decay = Field(default=0.0, json_schema_extra=QUIET)
    adamw_lr: LearningRate | None = Field(default=None, json_schema_extra=CHANGES)  # AdamW's; None: lr
    # AdamW's for the embedders of times (docs/mathematics.md#the-embedders-rate); None: adamw_lr
    time_lr: LearningRate | None = Field(default=None, json_schema_extra=CHANGES)
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # AdamW's, as is eps
    eps: LearningRate = Field(default=1e-8, json_schema_extra=QUIET)

    @property
    def embedders_lr(self) -> float:
        """The rate of the embedders of times."""
        return self.time_lr or self.adamw_lr or self.lr

    def __call__(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a net's trained weights. Raises UserError if its blocks have no matrix."""
        parts = matrices(net)
        if not parts:
            raise UserError("this net trains no matrix in blocks, so there is nothing for muon: take adamw")
        grouped = {n: [p for p, count in parts.items() if count == n] for n in sorted({*parts.values()})}
        others = [p for p in learned(net) if p not in parts]
        rest = self._adamw(others, embedders(net)) if others else None
        for group in rest.param_groups if rest else ():
            group["ratio"] = group["lr"] / self.lr
        return MuonOptimizer(grouped, rest, **self.model_dump(include={"lr", "momentum", "weight_decay"}))

    def _adamw(self, others: list[nn.Parameter], times: Collection[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW of `others`; with `time_lr` those of them that embed times are a group of their own."""
        lr = self.adamw_lr or self.lr
        adamw = AdamW(lr=lr, betas=self.betas, weight_decay=self.weight_decay, eps=self.eps).of_these(others)
        slow = [p for p in others if p in times]
        if self.time_lr and slow:
            (group,) = adamw.param_groups
            group["params"] = [p for p in others if p not in times]
            adamw.add_param_group({**group, "params": slow, "lr": self.time_lr})
        return adamw


Optimizer = Annotated[AdamW | Adam | AdamW8bit | Muon, Field(discriminator="kind")]


def halved(optimizer: Optimizer) -> dict[str, float]:
    """Half of each rate that an optimizer has, by field."""
    rates = {name: getattr(optimizer, name, None) for name in ("lr", "adamw_lr", "time_lr")}
    return {name: rate / 2 for name, rate in rates.items() if rate is not None}


def learned(net: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of a net."""
    return [p for p in net.parameters() if p.requires_grad]


def embedders(net: nn.Module) -> set[nn.Parameter]:
    """The trained weights of a net's embedders of times: of modules that say so by `embeds_times`."""
    modules = (module for module in net.modules() if getattr(module, "embeds_times", False))
    return {p for module in modules for p in learned(module)}


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
