"""Frozen linear layers in fewer bits than 32, under adapters that are trained.

    bfloat16   16 bits       where passes compute in bf16 they cast weights to it anyway, so no bit of an output changes
    int8       8 bits        of each output a scale: W = scale * code / 127
    nf4        4.5 bits      of every 64 numbers a scale: W = scale * quantile[code] (QLoRA, arXiv 2305.14314)

`dumo.nets.adapter` calls `halve` or `quantise` when a net is made: they replace linear layers by `HalfLinear` or
`CodedLinear`. `saved` says by how much the parameters of a net are fewer than its weights.

Codes are of weights alone: a pass makes W of a layer, multiplies by it in the precision of the pass and lets it go, and
the backward pass makes it again. So primal, tangent and gradient are those of the linear layer with this W. Codes and
scales come and go by operators of bitsandbytes. They are frozen parameters, which ranks share as any other.
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
from dumo.io.deferred import apply_later
from dumo.nets.twin import bias_or_none
from dumo.runtime import import_bitsandbytes, install_command
from dumo.types import Array, UserError

Coding = Literal["int8", "nf4"]
BLOCK = 64  # the numbers that share a scale in nf4 (QLoRA)


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
    """A frozen layer whose weight is codes, with `scales`. Its bias is in float32.

    `origin` is a digest of the weight that was coded, and of how.
    """

    compute_dtype = torch.float32  # peft reads it: the type of the adapters that it makes for this layer
    scales: nn.Parameter
    origin: nn.Parameter

    def __init__(self, layer: nn.Linear, coding: Coding) -> None:
        """Code the layer's weight, on the device where it lies."""
        weight = layer.weight.detach()
        bias = bias_or_none(layer)
        super().__init__(layer.in_features, layer.out_features, bias is not None, device="meta")
        codes, scales = encode(weight, coding)
        self.weight = nn.Parameter(codes, False)
        self.scales = nn.Parameter(scales, False)
        if bias is not None:
            self.bias = nn.Parameter(to_float32(bias.detach()), False)
        self.origin = nn.Parameter(origin(weight, coding), False)

    @property
    def saved(self) -> int:
        """The numbers of the weight, less those of codes, scales and origin."""
        stored = sum(p.numel() for p in (self.weight, self.scales, self.origin))
        return self.in_features * self.out_features - stored

    def forward(self, input: Array) -> Array:
        """Take input (..., in_features), and return (..., out_features)."""
        x = primal(input)
        bias = bias_or_none(self)
        size = (self.out_features, self.in_features)
        out = _multiply(x, self.weight, self.scales, size, bias)
        return carry(out, _multiply, (input,), self.weight, self.scales, size)  # a tangent has no bias


def _multiply(x: Tensor, codes: Tensor, scales: Tensor, size: tuple[int, int], bias: Tensor | None = None) -> Array:
    """Return x W^T + bias, in the precision of autocast, else of x (..., in). W has `size`, (out, in)."""
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
        return F.linear(x, decoded(codes, scales, size, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, torch's
        _, codes, scales, ctx.size, _ = inputs
        ctx.save_for_backward(codes, scales)
        ctx.save_for_forward(codes, scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = gradients
        codes, scales = ctx.saved_tensors
        x_gradient = gradient @ decoded(codes, scales, ctx.size, gradient.dtype)
        return x_gradient, None, None, None, None


class _ProductWithJvp(_Product):
    """The product with a rule for torch.func.jvp. torch.compile refuses a function that has one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # noqa: ANN401
        dx, *_, bias = tangents
        codes, scales = ctx.saved_tensors
        return F.linear(dx, decoded(codes, scales, ctx.size, dx.dtype), bias)


def encode(weight: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of a weight (out, in), in the layout of bitsandbytes."""
    ops: Any = torch.ops.bitsandbytes
    if coding == "int8":
        return ops.int8_vectorwise_quant(weight)[:2]
    return ops.quantize_4bit(weight, BLOCK, coding, torch.uint8)


def origin(weight: Tensor, coding: Coding) -> Tensor:
    """Return a SHA-256 of a weight and of how it is coded, (32,). A run's digest of its frozen weights takes it."""

    def hash_weight(x: Tensor) -> Tensor:
        sha256 = digest.of_samples({coding: x})
        return torch.tensor([*bytes.fromhex(sha256)], dtype=torch.uint8)

    outline = torch.empty(32, dtype=torch.uint8, device=weight.device)
    return apply_later(hash_weight, weight, outline)


def decoded(codes: Tensor, scales: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight, of `size` (out, in), that codes and scales stand for.

    The scales are in float64 where the net is.
    """
    ops: Any = torch.ops.bitsandbytes
    if codes.dtype == torch.int8:
        return ops.int8_vectorwise_dequant(codes, scales.float()).to(dtype)
    decoding_dtype = torch.float32 if dtype == torch.float64 else dtype
    blocks = (scales.numel(), BLOCK)  # on some CPUs bitsandbytes 0.50 errs where rows are no multiples of a block
    return ops.dequantize_4bit(codes, scales.float(), BLOCK, "nf4", blocks, decoding_dtype).view(size).to(dtype)


def halve(model: nn.Module, without: Sequence[str]) -> None:
    """Put a model's linear layers in bf16, in place; the rest, and all at or below the paths `without`, in float32."""
    _exchange(model, without, HalfLinear)


def quantise(model: nn.Module, blocks: Sequence[nn.Module], without: Sequence[str], coding: Coding) -> None:
    """Code the linear layers of a model's blocks, in place, one after another.

    The rest, and all at or below the paths `without`, is put in float32; so are, for nf4, layers whose numbers are no
    multiple of `BLOCK`. Raises UserError where bitsandbytes is missing.
    """
    if not import_bitsandbytes():
        raise UserError(f"net.lora.frozen = {coding} needs bitsandbytes: {install_command('quantised')}")
    inside = {id(layer) for block in blocks for layer in block.modules()}

    def code(layer: nn.Linear) -> CodedLinear | None:
        if id(layer) not in inside:
            return None
        if coding == "nf4" and layer.weight.numel() % BLOCK != 0:
            return None
        return CodedLinear(layer, coding)

    _exchange(model, without, code)


def saved(net: nn.Module) -> int:
    """Return the numbers of a net's weights, less those of its parameters, some of which are codes and scales."""
    return sum(layer.saved for layer in net.modules() if isinstance(layer, CodedLinear))


def _exchange(model: nn.Module, without: Sequence[str], make: Callable[[nn.Linear], nn.Linear | None]) -> None:
    """Replace linear layers by what `make` returns, unless it is None, and put all but halved layers in float32.

    Layers at or below the paths `without` are not replaced.
    """
    prefixes = tuple(f"{path}." for path in without)
    for name, layer in [*model.named_modules()]:
        if not isinstance(layer, nn.Linear) or f"{name}.".startswith(prefixes):
            continue
        new_layer = make(layer)
        if new_layer is not None:
            model.set_submodule(name, new_layer)
    for layer in model.modules():
        if type(layer) is HalfLinear:
            continue
        for x in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            x.data = to_float32(x.data)
