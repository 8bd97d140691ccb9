"""Frozen linear layers in fewer bits than 32, under adapters that are trained.

    bfloat16   16 bits       where passes compute in bf16 they cast weights to it anyway, so no bit of an output changes
    int8       8 bits        of each output a scale: W = scale * code / 127
    nf4        4.5 bits      of every 64 numbers a scale: W = scale * quantile[code] (QLoRA, arXiv 2305.14314)

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
from dumo.io.deferred import derived
from dumo.nets.twin import bias_or_none
from dumo.runtime import import_bitsandbytes, install
from dumo.types import Array, UserError

Coding = Literal["int8", "nf4"]
BLOCK = 64  # numbers of a scale of nf4 (QLoRA)


class Half(nn.Linear):
    """A frozen layer with bf16 weights. Without autocast it computes in the precision of its input."""

    compute_dtype = torch.float32  # of the adapters that peft makes for it

    def __init__(self, layer: nn.Linear) -> None:
        """Takes over the layer's numbers, rounded where they are not bf16."""
        super().__init__(layer.in_features, layer.out_features, bias_or_none(layer) is not None, device="meta")
        for name, p in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().bfloat16(), False))

    def forward(self, input: Array) -> Array:
        """input (..., in_features)."""
        if autocast_dtype(input.device.type) is not None:
            return super().forward(input)
        bias = bias_or_none(self)
        return F.linear(input, self.weight.to(input.dtype), None if bias is None else bias.to(input.dtype))


class Coded(nn.Linear):
    """A frozen layer whose weight is codes, and `scales` of them; `origin` is a digest of what was coded, and how.

    Its bias is in float32.
    """

    compute_dtype = torch.float32  # as Half's
    scales: nn.Parameter
    origin: nn.Parameter

    def __init__(self, layer: nn.Linear, coding: Coding) -> None:
        """Codes the layer's weight, on the device where it lies."""
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
        """By how many numbers the weight is longer than what is there for it."""
        return self.in_features * self.out_features - sum(p.numel() for p in (self.weight, self.scales, self.origin))

    def forward(self, input: Array) -> Array:
        """input (..., in_features)."""
        x = primal(input)
        bias = bias_or_none(self)
        size = (self.out_features, self.in_features)
        out = product(x, self.weight, self.scales, size, bias)
        return carry(out, product, (input,), self.weight, self.scales, size)


def product(x: Tensor, codes: Tensor, scales: Tensor, size: tuple[int, int], bias: Tensor | None = None) -> Array:
    """x W^T + bias, in the precision of autocast, else of x (..., in)."""
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x = x.to(dtype)
    function = _Product if torch.compiler.is_compiling() else _Pushed
    return function.apply(x, codes, scales, size, None if bias is None else bias.to(x.dtype))


class _Product(torch.autograd.Function):
    """The product keeps codes and scales for the backward pass, where autograd would keep W."""

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
        (gradient,), (codes, scales) = gradients, ctx.saved_tensors
        return gradient @ decoded(codes, scales, ctx.size, gradient.dtype), None, None, None, None


class _Pushed(_Product):
    """The product with a rule for torch.func.jvp, with which a compiler refuses a function."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # noqa: ANN401
        (dx, *_, bias), (codes, scales) = tangents, ctx.saved_tensors
        return F.linear(dx, decoded(codes, scales, ctx.size, dx.dtype), bias)


def encode(weight: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight (out, in)."""
    ops: Any = torch.ops.bitsandbytes
    if coding == "int8":
        return ops.int8_vectorwise_quant(weight)[:2]
    return ops.quantize_4bit(weight, BLOCK, coding, torch.uint8)


def origin(weight: Tensor, coding: Coding) -> Tensor:
    """A SHA-256 of a weight, as the digest of what is frozen takes it, and of how it is coded; (32,)."""
    blank = torch.empty(32, dtype=torch.uint8, device=weight.device)
    return derived(
        lambda x: torch.tensor([*bytes.fromhex(digest.of_samples({coding: x}))], dtype=torch.uint8), weight, blank
    )


def decoded(codes: Tensor, scales: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of codes and scales; a net in float64 has its scales in it."""
    ops: Any = torch.ops.bitsandbytes
    if codes.dtype == torch.int8:
        return ops.int8_vectorwise_dequant(codes, scales.float()).to(dtype)
    made = torch.float32 if dtype == torch.float64 else dtype
    blocks = (scales.numel(), BLOCK)  # on some CPUs bitsandbytes 0.50 errs where rows are no multiples of a block
    return ops.dequantize_4bit(codes, scales.float(), BLOCK, "nf4", blocks, made).view(size).to(dtype)


def halve(model: nn.Module, without: Sequence[str]) -> None:
    """Keep a model's linear layers in bf16, in place; the rest, and all at or below the paths `without`, in float32."""
    _exchange(model, without, Half)


def quantise(model: nn.Module, blocks: Sequence[nn.Module], without: Sequence[str], coding: Coding) -> None:
    """Keep the linear layers of a model's blocks as codes, in place, one after another; the rest as `halve` does.

    Of nf4, layers that blocks of numbers do not divide stay in float32. Raises UserError where bitsandbytes is missing.
    """
    if not import_bitsandbytes():
        raise UserError(f"net.lora.frozen = {coding} needs bitsandbytes: {install('quantised')}")
    inside = {id(layer) for block in blocks for layer in block.modules()}

    def coded(layer: nn.Linear) -> Coded | None:
        divided = coding == "int8" or layer.weight.numel() % BLOCK == 0
        return Coded(layer, coding) if divided and id(layer) in inside else None

    _exchange(model, without, coded)


def saved(net: nn.Module) -> int:
    """By how many numbers the weights of a net are more than its parameters, some of which are codes and scales."""
    return sum(layer.saved for layer in net.modules() if isinstance(layer, Coded))


def _exchange(model: nn.Module, without: Sequence[str], make: Callable[[nn.Linear], nn.Linear | None]) -> None:
    """Put what `make` makes of it, if anything, where a linear layer is; set all but halved layers to float32.

    Nothing is made of layers at or below the paths `without`.
    """
    left = tuple(f"{path}." for path in without)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and not f"{name}.".startswith(left) and (new := make(layer)) is not None:
            model.set_submodule(name, new)
    for layer in model.modules():
        for x in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if type(layer) is not Half else ():
            x.data = to_float32(x.data)
