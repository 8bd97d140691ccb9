"""Frozen linear layers in reduced precision, for training adapters.

    bfloat16   16 bits       with bf16 autocast the outputs do not change by a bit
    int8       8 bits        one scale per output: W = scale * code / 127
    nf4        4.5 bits      one scale per 64 weights: W = scale * quantile[code] (QLoRA, arXiv 2305.14314)

1. `dumo.nets.lora` calls `store_in_bf16` or `quantise` when a network is built. They replace linear layers, in place,
   by `HalfLinear` or `CodedLinear`.
2. A pass of a `CodedLinear` decodes W, multiplies by it in the precision of the pass, and frees it. The backward pass
   decodes it again. Primal, tangent and gradient are therefore those of the linear layer with this W.
3. `num_unstored_weights` returns the number of weights that are not parameters, for estimates.

Activations are not quantised. bitsandbytes encodes and decodes the weights. Codes and scales are frozen parameters,
which FSDP2 shards like any other, and their names (`weight`, `scales`, `origin`) are the keys in checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.autodiff.cast import autocast_dtype
from dumo.autodiff.dual import carry, primal
from dumo.flow.precision import to_float32
from dumo.io import digest
from dumo.io.deferred import is_fake
from dumo.nets.heads import bias_or_none
from dumo.runtime import import_bitsandbytes, require
from dumo.types import Array

Coding = Literal["int8", "nf4"]
# The number of weights that share a scale in nf4 (QLoRA).
BLOCK = 64


class HalfLinear(nn.Linear):
    """A frozen layer with bf16 weights. Without autocast it computes in the dtype of its input."""

    # The dtype of the adapters that peft creates for this layer.
    compute_dtype = torch.float32

    def __init__(self, layer: nn.Linear) -> None:
        """Convert the layer's parameters to bf16; parameters that are bf16 already are shared."""
        super().__init__(layer.in_features, layer.out_features, bias_or_none(layer) is not None, device="meta")
        for name, p in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().bfloat16(), False))

    def forward(self, input: Array) -> Array:
        """Map input (..., in_features) to (..., out_features)."""
        if autocast_dtype(input.device.type) is not None:
            return super().forward(input)
        bias = bias_or_none(self)
        if bias is not None:
            bias = bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class CodedLinear(nn.Linear):
    """A frozen layer with quantised weights, and a bias in float32.

    weight: the codes.
    origin: a digest of the original weight and of the coding.
    """

    # The dtype of the adapters that peft creates for this layer.
    compute_dtype = torch.float32
    scales: nn.Parameter
    origin: nn.Parameter

    def __init__(self, layer: nn.Linear, coding: Coding) -> None:
        """Quantise the layer's weight, on its device."""
        weight = layer.weight.detach()
        bias = bias_or_none(layer)
        super().__init__(layer.in_features, layer.out_features, bias is not None, device="meta")
        self.coding: Coding = coding
        codes, scales = encode(weight, coding)
        self.weight = nn.Parameter(codes, False)
        self.scales = nn.Parameter(scales, False)
        if bias is not None:
            self.bias = nn.Parameter(to_float32(bias.detach()), False)
        self.origin = nn.Parameter(weight_digest(weight, coding), False)

    @property
    def num_unstored_weights(self) -> int:
        """The number of weights of the layer minus the number of stored values: codes, scales and digest."""
        num_stored = sum(p.numel() for p in (self.weight, self.scales, self.origin))
        return self.in_features * self.out_features - num_stored

    def forward(self, input: Array) -> Array:
        """Map input (..., in_features) to (..., out_features)."""
        x = primal(input)
        bias = bias_or_none(self)
        size = (self.out_features, self.in_features)
        out = _multiply(x, self.weight, self.scales, size, bias)
        # The JVP is the product without the bias.
        return carry(out, _multiply, (input,), self.weight, self.scales, size)


