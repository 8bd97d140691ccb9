"""The memory of the host: what a plan counts, and a start of 20 B weights on eight ranks that are not there."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dumo.autodiff import float64
from dumo.config.load import load
from dumo.io.deferred import Deferred
from dumo.plan.cluster import Traffic, fake_ranks
from dumo.plan.host import PROCESS, host_bytes
from dumo.run import memory
from dumo.run.net import outline
from dumo.training import layout
from dumo.training.frozen import copy_net


def planned(ranks: int, device: str, *fields: str) -> dict[str, int]:
    """Bytes without those of a process itself, where the weights of a rank's step take none."""
    run = load("digits", fields)
    net = outline(run)
    held = memory.held_bytes(net, run.train)
    copy = memory.checkpoint_bytes(net, held, ranks).host_copy_per_rank
    found = host_bytes(net, run.train, ranks=ranks, held=held, checkpoint_copy=copy, step=0, has_slope=True)[device]
    assert found["node"]["save"] == min(ranks, 8) * found["process"]["save"]
    return {phase: size - PROCESS for phase, size in found["process"].items()}


@pytest.mark.slow
def test_shares_take_less_and_a_gpu_keeps_what_it_trains() -> None:
    net = outline(load("digits"))
    held, largest = memory.held_bytes(net, load("digits").train), max(p.nbytes for p in net.parameters())
    one, four = planned(1, "CPU"), planned(4, "CPU", "train.share=4")
    assert one["start"] == held.weights + held.averages
    assert four["start"] == (held.weights + held.averages) // 4 + largest
    assert one["resume"] == one["start"] + held.optimizer
    assert planned(4, "GPU")["start"] == planned(4, "GPU")["resume"] == largest
    assert planned(4, "CPU")["start"] == one["start"] + largest
    assert one["export"] == held.weights == four["export"] - largest


@pytest.mark.slow
def test_an_examination_on_a_cpu_takes_a_block_in_float64_and_of_ranks_the_net_in_one_piece() -> None:
    net = outline(load("digits"))
    held = memory.held_bytes(net, load("digits").train)
    copied = float64.copied_bytes(net)
    assert copied < 2 * held.weights  # which all of it would take
    assert planned(1, "CPU")["examination"] == held.total + copied
    assert planned(4, "CPU", "train.share=4")["examination"] == held.total // 4 + held.weights + copied
    assert planned(4, "GPU")["examination"] == 0


@pytest.mark.nightly
@pytest.mark.parametrize("coding", ["bfloat16", "int8", "nf4"])
def test_adapters_are_added_in_a_copy(coding: str) -> None:
    """Of all weights in float32, whatever the base is kept in."""
    pytest.importorskip("peft")
    run = load("sd3-lora", [f"net.lora.frozen={coding}"])
    net = outline(run)
    held = memory.held_bytes(net, run.train)
    counted = host_bytes(net, run.train, ranks=1, held=held, checkpoint_copy=0, step=0, has_slope=True)
    found = counted["GPU"]["process"]["export"] - PROCESS
    assert found == held.weights + 4 * sum(p.numel() for p in outline(load("sd3-lora")).parameters())


@pytest.mark.slow
def test_a_copy_is_taken_by_a_save_and_stays_for_the_steps_after_it() -> None:
    net = outline(load("digits"))
    held, written = memory.held_bytes(net, load("digits").train), planned(4, "GPU")["save"]
    assert 4 * written == held.weights + held.averages + held.optimizer
    assert planned(1, "GPU")["save"] == 4 * written
    assert planned(4, "GPU")["step"] == written
    assert planned(4, "CPU", "train.share=4")["save"] == held.total // 4 + written


@pytest.mark.parametrize(("step", "first"), [(0, "update"), (10**9, "passes")])
def test_a_first_step_has_no_memory_of_the_optimizer_before_its_update(step: int, first: str) -> None:
    """Of `step` bytes, as later steps take them."""
    run = load("digits", ["train.share=2"])
    held = memory.held_bytes(net := outline(run), run.train)
    copy = 7
    counted = host_bytes(net, run.train, ranks=2, held=held, checkpoint_copy=copy, step=step, has_slope=False)
    found = counted["CPU"]["process"]
    update, passes = held.per_rank(2).total, step - held.optimizer // 2
    assert found["first step"] == {"update": update, "passes": passes}[first] + PROCESS
    assert found["step"] == step + copy + PROCESS


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["qwen-image"])
def test_a_start_of_20_b_on_eight_ranks_sends_nothing_and_makes_each_tensor_once(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load(recipe, ["train.share=8"])
    net, weights, made, fake = outline(run), Deferred(), Counter[str](), FakeTensorMode(allow_non_fake_inputs=True)

    def make(name: str, like: Tensor) -> Tensor:
        made[name] += like.nbytes
        with fake:
            return torch.empty(like.shape, dtype=like.dtype, device="cpu")

    def put(module: nn.Module, names: Any, make: Any) -> None:  # noqa: ANN401, as `layout.replace_parameters`
        with fake:
            real(module, names, make)

    real = layout.replace_parameters
    for name, p in net.named_parameters():
        weights.replace(p, partial(make, name, p))
    wanted: dict[str, Any] = {name: p.nbytes for name, p in net.named_parameters()}
    assert sum(p.numel() for p in net.parameters()) > 20e9
    with fake_ranks(8):
        mesh, copy = layout.mesh_of(8, torch.device("cpu")), copy_net(net).requires_grad_(False)
        monkeypatch.setattr(layout, "replace_parameters", put)
        with Traffic() as sent:
            layout.shard(net, mesh, [copy], weights, reshard=False)
        parts = [layout.local_tensor(p) for p in net.parameters()]
    assert not sent.calls
    assert made == wanted
    assert not any(x.is_meta for x in parts)
    assert sum(x.nbytes for x in parts) <= sum(wanted.values()) / 8 * 1.01
    for name, p in net.named_parameters():
        assert (copy.get_parameter(name) is p) != p.requires_grad, name
