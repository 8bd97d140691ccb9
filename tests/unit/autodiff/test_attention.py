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
from dumo.autodiff.attention import attend, recorded_tangent, tangent

MASKS = ["bool", "keys", "added", "added to keys", "causal"]
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


def masks(n: int, m: int) -> dict[str, tuple[Tensor | None, bool]]:
    """Masks and whether it is causal; some queries see no key."""
    g = torch.Generator().manual_seed(1)
    seen = torch.rand(2, n, m, generator=g) < 0.3
    seen[:, ::5] = False
    added = torch.randn(n, m, generator=g, dtype=torch.float64).masked_fill(~seen[0], -torch.inf)
    return {
        "bool": (seen, False),
        "keys": (seen[0, 1:2], False),
        "added": (added, False),
        "added to keys": (added[1:2], False),
        "causal": (None, True),
    }


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The plain formula, in which a softmax over nothing is zero."""
    s = q.shape[-1] ** -0.5 * q @ k.mT
    mask = torch.ones(s.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    p = (s - s.amax(-1, keepdim=True).clamp_min(-1e300)).exp()
    return p / p.sum(-1, keepdim=True).clamp_min(1e-300) @ v


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_part_of_the_scores(kind: str) -> None:
    x, (mask, causal) = draw(300, 40, 16, 24, heads=2), masks(300, 40)[kind]
    o, lse = attend(*x[:3], mask=mask, causal=causal)
    assert torch.equal(o, F.scaled_dot_product_attention(*x[:3], mask, is_causal=causal))
    out = tangent(*x, o, lse, mask=mask, causal=causal)
    value, exact = torch.func.jvp(lambda *x: masked(*x, mask, causal), tuple(x[:3]), tuple(x[3:]))
    assert torch.allclose(o, value, rtol=0, atol=1e-13)
    assert torch.allclose(out, exact, rtol=0, atol=1e-12)
    assert torch.allclose(recorded_tangent(*x, o, mask=mask, causal=causal), exact, rtol=0, atol=1e-12)
    if kind in ("bool", "added"):
        assert not o[..., ::5, :].any()
        assert not out[..., ::5, :].any()


@pytest.mark.parametrize("kind", MASKS)
def test_several_queries_share_a_key(kind: str) -> None:
    """As if each had a copy of it."""
    (mask, causal), all_heads, few = masks(20, 12)[kind], draw(20, 12, 8, 8, heads=4), draw(20, 12, 8, 8, heads=2)
    mask = mask.repeat_interleave(2, 0) if mask is not None and mask.ndim == 3 else mask
    q, dq, k, v, dk, dv = *all_heads[::3], *few[1:3], *few[4:]
    o, lse = attend(q, k, v, mask=mask, causal=causal, grouped=True)
    out = tangent(q, k, v, dq, dk, dv, o, lse, mask=mask, causal=causal)
    k, v, dk, dv = (y.repeat_interleave(2, 1) for y in (k, v, dk, dv))
    assert torch.allclose(out, tangent(q, k, v, dq, dk, dv, o, lse, mask=mask, causal=causal), rtol=0, atol=1e-14)


@pytest.mark.parametrize("small", ["q", "k and v"])
def test_operands_of_one_row_serve_the_whole_batch(small: str) -> None:
    """Learned queries are given once for all rows: as if each row had a copy."""
    q, k, v, dq, dk, dv = (torch.cat([y, y.roll(1, 2)]) for y in draw(20, 12, 8, 8, heads=2))
    if small == "q":
        q, dq = q[:1], dq[:1]
    else:
        k, v, dk, dv = k[:1], v[:1], dk[:1], dv[:1]
    o, lse = attend(q, k, v)
    exact = derivative((q, k, v), (dq, dk, dv), 8**-0.5)
    assert len(exact) > 1
    assert torch.allclose(tangent(q, k, v, dq, dk, dv, o, lse), exact, rtol=0, atol=1e-12)
    assert torch.allclose(recorded_tangent(q, k, v, dq, dk, dv, o), exact, rtol=0, atol=1e-12)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, ""), (torch.bfloat16, ""), (torch.float32, "bool"), (torch.bfloat16, "causal")]
)
def test_a_compiler_takes_it_whole(unchecked: ModuleType, dtype: torch.dtype, kind: str) -> None:
    x = draw(300, 40, 16, 16, heads=2, dtype=dtype)
    mask, causal = masks(300, 40).get(kind, (None, False))

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = unchecked.attend(*x[:3], mask=mask, causal=causal)
        return o, unchecked.tangent(*x, o, lse, mask=mask, causal=causal)

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


def high(tokens: int, dtype: torch.dtype, kind: str) -> int:
    """Bytes that a tangent needs besides its inputs."""
    with FakeTensorMode():
        x = [torch.empty(1, 2, tokens, 72, dtype=dtype) for _ in range(7)]
        given = {"bool": torch.ones(tokens, dtype=torch.bool), "added": torch.zeros(1, 1, tokens, dtype=dtype)}
        with High() as mode:
            tangent(*x, None, mask=given.get(kind), causal=kind == "causal")
    return mode.most


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "bool", "added", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_grow_with_the_tokens_not_their_square(dtype: torch.dtype, kind: str) -> None:
    few = high(256, dtype, kind)
    assert few > 2 * 2 * 256 * 256 * 4  # two blocks of scores, which a tangent cannot do without
    for times in (4, 16):
        assert high(256 * times, dtype, kind) <= 1.01 * times * few


def test_flash_attention_gives_its_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA would do, without CUDA: where torch chooses flash attention, its operator is called."""
    assert SDPBackend.FLASH_ATTENTION.value == attention.FLASH
    real = attention.aten
    flash, choice = real._scaled_dot_product_flash_attention, {"it": attention.FLASH}
    chooser = SimpleNamespace(
        _fused_sdp_choice=lambda q, k, v, scale: choice["it"], _scaled_dot_product_flash_attention=flash
    )
    monkeypatch.setattr(attention, "aten", chooser)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *how, **named: v)
    with FakeTensorMode():
        q, odd = (torch.empty(2, 3, 50, d, dtype=torch.bfloat16, device="cuda") for d in (24, 20))
        o, lse = attend(q, q, q)
        assert lse is not None
        assert (o.shape, lse.shape, lse.dtype) == (q.shape, (2, 3, 50), torch.float32)
        assert attend(odd, odd, odd)[1] is None
        assert attend(q, q, q, causal=True)[1] is None
        choice["it"] = SDPBackend.CUDNN_ATTENTION.value
        assert attend(q, q, q)[1] is None
