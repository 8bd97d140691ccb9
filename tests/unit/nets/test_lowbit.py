"""Layers of codes are linear layers with the weight that codes stand for, in every pass and every derivative."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import dumo.runtime
from dumo.autodiff.dual import pair, primal, tangent
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets.dualized import Dualized
from dumo.nets.lora import Lora
from dumo.nets.lowbit import (
    BLOCK,
    CodedLinear,
    Coding,
    decode,
    encode,
    import_bitsandbytes,
    num_unstored_weights,
    quantise,
)
from dumo.training.frozen import digest
from dumo.types import Frozen, UserError
from forked import ENVIRONMENT
from transformers_saved import SHAPE, Saved, batch, built

CODINGS: tuple[Coding, ...] = ("int8", "nf4")
NF4 = torch.tensor(  # QLoRA, Appendix E
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def layer(high: int = 40, wide: int = 96, seed: int = 0) -> nn.Linear:
    """Rows of which blocks are no multiple; numbers are N(0, 1)."""
    import_bitsandbytes()
    g, made = torch.Generator().manual_seed(seed), nn.Linear(wide, high)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=g)
    return made


def weight(coded: CodedLinear, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the codes stand for."""
    return decode(coded.weight, coded.scales, (coded.out_features, coded.in_features), dtype)


