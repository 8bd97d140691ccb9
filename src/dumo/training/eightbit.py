"""AdamW with 8-bit moments (Dettmers et al. 2022) and stochastic rounding of bf16 weights.

`AdamW8bitOptimizer` runs torch's AdamW in float32, one parameter at a time. Between steps the moments are stored as
bitsandbytes codes with one scale per block of 256 numbers. These are plain tensors that are sharded like their
parameter, so checkpoints and sharding need no special cases. Blocks do not cross rows of a matrix, and ranks shard by
rows, so blocks and rounding are the same as on one process. The moments of vectors, of matrices whose rows are not
multiples of 256, and of parameters with fewer than 4096 numbers stay in float32.

A bf16 weight has 8 significant bits, and most updates are smaller than half of the last bit, so rounding to nearest
would not change the weight. Stochastic rounding is unbiased, so on average the weight changes as in float32 (Gupta et
al. 2015). The random numbers are a function of seed, step, parameter and position in the whole parameter.
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

# Numbers per scale, as in bitsandbytes. Dettmers et al. use 2048.
BLOCK = 256
# The minimum number of parameters for 8-bit moments, as in bitsandbytes.
_MIN_PARAMETER_SIZE = 4096
# Weights are rounded in pieces of this size to save memory.
_ROUNDED_AT_ONCE = 2**24
# Keys of torch's state, and whether the moment is signed.
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}


def has_8bit_moments(p: Tensor) -> bool:
    """Return whether a parameter has 8-bit moments."""
    return p.ndim > 1 and p.numel() >= _MIN_PARAMETER_SIZE and prod(p.shape[1:]) % BLOCK == 0


def _require() -> None:
    """Import bitsandbytes. Raise UserError if it is missing."""
    import_bitsandbytes()
    require("bitsandbytes", "quantised", "optimizer 'adamw8bit'")
    for signed in _MOMENTS.values():
        _code_values(signed, torch.device("cpu"))


@cache
def _code_values(signed: bool, device: torch.device) -> Tensor:
    """Return the unscaled values of the 256 codes, in [-1, 1] or [0, 1] (the dynamic map of Dettmers et al.).

    They are cached on the device, because a copy from the host would synchronize.
    """
    from bitsandbytes.functional import create_dynamic_map

    # Create real values, also inside a fake tensor mode.
    with torch.device("cpu"):
        values = create_dynamic_map(signed)
    return values.to(device)


class AdamW8bitOptimizer(torch.optim.Optimizer):
    """AdamW with 8-bit moments. bf16 parameters are rounded stochastically, keyed by `seed`."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], **options: object) -> None:
        """Create the optimizer; `options` are lr, betas, eps and weight_decay. Raise UserError without bitsandbytes."""
        _require()
        self.seed = 0  # `dumo.training.state.begin` sets the run's seed
        self.names = {p: name for name, p in named_parameters}
        groups: list[dict[str, Any]] = []
        for is_8bit in (True, False):
            params = [p for p in self.names if has_8bit_moments(p) is is_8bit]
            if params:
                groups.append({"params": params, **options})
        super().__init__(groups, {})

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields to copy or pickle. torch's method returns only its own."""
        return {**super().__getstate__(), "seed": self.seed, "names": self.names}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ANN401, as torch's
        """Update all parameters that have a gradient. The closure is not called."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update_parameter(p, p.grad, group)

    def _update_parameter(self, p: nn.Parameter, grad: Tensor, group: Mapping[str, Any]) -> None:
        """Update one parameter. On a GPU a fused kernel is used, which rounds differently from a CPU."""
        state = self.state[p]
        weight = local_tensor(p.detach())
        if not state:
            # Keep the step on the CPU, so that reading it does not synchronize.
            state["step"] = torch.tensor(0.0)
            for key in _state_keys(p):
                state[key] = torch.zeros_like(self.empty_state(key, p))
        # `adamw` adds 1 to its step.
        step = state["step"].clone()
        state["step"] += 1
        # A parameter with fewer rows than ranks is empty on some ranks.
        if not weight.numel():
            return
        if p.is_cuda:
            # The fused kernel reads the step on the GPU. Unlike a copy, a fill does not synchronize.
            step = torch.full((), step.item(), device=p.device)
        exp_avg = _float_moment(state, "exp_avg")
        exp_avg_sq = _float_moment(state, "exp_avg_sq")
        # For a float32 weight, this is the weight itself.
        new_weight = weight.float()
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
        # Fake tensors have no values to round.
        if is_fake(weight):
            weight.copy_(new_weight)
        elif weight.dtype in HALVES:
            key = f"{self.names[p]}/{int(state['step'])}"
            self._round_at_random(new_weight.view(-1), weight.view(-1), offset_on_rank(p), key)

    def _round_at_random(self, x: Tensor, out: Tensor, offset: int, key: str) -> None:
        """Round x (n,), which starts at index `offset` of a parameter, to bf16 in `out` (n,)."""
        for start in range(0, len(x), _ROUNDED_AT_ONCE):
            piece = x[start : start + _ROUNDED_AT_ONCE]
            random_bits = random_uint32(
                self.seed, "round", key, begin=offset + start, count=len(piece), device=x.device
            )
            out[start : start + _ROUNDED_AT_ONCE] = round_stochastically(piece, random_bits)

    def empty_state(self, key: str, p: Tensor) -> Tensor:
        """Return an empty tensor with the shape, dtype and layout of one entry of a parameter's state."""
        if key.endswith("_scale"):
            return empty_rows_like(p, prod(p.shape[1:]) // BLOCK)
        dtype = torch.uint8 if key.endswith("_codes") else torch.float32
        return torch.empty_like(p, dtype=dtype, requires_grad=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state and keep the dtypes. torch's method would cast all tensors to the parameters' dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.update({params[index]: state for index, state in state_dict["state"].items()})


def _state_keys(p: Tensor) -> list[str]:
    """Return the names of a parameter's state without the step."""
    if not has_8bit_moments(p):
        return [*_MOMENTS]
    keys: list[str] = []
    for moment in _MOMENTS:
        keys += [f"{moment}_codes", f"{moment}_scale"]
    return keys


def _float_moment(state: Mapping[str, Tensor], moment: str) -> Tensor:
    """Return this rank's part of a moment in float32: the tensor in the state, or its dequantized codes."""
    if moment in state:
        return local_tensor(state[moment])
    codes = local_tensor(state[f"{moment}_codes"])
    scale = local_tensor(state[f"{moment}_scale"])
    ops: Any = torch.ops.bitsandbytes
    values = _code_values(_MOMENTS[moment], codes.device)
    return ops.dequantize_blockwise(codes, scale.view(-1), values, BLOCK, torch.float32)


def _store_moment(state: Mapping[str, Tensor], moment: str, x: Tensor) -> None:
    """Quantize a moment, if the state contains codes."""
    if moment in state:
        return
    ops: Any = torch.ops.bitsandbytes
    codes, scale = ops.quantize_blockwise(x, _code_values(_MOMENTS[moment], x.device), BLOCK)
    local_tensor(state[f"{moment}_codes"]).copy_(codes)
    # Codes cannot be NaN, so store a NaN of the block in its scale.
    scale += 0 * x.view(-1, BLOCK).sum(1)
    local_tensor(state[f"{moment}_scale"]).view(-1).copy_(scale)
