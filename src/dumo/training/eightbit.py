"""AdamW whose two moments take 8 bits each (Dettmers et al. 2022), and weights of 16 bits that are rounded at random.

A step is torch's, in float32, on one parameter's moments at a time. Between steps bitsandbytes keeps them as codes, and
a scale to each block of 256 numbers: plain tensors, sharded as their parameter, so checkpoints, layouts and counts
treat them as any other. A block lies within a row of a matrix, and ranks share a matrix by rows: so blocks, and what is
rounded, are those of one process. A parameter of other rows, or of fewer than 4096 numbers, has its moments in float32.

A weight in bf16 has 8 bits, and a step moves it by less than half of the last one: rounded to the nearest it would
rest. Rounded up or down at random, with the chances that make the mean exact, it moves in the mean as a weight in
float32 (Gupta et al. 2015). The random numbers are a function of seed, step, parameter and place in the whole.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dumo.flow.precision import HALVES, rounded_at_random
from dumo.io.deferred import is_fake
from dumo.runtime import import_bitsandbytes, install
from dumo.runtime.random import bits
from dumo.training.layout import begin, like_rows, local
from dumo.types import UserError

BLOCK = 256  # numbers to a scale: bitsandbytes'; Dettmers et al.'s is 2048
LEAST = 4096  # numbers of a parameter: bitsandbytes'
PIECE = 2**24  # numbers that are rounded at once: ours, to save memory
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # and whether one has a sign


def fits(p: Tensor) -> bool:
    """Whether the moments of a parameter take 8 bits."""
    return p.ndim > 1 and p.numel() >= LEAST and prod(p.shape[1:]) % BLOCK == 0


def require() -> None:
    """Raise UserError where bitsandbytes is missing."""
    if not import_bitsandbytes():
        raise UserError(f"optimizer 'adamw8bit' needs bitsandbytes: {install('quantised')}")
    for signed in MOMENTS.values():
        table(signed)


@cache
def table(signed: bool) -> Tensor:
    """The 256 numbers that codes stand for, times a scale: Dettmers et al.'s dynamic ones."""
    from bitsandbytes.functional import create_dynamic_map

    with torch.device("cpu"):  # numbers, also where bytes are counted on tensors without any
        return create_dynamic_map(signed)


class AdamW8bitOptimizer(torch.optim.Optimizer):
    """AdamW (`torch.optim.AdamW`) with memory as above; parameters in bf16 are rounded at random, by `seed`."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], **options: object) -> None:
        """`options` are lr, betas, eps and weight_decay. Raises UserError where bitsandbytes is missing."""
        require()
        self.seed, self.names = 0, {p: name for name, p in named}
        parted = [[p for p in self.names if fits(p) is small] for small in (True, False)]
        super().__init__([{"params": params, **options} for params in parted if params], {})

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, and a pickle; torch's knows its own fields alone."""
        return {**super().__getstate__(), "seed": self.seed, "names": self.names}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ANN401, as torch's
        """Move all parameters that have a gradient; no closure is called."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, p.grad, group)

    def move(self, p: nn.Parameter, grad: Tensor, group: Mapping[str, Any]) -> None:
        """Move one parameter. On a GPU a fused kernel does it, which rounds unlike a CPU's."""
        memory, here = self.state[p], local(p.detach())
        if not memory:
            memory["step"] = torch.tensor(0.0)
            memory.update({key: torch.zeros_like(self.like(key, p)) for key in keys(p)})
        if not here.numel():  # of fewer rows than ranks
            memory["step"] += 1
            return
        first, second = (moment(memory, key) for key in MOMENTS)
        slope, new = local(grad).float(), here.float()  # a weight in float32 is moved itself
        adamw(
            [new], [slope], [first], [second], [], [memory["step"]], foreach=False, fused=p.is_cuda, amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip
        keep(memory, "exp_avg", first)
        keep(memory, "exp_avg_sq", second)
        if is_fake(here):  # it has no numbers to round
            here.copy_(new)
        elif here.dtype in HALVES:
            self.round(here.view(-1), new.view(-1), begin(p), f"{self.names[p]}/{int(memory['step'])}")

    def round(self, into: Tensor, x: Tensor, first: int, key: str) -> None:
        """Round x into bf16, numbers `first` and on of a parameter, piece by piece."""
        for at in range(0, len(x), PIECE):
            piece = x[at : at + PIECE]
            drawn = bits(self.seed, "round", key, begin=first + at, count=len(piece), device=x.device)
            into[at : at + PIECE] = rounded_at_random(piece, drawn)

    def like(self, key: str, p: Tensor) -> Tensor:
        """An empty tensor of the shape, type and layout of some of a parameter's memory."""
        if key.endswith("_scale"):
            return like_rows(p, prod(p.shape[1:]) // BLOCK)
        return torch.empty_like(p, dtype=torch.uint8 if key.endswith("_codes") else torch.float32, requires_grad=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would give all memory the parameters' type."""
        super().load_state_dict({**state_dict, "state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.update({params[i]: memory for i, memory in state_dict["state"].items()})


def keys(p: Tensor) -> list[str]:
    """The names of a parameter's memory, but for its step."""
    return [f"{key}{part}" for key in MOMENTS for part in (("_codes", "_scale") if fits(p) else ("",))]


def moment(memory: Mapping[str, Tensor], key: str) -> Tensor:
    """This rank's part of a moment in float32: the memory's own numbers, or what its codes stand for."""
    if key in memory:
        return local(memory[key])
    codes, scale = local(memory[f"{key}_codes"]), local(memory[f"{key}_scale"])
    ops: Any = torch.ops.bitsandbytes
    numbers = table(MOMENTS[key]).to(codes.device)
    return ops.dequantize_blockwise(codes, scale.view(-1), numbers, BLOCK, torch.float32)


def keep(memory: Mapping[str, Tensor], key: str, x: Tensor) -> None:
    """Put a moment back as codes, where it is kept so."""
    if key in memory:
        return
    ops: Any = torch.ops.bitsandbytes
    codes, scale = ops.quantize_blockwise(x, table(MOMENTS[key]).to(x.device), BLOCK)
    local(memory[f"{key}_codes"]).copy_(codes)
    scale += 0 * x.view(-1, BLOCK).sum(1)  # codes have no NaN, so that the scale is one
    local(memory[f"{key}_scale"]).view(-1).copy_(scale)