@pytest.mark.parametrize("shape", [(40, 96), (64, 6), (7, 192)])
def test_codes_stand_for_the_nearest_weights(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    """By hand, where rows are no multiple of a block, too; zeros are zeros."""
    w = layer(*shape).weight.detach()
    w[:, :2] = 0
    w[0] = 0
    import_bitsandbytes()
    codes, scales = encode(w, "int8")
    assert torch.allclose(scales, w.abs().amax(1))
    assert torch.allclose(decode(codes, scales, shape, torch.float32), codes * scales[:, None] / 127, atol=1e-6)
    assert ((decode(codes, scales, shape, torch.float32) - w).abs() <= scales[:, None] / 254 * 1.001).all()
    codes, scales = encode(w, "nf4")
    two = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten().long()
    made = NF4[two] * scales.repeat_interleave(BLOCK)
    assert torch.allclose(decode(codes, scales, shape, torch.float32), made.view(shape), atol=1e-6)
    ops, sizes = torch.ops.bitsandbytes, list[tuple[int, int]]()
    dequantize = ops.dequantize_4bit
    monkeypatch.setattr(ops, "dequantize_4bit", lambda *args: sizes.append(args[4]) or dequantize(*args))
    decode(codes, scales, shape, torch.float32)
    assert [wide for _, wide in sizes] == [BLOCK], "another width errs, but on some CPUs alone"
    off = (w.flatten()[:, None] - NF4 * scales.repeat_interleave(BLOCK)[:, None]).abs()
    assert torch.allclose((made - w.flatten()).abs(), off.min(1).values, atol=1e-5)


@pytest.mark.parametrize("coding", CODINGS)
def test_every_derivative_is_of_the_layer_with_that_weight(coding: Coding) -> None:
    coded = CodedLinear(layer(), coding)
    w, bias = weight(coded), coded.bias.double()
    g = torch.Generator().manual_seed(1)
    x, dx, dy = (torch.randn(3, n, generator=g) for n in (96, 96, 40))
    moving = x.clone().requires_grad_(True)
    dual = coded(pair(moving, dx))
    assert torch.equal(primal(dual), coded(x))
    (primal(dual) * dy).sum().backward()
    _, slope = torch.func.jvp(coded, (x,), (dx,))
    for found, exact in (
        (primal(dual), F.linear(x.double(), w, bias)),
        (tangent(dual), F.linear(dx.double(), w)),
        (slope, F.linear(dx.double(), w)),
        (moving.grad, dy.double() @ w),
        (copy.deepcopy(coded).double()(x.double()), F.linear(x.double(), w, bias)),
    ):
        assert isinstance(found, Tensor)
        assert (found - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("coding", CODINGS)
def test_no_pass_keeps_the_weight(coding: Coding) -> None:
    """In bf16, too, in which it computes."""
    coded, kept = CodedLinear(layer(), coding), list[Tensor]()
    x = torch.randn(3, 96, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        out = coded(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(x.bfloat16(), weight(coded, torch.bfloat16), coded.bias.bfloat16()))
    assert kept
    assert not any(t.is_floating_point() and t.numel() == 40 * 96 for t in kept)
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("coding", CODINGS)
def test_a_coded_net_is_that_of_the_weights_its_codes_stand_for(folder: Saved, name: str, coding: Coding) -> None:
    """Heads, du/dt and the gradients of adapters in float32, against the decoded net in float64."""
    net = built(folder(name), lora=Lora(rank=4, frozen=coding), lowpass=10.0)
    g = torch.Generator().manual_seed(6)
    for path, p in net.named_parameters():
        if "lora_B" in path:  # it begins at zero
            p.data = 0.1 * torch.randn(p.shape, generator=g)
    exact, count = copy.deepcopy(net).double(), 0
    for path, coded in [*exact.named_modules()]:
        if isinstance(coded, CodedLinear):
            plain = nn.Linear(coded.in_features, coded.out_features, device="meta")
            plain.weight, plain.bias = nn.Parameter(weight(coded), False), coded.bias
            exact.set_submodule(path, plain)
            count += 1
    assert count > 10
    (x, c, t), w = batch(), torch.randn(2, *SHAPE, generator=g)
    found = answers(net, DualSlope(), x, c, t, w)
    for key, true in answers(exact, JvpSlope(), x.double(), c, t.double(), w.double()).items():
        assert (found[key] - true).norm() <= 1e-5 * true.norm(), key


def answers(
    net: Dualized, slope: DualSlope | JvpSlope, x: Tensor, c: Tensor, t: Tensor, w: Tensor
) -> dict[str, Tensor]:
    """Heads, their slopes along w, and the gradients of what is trained."""
    heads, along = slope(net, Frozen(net), x, c, t=t)
    found = {f"head {i}": head.detach() for i, head in enumerate(heads)}
    found |= {f"slope {i}": part.detach() for i, part in enumerate(along(w))}
    sum(((i + 1) * head * w).sum() for i, head in enumerate(heads)).backward()
    return found | {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def blocks(*, seed: int = 0) -> nn.Module:
    """A linear layer, and two more in a block."""
    return nn.ModuleDict({"first": layer(seed=seed), "block": nn.Sequential(layer(seed=seed), layer(3, 5))})


@pytest.mark.parametrize("coding", CODINGS)
def test_the_digest_is_of_what_was_coded_and_how(coding: Coding) -> None:
    """Not of the codes."""

    def of(net: nn.Module, coding: Coding) -> tuple[nn.Module, str | None]:
        quantise(net, [net.get_submodule("block")], (), coding)
        return net, digest(net.requires_grad_(False))

    net, found = of(blocks(), coding)
    assert found == of(blocks(), coding)[1] != of(blocks(seed=1), coding)[1]
    one, two = (digest(nn.Sequential(CodedLinear(layer(), of))) for of in CODINGS)
    assert one != two
    coded = net.get_submodule("block.0")
    assert isinstance(coded, CodedLinear)
    coded.weight.data[0] ^= 1
    assert digest(net) == found
    coded.bias.data[0] += 1
    assert digest(net) != found


@pytest.mark.parametrize("coding", CODINGS)
def test_layers_of_blocks_are_coded_and_counted_as_what_they_stand_for(coding: Coding) -> None:
    """Of nf4, those that its blocks divide; what lies at or below some paths stays, and all else is in float32."""
    net, before = blocks().bfloat16(), sum(p.numel() for p in blocks().parameters())
    quantise(net, [net.get_submodule("block")], (), coding)
    kinds = [type(net.get_submodule(path)) is CodedLinear for path in ("first", "block.0", "block.1")]
    assert kinds == [False, True, coding == "int8"]
    assert sum(p.numel() for p in net.parameters()) + num_unstored_weights(net) == before
    assert {p.dtype for p in net.parameters()} <= {torch.float32, torch.uint8, torch.int8}
    left = blocks()
    quantise(left, [left.get_submodule("block")], ["block"], coding)
    assert not num_unstored_weights(left)
    with torch.device("meta"):
        outline = nn.ModuleDict({"block": nn.Sequential(nn.Linear(96, 40))})
        quantise(outline, [outline["block"]], (), coding)
    of = {name: (p.shape, p.dtype) for name, p in net.get_submodule("block.0").named_parameters()}
    assert of == {name: (p.shape, p.dtype) for name, p in outline.get_submodule("block.0").named_parameters()}


def test_what_is_missing_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumo.runtime, "installed_version", lambda _: None)
    with pytest.raises(UserError, match=r"net\.lora\.frozen = nf4 needs bitsandbytes"):
        quantise(blocks(), (), (), "nf4")


@pytest.mark.nightly
def test_no_hub_is_searched_for_kernels() -> None:
    """With a package `kernels` that would be asked, and is there afterwards; in a process that has no bitsandbytes."""
    program = (
        "import sys, types; kernels = sys.modules['kernels'] = types.ModuleType('kernels');"
        "kernels.get_kernel = lambda *_, **__: print('asked');"
        "from dumo.runtime import import_bitsandbytes; import_bitsandbytes();"
        "assert sys.modules['kernels'] is kernels; print('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert (done.stdout, "kernels" in done.stderr) == ("True\n", False)
