"""Bytes are counted as by hand, before anything is made."""

from collections.abc import Collection

import pytest
import torch
from torch import nn

from dumo.run import flops, memory
from dumo.run.memory import HeldBytes, StepBytes
from dumo.run.storages import LiveStorages, WatchedBlock
from dumo.training.ema import Ema
from dumo.training.settings import Train
from unit.run.known import follow_bytes

N = 1000  # numbers of a tensor, four bytes each


def test_bytes_of_a_chain_are_counted_as_by_hand() -> None:
    x = torch.ones(N)

    def chain() -> None:
        a = x.exp()
        b = a.exp()  # x is given; a and b live
        del a
        c = b.exp()  # b and c
        c.exp_()

    assert follow_bytes(chain) == StepBytes(preexisting=4 * N, peak=8 * N)


def test_views_do_not_count_twice_and_keep_their_storage() -> None:
    x = torch.ones(N)

    def views() -> None:
        first = x.exp().view(10, -1)[0].unsqueeze(0).t()  # a tenth of it is used, all of it lives
        x.exp()
        assert first.numel() == N / 10

    assert follow_bytes(views) == StepBytes(preexisting=4 * N, peak=8 * N)
    assert follow_bytes(lambda: (x.view(10, -1), x[3:5])) == StepBytes(preexisting=4 * N, peak=0)


def test_what_autograd_saves_counts_until_the_backward_pass_is_through() -> None:
    x = torch.ones(N, requires_grad=True)

    def depth(n: int) -> None:
        y = x
        for _ in range(n):
            y = y.exp()  # saves its result
        y.sum().backward()

    peaks = {n: follow_bytes(lambda n=n: depth(n)).peak for n in (1, 2, 3, 7)}
    assert peaks[1] == 4 * (2 * N + 2)  # the result, its gradient; the sum, and its own
    assert peaks[3] - peaks[2] == 4 * N
    assert peaks[7] - peaks[2] == 5 * 4 * N


def test_what_is_held_is_counted_as_by_hand() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)).to("meta")
    net[0].bias.requires_grad_(False)
    buffers = 4 * (4 + 4) + 8  # the mean, the variance, and how many batches there were
    assert memory.weight_bytes(net) == 4 * (3 * 4 + 4) + buffers
    trained = 4 * 3 * 4
    held = memory.held_bytes(net, Train(steps=1, batch=1, ema=(Ema(decay=0.9),)))
    assert held == HeldBytes(4 * (3 * 4 + 4) + buffers, trained, 2 * trained + 4, trained + buffers)


def test_a_net_without_trained_weights_has_no_optimizer() -> None:
    """Its training is refused later."""
    net = nn.Linear(3, 4).to("meta").requires_grad_(False)
    assert memory.held_bytes(net, Train(steps=1, batch=1)).optimizer == 0


def test_a_checkpoint_lacks_a_frozen_weight_once_though_two_modules_share_it() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net[0].weight.requires_grad_(False)
    held = HeldBytes(weights=memory.weight_bytes(net), gradients=0, optimizer=0, averages=0)
    assert memory.checkpoint_bytes(net, held) == 4 * (9 + 3 * 3)


def test_a_part_of_what_is_held() -> None:
    held = HeldBytes(weights=8, gradients=6, optimizer=12, averages=4)
    assert held.per_rank(2) == HeldBytes(4, 3, 6, 2)
    assert held.per_rank(3) == HeldBytes(3, 2, 4, 2)  # none of it is lost
    assert held.total == 30


@pytest.mark.parametrize(("bytes_at_peak", "peak"), [(4, 10 + 3 * 4), (2, 99)])
def test_all_blocks_of_a_unet_are_followed_if_one_is_gone_at_the_peak(
    bytes_at_peak: int, peak: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, sampled_net = nn.Module(), nn.Module()
    monkeypatch.setattr(flops, "sample_blocks", lambda _: flops.SampledNet(sampled_net, {"block": 3}))

    def follow(followed: nn.Module, watched: Collection[str]) -> LiveStorages:
        live = LiveStorages()
        live.peak = 10 if followed is sampled_net else 99
        live.blocks = {path: WatchedBlock(0, bytes_left_behind=4, bytes_at_peak=bytes_at_peak) for path in watched}
        return live

    assert memory._unet_peak(net, follow) == peak


def test_a_watched_block_leaves_behind_what_outlives_its_pass_with_gradients() -> None:
    block = nn.Sequential(nn.Tanh(), nn.Tanh())  # each saves its result
    x = torch.ones(N, requires_grad=True)
    with LiveStorages({"block": block}) as live:
        with torch.no_grad():
            block(x)
        y = block(x) * 1
        assert live.blocks["block"].bytes_now == 4 * 2 * N
        y.sum().backward()
    assert live.blocks["block"] == WatchedBlock(0, bytes_left_behind=4 * 2 * N, bytes_at_peak=4 * 2 * N)
