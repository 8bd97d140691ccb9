"""Frozen linear layers in fewer bits than 32, under adapters that are trained.

    bfloat16   16 bits       where passes compute in bf16 they cast weights to it anyway, so no bit of an output changes
    int8       8 bits        a scale for each output: W = scale * code / 127
    nf4        4.5 bits      a scale for every 64 weights: W = scale * quantile[code] (QLoRA, arXiv 2305.14314)

The order of events:

1. `dumo.nets.lora` calls `store_in_bf16` or `quantise` when a net is made. They replace linear layers, in place, by
   `HalfLinear` or `CodedLinear`.
2. A pass of a `CodedLinear` decodes W, multiplies by it in the precision of the pass, and lets it go. The backward pass
   decodes it again. So primal, tangent and gradient are those of the linear layer with this W.
3. `num_unstored_weights` says how many more weights a net has than its parameters have numbers, for estimates.

Activations are not coded. Codes and scales are made and read by operators of bitsandbytes. They are frozen parameters,
which ranks shard as any other, and their names (`weight`, `scales`, `origin`) are those in checkpoints.
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
BLOCK = 64  # weights that share a scale in nf4 (QLoRA)


class HalfLinear(nn.Linear):
    """A frozen layer with bf16 weights. Without autocast it computes in the precision of its input."""

    compute_dtype = torch.float32  # peft reads it: the type of the adapters that it makes for this layer

    def __init__(self, layer: nn.Linear) -> None:
        """Copy the layer's parameters in bf16, which shares memory where they are bf16 already."""
        super().__init__(layer.in_features, layer.out_features, bias_or_none(layer) is not None, device="meta")
        for name, p in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().bfloat16(), False))

    def forward(self, input: Array) -> Array:
        """Take input (..., in_features), and return (..., out_features)."""
        if autocast_dtype(input.device.type) is not None:
            return super().forward(input)
        bias = bias_or_none(self)
        if bias is not None:
            bias = bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class CodedLinear(nn.Linear):
    """A frozen layer whose `weight` holds codes. Its bias is in float32.

    `origin` is a digest of the weight that was coded, and of the coding.
    """

    compute_dtype = torch.float32  # peft reads it: the type of the adapters that it makes for this layer
    scales: nn.Parameter
    origin: nn.Parameter

    def __init__(self, layer: nn.Linear, coding: Coding) -> None:
        """Code the layer's weight, on the device where it lies."""
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
        """The number of weights that the layer stands for, minus the numbers that it stores: codes, scales, digest."""
        num_stored = sum(p.numel() for p in (self.weight, self.scales, self.origin))
        return self.in_features * self.out_features - num_stored

    def forward(self, input: Array) -> Array:
        """Take input (..., in_features), and return (..., out_features)."""
        x = primal(input)
        bias = bias_or_none(self)
        size = (self.out_features, self.in_features)
        out = _multiply(x, self.weight, self.scales, size, bias)
        return carry(out, _multiply, (input,), self.weight, self.scales, size)  # a tangent has no bias


def _multiply(x: Tensor, codes: Tensor, scales: Tensor, size: tuple[int, int], bias: Tensor | None = None) -> Array:
    """Return x W^T + bias, (..., out), of x (..., in), in the precision of autocast, else of x.

    `size` is that of W, (out, in).
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x = x.to(dtype)
    if bias is not None:
        bias = bias.to(x.dtype)
    function = _Product if torch.compiler.is_compiling() else _ProductWithJvp
    return function.apply(x, codes, scales, size, bias)


class _Product(torch.autograd.Function):
    """The product x W^T + bias. It keeps codes and scales for the backward pass, where autograd would keep W."""

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
    """The product with a rule for torch.func.jvp. torch.compile refuses a function that has one."""

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
    """Return the weight, of `size` (out, in) and `dtype`, that codes and scales stand for.

    The scales are in float64 where the net is, and bitsandbytes takes float32.
    """
    ops: Any = torch.ops.bitsandbytes
    if codes.dtype == torch.int8:
        return ops.int8_vectorwise_dequant(codes, scales.float()).to(dtype)
    decoding_dtype = torch.float32 if dtype == torch.float64 else dtype
    blocks = (scales.numel(), BLOCK)  # on some CPUs bitsandbytes 0.50 errs where rows are no multiples of a block
    weight = ops.dequantize_4bit(codes, scales.float(), BLOCK, "nf4", blocks, decoding_dtype)
    return weight.view(size).to(dtype)


def store_in_bf16(model: nn.Module, excluded: Sequence[str]) -> None:
    """Put the linear layers of a model in bf16, in place, and all other parameters and buffers in float32.

    Layers at or below the paths `excluded` are put in float32, too.
    """
    _replace_linear_layers(model, excluded, HalfLinear)


def quantise(model: nn.Module, blocks: Sequence[nn.Module], excluded: Sequence[str], coding: Coding) -> None:
    """Code the linear layers of a model's blocks, in place, one after another, and put all else in float32.

    Layers at or below the paths `excluded` are not coded; nor are, for nf4, layers whose number of weights is no
    multiple of `BLOCK`. Raises UserError without bitsandbytes.
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
    """Return how many more weights a net has than numbers in its parameters, some of which are codes and scales."""
    return sum(layer.num_unstored_weights for layer in net.modules() if isinstance(layer, CodedLinear))


def _replace_linear_layers(
    model: nn.Module, excluded: Sequence[str], make_layer: Callable[[nn.Linear], nn.Linear | None]
) -> None:
    """Replace linear layers by what `make_layer` returns, unless it is None, and put all but bf16 layers in float32.

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
    """Return a SHA-256 of a weight and of its coding, (32,), which is part of a run's digest of its frozen weights.

    It is without values where the weight is.
    """
    if weight.is_meta or is_fake(weight):
        return torch.empty(32, dtype=torch.uint8, device=weight.device)
    sha256 = digest.of_samples({coding: weight})
    return torch.tensor([*bytes.fromhex(sha256)], dtype=torch.uint8)
