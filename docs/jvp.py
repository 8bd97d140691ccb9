"""du/dt of a MeanFlow step by `torch.func.jvp` and `dumo.jvp`, in the settings that people train in: docs/jvp.md.

    python docs/jvp.py                                  # one process
    torchrun --nproc-per-node 2 docs/jvp.py             # with rows for several

A cell is the relative error of du/dt beside a float64 difference, where two steps ran and every weight has a gradient;
else the error that was raised.
"""

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dumo

WIDTH, TOKENS, CHANNELS, BATCH = 32, 8, 4, 4
Jvp = Callable[..., tuple[Any, Any]]


class Block(nn.Module):
    """A residual layer: attention, or a perceptron."""

    def __init__(self, kind: str, *, lean: bool) -> None:
        super().__init__()
        self.kind = kind
        self.lean = lean  # checkpointed
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        if kind == "multihead":
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        else:
            self.into = nn.Linear(WIDTH, WIDTH if kind == "perceptron" else 3 * WIDTH)

    def body(self, h: Tensor) -> Tensor:
        z = self.norm(h)
        if self.kind == "perceptron":
            mixed = F.silu(self.into(z))
        elif self.kind == "multihead":
            mixed = self.attention(z, z, z, need_weights=False)[0]
        else:
            q, k, v = self.into(z).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal")
            mixed = heads.transpose(1, 2).flatten(2)
        return h + self.out(mixed)

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self.body, h, use_reentrant=False) if self.lean else self.body(h)


class Net(nn.Module):
    """u(x_t, t) with r = 0: x (b, tokens, channels) and t (b,) in."""

    def __init__(self, kind: str, *, lean: bool = False) -> None:
        super().__init__()
        self.x = nn.Linear(CHANNELS, WIDTH)
        self.t = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block(kind, lean=lean) for _ in range(2))
        self.u = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.x(x) + self.t(t[:, None])[:, None]
        for block in self.blocks:
            h = block(h)
        return self.u(h)


@torch.no_grad()
def difference(net: nn.Module, x: Tensor, t: Tensor, v: Tensor, h: float = 1e-6) -> Tensor:
    """du/dt in float64."""
    exact = copy.deepcopy(net).double()
    x, t, v = x.double(), t.double(), v.double()
    return (exact(x + h * v, t + h) - exact(x - h * v, t - h)) / (2 * h)


def meanflow_step(jvp: Jvp, net: nn.Module, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """A MeanFlow step with r = 0, but for the optimizer: u is regressed on v - t du/dt. Returns du/dt."""
    net.zero_grad()
    u, du_dt = jvp(net, (x, t), (v, torch.ones_like(t)))
    target = (v - t[:, None, None] * du_dt).detach()
    (u - target).square().mean().backward()
    if any(p.grad is None for p in net.parameters()):
        raise RuntimeError("a weight has no gradient")
    return du_dt.detach()


def cell(jvp: Jvp, kind: str, wrap: Callable[[Net], nn.Module], *, lean: bool, bf16: bool) -> str:
    """What comes of two steps."""
    torch.manual_seed(0)
    net = Net(kind, lean=lean)
    rank = dist.get_rank() if dist.is_initialized() else 0
    g = torch.Generator().manual_seed(rank)
    x, v = torch.randn(2, BATCH, TOKENS, CHANNELS, generator=g)
    t = torch.rand(BATCH, generator=g)
    exact = difference(net, x, t, v)
    wrapped = wrap(net)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for step in ("first", "second"):
            try:
                du_dt = meanflow_step(jvp, wrapped, x, t, v)
            except Exception as error:  # whatever torch raises is what the table shows
                return f"{type(error).__name__}, {step} step"
    return f"{float((du_dt.double() - exact).norm() / exact.norm()):.0e}"


def compiled(net: Net) -> nn.Module:
    """By a compiler without code generation, which takes a second."""
    return torch.compile(net, backend="aot_eager")


def sharded(net: Net) -> nn.Module:
    """By FSDP2, block by block."""
    for block in net.blocks:
        fully_shard(block)
    return fully_shard(net)


def rows() -> list[tuple[str, str, Callable[[Net], nn.Module], bool, bool]]:
    """A setting's name, its blocks, how the net is wrapped, whether blocks are checkpointed, whether in bf16."""

    def plain(net: Net) -> nn.Module:
        return net

    settings: list[tuple[str, str, Callable[[Net], nn.Module], bool, bool]] = [
        ("perceptron", "perceptron", plain, False, False),
        ("attention (SDPA)", "attention", plain, False, False),
        ("causal attention", "causal", plain, False, False),
        ("`nn.MultiheadAttention`", "multihead", plain, False, False),
        ("checkpointing", "perceptron", plain, True, False),
        ("checkpointing, attention", "attention", plain, True, False),
        ("`torch.compile`, attention", "attention", compiled, False, False),
        ("bf16 autocast, attention", "attention", plain, False, True),
    ]
    if dist.is_initialized():
        settings += [
            ("DDP", "perceptron", DistributedDataParallel, False, False),
            ("DDP, attention", "attention", DistributedDataParallel, False, False),
            ("FSDP2", "perceptron", sharded, False, False),
            ("FSDP2, attention, checkpointing", "attention", sharded, True, False),
        ]
    return settings


def unfused_jvp(net: nn.Module, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """torch's, with attention by its formula, whose scores are whole in memory."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(net, primals, tangents)  # pyright: ignore[reportReturnType], as if it had a third result


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("| setting | `torch.func.jvp` | in `sdpa_kernel(MATH)` | `dumo.jvp` |\n|---|---|---|---|")
    for name, kind, wrap, lean, bf16 in rows():
        cells = [cell(jvp, kind, wrap, lean=lean, bf16=bf16) for jvp in (torch.func.jvp, unfused_jvp, dumo.jvp)]
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
