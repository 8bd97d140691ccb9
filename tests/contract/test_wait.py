"""No loss waits for its device: what decides on its passes is known by place, or was drawn on the CPU.

The device is `meta`, which has no numbers: whoever asks it for one fails.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contract.case import name, nets, one_each
from dumo.flow import module
from dumo.flow.guide import Guide, Interval
from dumo.flow.noisy_batch import draw, path_velocity
from dumo.flow.path import Linear
from dumo.flow.slope import JvpSlope
from dumo.objectives import DuMo
from dumo.testing.network import randomise
from dumo.training.settings import Train
from dumo.training.state import begin
from dumo.types import Objective, OnHost
from dumo.types.batch_rows import to_device
from trained import ToyTrainer
from unit.training.toy import flow_of

GUIDE = Guide(zeta=0.4, interval=Interval(high=0.9))
# What torch does on `meta` for a derivative in forward mode it does on the CPU.
CASES = [o for o in one_each(guide=GUIDE, drop=0.3) if not isinstance(o.needs.slope, JvpSlope)]
each = pytest.mark.parametrize("objective", CASES, ids=name)
N, SHAPE = 16, (2, 4, 4)


class Passes(nn.Module):
    """A net that notes how many rows its passes have."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, list[int]()

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> tuple[Tensor, ...]:
        self.rows.append(len(x))
        return self.net(x, c, **inputs)


class Crossing(TorchDispatchMode):
    """Notes what goes from the CPU to the device and is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:  # noqa: ANN401
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        ours = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        theirs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        leaves = any(x.device.type == "cpu" and x.ndim for x in ours) and any(x.is_meta for x in (*ours, *theirs))
        if leaves and not (func is torch.ops.aten._to_copy.default and kwargs.get("non_blocking")):
            self.waited.append(str(func))
        return out


@pytest.mark.slow
@each
def test_a_step_waits_for_no_number_and_makes_the_same_passes(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "autocast", lambda *_, **__: nullcontext())  # there is none of `meta`
    spec, made = Train(steps=4, batch=N, micro_batch=N // 2, ema=()), dict[str, list[int]]()
    for device in ("cpu", "meta"):
        net = Passes(randomise(nets()[0].build(objective.needs, SHAPE, 3)).to(device))
        x, c = torch.zeros(N, *SHAPE, device=device), torch.zeros(N, dtype=torch.long, device=device)
        with Crossing() as crossing:
            state = begin(net, spec)
            flow = flow_of(state, spec, objective, Linear(), 3, teacher=path_velocity)
            trainer = ToyTrainer(state, flow, spec)
            draws = trainer.draws(0, SHAPE)
            keys = to_device(draws.keys, x.device)
            for rows in trainer.micro_batches:
                b, known = flow.add_noise(x[rows], c[rows], draws[rows]), draws[rows]
                b = b if device == "cpu" else replace(b, host=OnHost(known.t, known.kept))  # as on a GPU
                flow.compute_loss(b, keys[rows]).loss.sum().backward()
        made[device] = net.rows
        assert crossing.waited == []
    assert made["meta"] == made["cpu"]
    if isinstance(guide := objective.needs.guide, Guide) and guide.active:
        assert min(made["cpu"]) < N // 2  # of the rows that need V(null)


def test_some_rows_know_their_own_times_on_the_host() -> None:
    x, c = torch.zeros(8, *SHAPE), torch.zeros(8, dtype=torch.long)
    drawn = draw(DuMo(drop=0.5), Linear(), x, c, c, seed=0, step=0)
    b = replace(drawn, t=drawn.t.to("meta"), host=OnHost(drawn.t, drawn.kept))
    for rows in (slice(2, 5), [6, 1]):
        on_host = b[rows].on_host
        assert on_host is not None
        assert torch.equal(on_host.t, drawn.t[rows])
        assert torch.equal(on_host.kept, drawn.kept[rows])
