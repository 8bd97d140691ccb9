"""AdamW whose two moments take 8 bits each (Dettmers et al. 2022), and weights of 16 bits that are rounded at random.

`AdamW8bitOptimizer` is the optimizer; `_require` asks for bitsandbytes. A step is torch's, in float32, on one
parameter's moments at a time. Between steps bitsandbytes keeps them as codes, and a scale to each block of 256 numbers:
plain tensors, sharded as their parameter, so checkpoints, layouts and counts treat them as any other. A block never
crosses a row of a matrix, and ranks split a matrix by rows, so blocks and rounding are the same as on one process. The
moments of a vector, of a matrix whose rows are not whole blocks, and of fewer than 4096 numbers stay in float32.

A weight in bf16 has 8 significant bits, and most steps are less than half of the last one: rounded to the nearest, the
weight would not move. Rounded up or down at random, so that the mean is exact, it moves on average as a weight in
float32 does (Gupta et al. 2015). The random numbers are a function of seed, step, parameter and place in the whole.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dumo.flow.precision import HALVES, round_stochastically
from dumo.io.deferred import is_fake
from dumo.runtime import import_bitsandbytes, require
from dumo.runtime.random import random_uint32
from dumo.training.layout import empty_rows_like, local_tensor, offset_on_rank

BLOCK = 256  # numbers to a scale: bitsandbytes'; Dettmers et al.'s is 2048
_MIN_PARAMETER_SIZE = 4096  # numbers of a parameter whose moments take 8 bits: bitsandbytes'
_ROUNDED_AT_ONCE = 2**24  # numbers of a weight: ours, to save memory
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # keys of torch's state, and whether the moment has a sign


def has_8bit_moments(p: Tensor) -> bool:
    """Whether the moments of a parameter take 8 bits."""
    return p.ndim > 1 and p.numel() >= _MIN_PARAMETER_SIZE and prod(p.shape[1:]) % BLOCK == 0


def _require() -> None:
    """Import bitsandbytes. Raises UserError without it."""
    import_bitsandbytes()
    require("bitsandbytes", "quantised", "optimizer 'adamw8bit'")
    for signed in _MOMENTS.values():
        _code_values(signed, torch.device("cpu"))


@cache
def _code_values(signed: bool, device: torch.device) -> Tensor:
    """Return the values of the 256 codes before scaling, in [-1, 1] or [0, 1]: Dettmers et al.'s dynamic map.

    They stay on the device, because each copy from the host would wait for the GPU.
    """
    from bitsandbytes.functional import create_dynamic_map

    # Create real values, also inside a fake tensor mode.
    with torch.device("cpu"):
        values = create_dynamic_map(signed)
    return values.to(device)


class AdamW8bitOptimizer(torch.optim.Optimizer):
    """AdamW with moments of 8 bits; parameters in bf16 are rounded at random, keyed by `seed`."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], **options: object) -> None:
        """`options` are lr, betas, eps and weight_decay. Raises UserError without bitsandbytes."""
        _require()
        self.seed = 0  # `dumo.training.state.begin` sets the run's
        self.names = {p: name for name, p in named_parameters}
        groups: list[dict[str, Any]] = []
        for is_8bit in (True, False):
            params = [p for p in self.names if has_8bit_moments(p) is is_8bit]
            if params:
                groups.append({"params": params, **options})
        super().__init__(groups, {})

    def __getstate__(self) -> dict[str, Any]:
        """The fields of a copy and a pickle: torch's method has its own fields alone."""
        return {**super().__getstate__(), "seed": self.seed, "names": self.names}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ANN401, as torch's
        """Move all parameters that have a gradient; no closure is called."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update_parameter(p, p.grad, group)

    def _update_parameter(self, p: nn.Parameter, grad: Tensor, group: Mapping[str, Any]) -> None:
        """Move one parameter. On a GPU a fused kernel does it, which rounds unlike a CPU's."""
        state = self.state[p]
        weight = local_tensor(p.detach())
        if not state:
            state["step"] = torch.tensor(0.0)  # on the CPU, where reading it waits for no GPU
            for key in _state_keys(p):
                state[key] = torch.zeros_like(self.empty_state(key, p))
        step = state["step"].clone()  # before this update; `adamw` adds 1 to it
        state["step"] += 1
        if not weight.numel():  # a parameter with fewer rows than ranks
            return
        if p.is_cuda:
            # The fused kernel reads the step on the GPU. A fill does not wait for it, as a copy would.
            step = torch.full((), step.item(), device=p.device)
        exp_avg = _float_moment(state, "exp_avg")
        exp_avg_sq = _float_moment(state, "exp_avg_sq")
        new_weight = weight.float()  # the weight itself if it is in float32
        beta1, beta2 = group["betas"]
        adamw(
            [new_weight],
            [local_tensor(grad).float()],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            foreach=False,
            fused=p.is_cuda,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        _store_moment(state, "exp_avg", exp_avg)
        _store_moment(state, "exp_avg_sq", exp_avg_sq)
        if is_fake(weight):  # it has no values to round
            weight.copy_(new_weight)
        elif weight.dtype in HALVES:
            key = f"{self.names[p]}/{int(state['step'])}"
            self._round_at_random(new_weight.view(-1), weight.view(-1), offset_on_rank(p), key)

    def _round_at_random(self, x: Tensor, out: Tensor, offset: int, key: str) -> None:
        """Round x (n,) to bf16 into `out` (n,): a part of a parameter, from its number `offset` on."""
        for start in range(0, len(x), _ROUNDED_AT_ONCE):
            piece = x[start : start + _ROUNDED_AT_ONCE]
            random_bits = random_uint32(
                self.seed, "round", key, begin=offset + start, count=len(piece), device=x.device
            )
            out[start : start + _ROUNDED_AT_ONCE] = round_stochastically(piece, random_bits)

    def empty_state(self, key: str, p: Tensor) -> Tensor:
        """An empty tensor of the shape, type and layout of one entry of a parameter's state."""
        if key.endswith("_scale"):
            return empty_rows_like(p, prod(p.shape[1:]) // BLOCK)
        dtype = torch.uint8 if key.endswith("_codes") else torch.float32
        return torch.empty_like(p, dtype=dtype, requires_grad=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, each tensor in its own type: torch's method would give all the parameters' type."""
        super().load_state_dict({**state_dict, "state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.update({params[index]: state for index, state in state_dict["state"].items()})


def _state_keys(p: Tensor) -> list[str]:
    """The names of a parameter's state, but for its step."""
    if not has_8bit_moments(p):
        return [*_MOMENTS]
    keys: list[str] = []
    for moment in _MOMENTS:
        keys += [f"{moment}_codes", f"{moment}_scale"]
    return keys


def _float_moment(state: Mapping[str, Tensor], moment: str) -> Tensor:
    """This rank's part of a moment in float32: the tensor in the state itself, or what its codes stand for."""
    if moment in state:
        return local_tensor(state[moment])
    codes = local_tensor(state[f"{moment}_codes"])
    scale = local_tensor(state[f"{moment}_scale"])
    ops: Any = torch.ops.bitsandbytes
    values = _code_values(_MOMENTS[moment], codes.device)
    return ops.dequantize_blockwise(codes, scale.view(-1), values, BLOCK, torch.float32)


def _store_moment(state: Mapping[str, Tensor], moment: str, x: Tensor) -> None:
    """Put a moment back as codes, where the state has codes."""
    if moment in state:
        return
    ops: Any = torch.ops.bitsandbytes
    codes, scale = ops.quantize_blockwise(x, _code_values(_MOMENTS[moment], x.device), BLOCK)
    local_tensor(state[f"{moment}_codes"]).copy_(codes)
    scale += 0 * x.view(-1, BLOCK).sum(1)  # codes cannot be NaN, so a NaN of the block goes into its scale
    local_tensor(state[f"{moment}_scale"]).view(-1).copy_(scale)
