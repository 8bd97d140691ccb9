"""Frozen weights in bf16: the bits that float32 gives, what stays as it was, and whose memory they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transformers_tiny as tiny
from dumo.flow.draw import draw
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope
from dumo.nets import Pretrained
from dumo.nets.adapter import Half, Lora
from dumo.nets.dualized import Dualized
from dumo.objectives import DuMo
from dumo.run.config.load import load
from dumo.types import Frozen, Heads, Needs, UserError
from transformers_saved import CLASSES, IMAGES, SHAPE, batch, saved

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning"),  # diffusers', of its Chroma
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # torch's, of autocast on a CPU
]
QUICK = ("sd3", "flux", "sana-masked", "qwen")
SOME = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name in (*IMAGES, "wan", "ltx", "hunyuan-video")
]
Made = Callable[[str, torch.dtype], Pretrained]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Specs of tiny models with adapters, whose files hold linear layers in a dtype, and all else in float32."""

    def spec(name: str, dtype: torch.dtype) -> Pretrained:
        found = saved(tmp_path, name)
        model: Any = tiny.TINY[name].model()
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.to(dtype)
        model.save_pretrained(found.source)
        return found.model_copy(update={"lora": Lora(rank=4)})

    return spec


def built(spec: Pretrained, frozen: str) -> Dualized:
    """With adapters that say something."""
    assert spec.lora
    spec = spec.model_copy(update={"lora": spec.lora.model_copy(update={"frozen": frozen})})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        net = spec.build(Needs(heads=("v", "u")), SHAPE, CLASSES)
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    return net


def passed(net: Dualized, *, low: bool) -> Heads:
    """The heads, and those of the base; `low`: in bf16."""
    x, c, t = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        tuned = net(x, c, t=t)
        with net.base():
            return (*tuned, *net(x, c, t=t))


def gradient(net: Dualized) -> dict[str, Tensor]:
    """Of a step in bf16."""
    objective = DuMo(slope=DualSlope(), drop=0.1)
    x, c, _ = batch(4)
    b = draw(objective, Linear(), x, c, torch.full_like(c, CLASSES), seed=0, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(net.train(), Frozen(net), b).loss.mean()
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def same(one: Heads, other: Heads) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", SOME)
def test_a_pass_in_bf16_has_the_bits_of_float32_weights(made: Made, name: str) -> None:
    """Heads, base and gradients of a step, of every family."""
    whole, half = (built(made(name, torch.float32), frozen) for frozen in ("float32", "bfloat16"))
    assert same(passed(whole, low=True), passed(half, low=True))
    assert not same(passed(whole, low=False), passed(half, low=False))  # what is stored in more bits is rounded
    one, other = gradient(whole), gradient(half)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", SOME)
def test_what_is_stored_in_bf16_is_rounded_nowhere(made: Made, name: str) -> None:
    spec = made(name, torch.bfloat16)
    whole, half = (built(spec, frozen) for frozen in ("float32", "bfloat16"))
    assert same(passed(whole, low=False), passed(half, low=False))
    for name, p in half.named_parameters():
        rests = isinstance(half.get_submodule(name.rpartition(".")[0]), Half)
        assert p.dtype == (torch.bfloat16 if rests else torch.float32), name
        assert not (rests and p.requires_grad)
    assert all(b.dtype != torch.bfloat16 for b in half.buffers())
    merged = [net.stock("u", merged=True).state_dict() for net in (whole, half)]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(x, merged[1][name]) for name, x in merged[0].items())


def test_a_file_in_bf16_is_mapped_and_shared(made: Made) -> None:
    """Weights that rest lie in the file's own pages."""
    spec = made("sd3", torch.bfloat16)
    net = built(spec, "bfloat16")
    mine = [p.data_ptr() for p in net.parameters() if p.dtype == torch.bfloat16]
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0].split("-") for line in lines if spec.source in line]
    assert mine
    assert all(any(int(low, 16) <= at < int(high, 16) for low, high in places) for at in mine)


def test_weights_that_every_pass_would_cast_up_are_refused() -> None:
    words = ("net.kind=diffusers", "net.source=sd3-digits", "net.lora.frozen=bfloat16")
    assert load("digits", (*words, "train.precision=bf16"))
    with pytest.raises(UserError, match=r"train\.precision=bf16"):
        load("digits", words)
