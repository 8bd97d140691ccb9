"""Attention is torch's, its tangent is the derivative, and no more memory is taken than a few rows of scores."""

import sys
import weakref
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dumo.autodiff import attention
from dumo.autodiff.attention import attend, tangent

GIVEN = [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)]


def draw(n: int, m: int, d: int, e: int, heads: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and their tangents, laid out as nets make them: (b, n, h, d) seen as (b, h, n, d)."""
    g = torch.Generator().manual_seed(0)
    shapes = ((n, d), (m, d), (m, e))
    return [torch.randn(1, s, heads, w, generator=g).to(dtype).transpose(1, 2) for s, w in (*shapes, *shapes)]


def derivative(x: Sequence[Tensor], along: Sequence[Tensor], scale: float) -> Tensor:
    """Of the plain formula, by forward differentiation in float64."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scale * q @ k.mT).softmax(-1) @ v

    return torch.func.jvp(plain, tuple(y.double() for y in x), tuple(y.double() for y in along))[1]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("d", [64, 72, 128])
@pytest.mark.parametrize("n", [256, 1024, 4096])
def test_the_tangent_is_the_derivative(n: int, d: int) -> None:
    x = draw(n, n if n < 4096 else 512, d, d)  # one way is long enough: the derivative itself takes n m numbers
    o, lse = attend(*x[:3])
    assert relative(tangent(*x, o, lse), derivative(x[:3], x[3:], d**-0.5)) <= 1e-12


def test_4096_tokens_see_4096_tokens() -> None:
    x = draw(4096, 4096, 8, 8)
    assert relative(tangent(*x, *attend(*x[:3])), derivative(x[:3], x[3:], 8**-0.5)) <= 1e-12


@pytest.mark.parametrize("given", GIVEN)
def test_what_is_none_does_not_move(given: tuple[bool, ...]) -> None:
    x = draw(300, 40, 16, 24, heads=2)
    moved = [y if on else None for y, on in zip(x[3:], given, strict=True)]
    o, lse = attend(*x[:3], 0.3)
    with FlopCounterMode(display=False) as counter:
        out = tangent(*x[:3], *moved, o, lse, 0.3)
    exact = derivative(x[:3], [y * on for y, on in zip(x[3:], given, strict=True)], 0.3)
    assert torch.allclose(out, exact, rtol=0, atol=1e-13)
    keys, values = any(given) + given[0] + given[1], given[2] + (given[0] or given[1])
    assert counter.get_total_flops() == 2 * 2 * 300 * 40 * (keys * 16 + values * 24)


@pytest.mark.parametrize("std", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_halves_are_exact(dtype: torch.dtype, std: int) -> None:
    x = draw(256, 256, 72, 72, dtype=dtype)
    x[0] = std * x[0]
    o, lse = attend(*x[:3])
    out = tangent(*x, o, lse)
    assert out.dtype == dtype
    assert relative(out.double(), derivative(x[:3], x[3:], 72**-0.5)) <= 0.01


def test_the_tangent_is_laid_out_as_the_primal() -> None:
    x = draw(300, 40, 16, 16, heads=2)
    o, lse = attend(*x[:3])
    assert tangent(*x, o, lse).stride() == o.stride() != o.contiguous().stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_is_that_of_torch_to_the_bit(dtype: torch.dtype) -> None:
    ours, theirs = ([y.requires_grad_() for y in draw(100, 40, 24, 24, 2, dtype)[:3]] for _ in range(2))
    o, lse = attend(*ours, 0.3)
    reference = F.scaled_dot_product_attention(*theirs, scale=0.3)
    assert lse is None  # the kernels of a CPU keep it
    assert torch.equal(o, reference)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x) for y, x in ((o, ours), (reference, theirs)))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_no_gradient_is_recorded() -> None:
    x = [y.requires_grad_() for y in draw(10, 10, 8, 8)]
    assert not tangent(*x, *attend(*x[:3])).requires_grad


def test_autocast_is_for_the_primal_alone() -> None:
    x = draw(64, 64, 16, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o, lse = attend(*x[:3])
        out = tangent(*x, o, lse)
    halves = [y.bfloat16() for y in x]
    assert o.dtype == out.dtype == torch.bfloat16
    assert torch.equal(out, tangent(*halves, o, lse))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module without the checks of shapes that tests add: a compiler cannot trace those."""
    spec = spec_from_file_location("unchecked", attention.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "unchecked", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_takes_it_whole(unchecked: ModuleType, dtype: torch.dtype) -> None:
    x = draw(300, 40, 16, 16, heads=2, dtype=dtype)

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = unchecked.attend(*x[:3])
        return o, unchecked.tangent(*x, o, lse)

    for a, b in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(*x), both(*x), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_shapes_are_known_without_numbers() -> None:
    x = [y.to("meta") for y in draw(300, 40, 16, 24, heads=2, dtype=torch.bfloat16)]
    assert tangent(*x, *attend(*x[:3])).shape == (1, 2, 300, 24)


class High(TorchDispatchMode):
    """The most bytes that tensors made inside hold at one time."""

    live = most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and not hasattr(storage := x.untyped_storage(), "seen"):
                storage.seen = True  # pyright: ignore[reportAttributeAccessIssue]
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size: int) -> None:
        self.live -= size


def high(tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a tangent needs besides its inputs."""
    with FakeTensorMode():
        x = [torch.empty(1, 2, tokens, 72, dtype=dtype) for _ in range(7)]
        with High() as mode:
            tangent(*x, None)
    return mode.most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_grow_with_the_tokens_not_their_square(dtype: torch.dtype) -> None:
    few = high(256, dtype)
    assert few > 2 * 2 * 256 * 256 * 4  # two blocks of scores, which a tangent cannot do without
    for times in (4, 16):
        assert high(256 * times, dtype) <= 1.01 * times * few


def test_flash_attention_gives_its_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA would do, without CUDA: where torch chooses flash attention, its operator is called."""
    assert SDPBackend.FLASH_ATTENTION.value == attention.FLASH
    real = attention.aten
    flash, choice = real._scaled_dot_product_flash_attention, {"it": attention.FLASH}
    chooser = SimpleNamespace(
        _fused_sdp_choice=lambda q, k, v, scale: choice["it"], _scaled_dot_product_flash_attention=flash
    )
    monkeypatch.setattr(attention, "aten", chooser)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, scale: v)
    with FakeTensorMode():
        q, odd = (torch.empty(2, 3, 50, d, dtype=torch.bfloat16, device="cuda") for d in (24, 20))
        o, lse = attend(q, q, q)
        assert lse is not None
        assert (o.shape, lse.shape, lse.dtype) == (q.shape, (2, 3, 50), torch.float32)
        assert attend(odd, odd, odd)[1] is None
        choice["it"] = SDPBackend.CUDNN_ATTENTION.value
        assert attend(q, q, q)[1] is None