def _multiply(x: Tensor, codes: Tensor, scales: Tensor, size: tuple[int, int], bias: Tensor | None = None) -> Array:
    """Return x W^T + bias, (..., out), for x (..., in), in the dtype of autocast, or of x without autocast.

    size: of W, (out, in).
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x = x.to(dtype)
    if bias is not None:
        bias = bias.to(x.dtype)
    function = _Product if torch.compiler.is_compiling() else _ProductWithJvp
    return function.apply(x, codes, scales, size, bias)


class _Product(torch.autograd.Function):
    """The product x W^T + bias. It saves codes and scales for the backward pass instead of W."""

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scales: Tensor, size: tuple[int, int], bias: Tensor | None) -> Tensor:
        return F.linear(x, decode(codes, scales, size, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, torch's
        _, codes, scales, ctx.size, _ = inputs
        ctx.save_for_backward(codes, scales)
        ctx.save_for_forward(codes, scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = gradients
        codes, scales = ctx.saved_tensors
        x_gradient = gradient @ decode(codes, scales, ctx.size, gradient.dtype)
        return x_gradient, None, None, None, None


class _ProductWithJvp(_Product):
    """The product with a rule for torch.func.jvp, which torch.compile does not support."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # noqa: ANN401
        dx, *_, bias = tangents
        codes, scales = ctx.saved_tensors
        return F.linear(dx, decode(codes, scales, ctx.size, dx.dtype), bias)


def encode(weight: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of a weight (out, in), in the layout of bitsandbytes."""
    ops: Any = torch.ops.bitsandbytes
    if coding == "int8":
        return ops.int8_vectorwise_quant(weight)[:2]
    return ops.quantize_4bit(weight, BLOCK, coding, torch.uint8)


def decode(codes: Tensor, scales: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight, of `size` (out, in) and `dtype`, from codes and scales.

    The scales are float64 in a float64 network, but bitsandbytes needs float32.
    """
    ops: Any = torch.ops.bitsandbytes
    if codes.dtype == torch.int8:
        return ops.int8_vectorwise_dequant(codes, scales.float()).to(dtype)
    decoding_dtype = torch.float32 if dtype == torch.float64 else dtype
    # Decode as rows of BLOCK weights, because bitsandbytes 0.50 is wrong on some CPUs for other row lengths.
    blocks = (scales.numel(), BLOCK)
    weight = ops.dequantize_4bit(codes, scales.float(), BLOCK, "nf4", blocks, decoding_dtype)
    return weight.view(size).to(dtype)


def store_in_bf16(model: nn.Module, excluded: Sequence[str]) -> None:
    """Convert the linear layers of a model to bf16, in place, and all other parameters and buffers to float32.

    Layers at or below the paths `excluded` are converted to float32.
    """
    _replace_linear_layers(model, excluded, HalfLinear)


def quantise(model: nn.Module, blocks: Sequence[nn.Module], excluded: Sequence[str], coding: Coding) -> None:
    """Quantise the linear layers of a model's blocks, in place, and convert everything else to float32.

    Layers at or below the paths `excluded` are not quantised, and for nf4 neither are layers with a number of weights
    that is not a multiple of `BLOCK`. Raises UserError without bitsandbytes.
    """
    import_bitsandbytes()
    require("bitsandbytes", "quantised", f"net.lora.frozen = {coding}")
    layers_of_blocks = {id(layer) for block in blocks for layer in block.modules()}

    def code_layer(layer: nn.Linear) -> CodedLinear | None:
        if id(layer) not in layers_of_blocks:
            return None
        if coding == "nf4" and layer.weight.numel() % BLOCK != 0:
            return None
        return CodedLinear(layer, coding)

    _replace_linear_layers(model, excluded, code_layer)


def num_unstored_weights(net: nn.Module) -> int:
    """Return the number of weights of a network minus the number of stored values in its quantised layers."""
    return sum(layer.num_unstored_weights for layer in net.modules() if isinstance(layer, CodedLinear))


def _replace_linear_layers(
    model: nn.Module, excluded: Sequence[str], make_layer: Callable[[nn.Linear], nn.Linear | None]
) -> None:
    """Replace linear layers by the result of `make_layer`, unless it is None, and convert the rest to float32.

    Layers at or below the paths `excluded` are not replaced.
    """
    excluded_prefixes = tuple(f"{path}." for path in excluded)
    for path, layer in [*model.named_modules()]:
        if not isinstance(layer, nn.Linear) or f"{path}.".startswith(excluded_prefixes):
            continue
        new_layer = make_layer(layer)
        if new_layer is not None:
            model.set_submodule(path, new_layer)
    for layer in model.modules():
        if type(layer) is HalfLinear:
            continue
        for x in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            x.data = to_float32(x.data)


def weight_digest(weight: Tensor, coding: Coding) -> Tensor:
    """Return a SHA-256 of a weight and its coding, (32,), for a run's digest of its frozen weights.

    For a weight on the meta device or a fake tensor, it has no values.
    """
    if weight.is_meta or is_fake(weight):
        return torch.empty(32, dtype=torch.uint8, device=weight.device)
    sha256 = digest.of_samples({coding: weight})
    return torch.tensor([*bytes.fromhex(sha256)], dtype=torch.uint8)
