"""A burst is named by its module, once; what a noisy run does is none."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from dumo.io import digest
from dumo.runtime.random import stream
from dumo.training.burst import (
    BURST_FACTOR,
    BURST_STEPS,
    MAX_MODULES,
    REST,
    WINDOW,
    GradientNorms,
    new_bursts,
    parameters_by_module,
)
from dumo.training.manifest import Manifest


def bursts(rows: Iterable[dict[str, float]]) -> dict[int, dict[str, float]]:
    """The bursts that begin, by step."""
    watched, found = GradientNorms(), dict[int, dict[str, float]]()
    for step, norms in enumerate(rows, 1):
        before, watched = watched, watched.with_step(norms)
        if begun := new_bursts(before, watched):
            found[step] = {name: round(times, 6) for name, times in begun.items()}
    return found


def calm(steps: int, embedder: float = 0.1, **more: float) -> list[dict[str, float]]:
    return [{"scalars": embedder, "blocks": 0.1, **more}] * steps


def test_a_burst_is_named_by_its_module_once() -> None:
    """It spreads to the blocks, and nothing is said of that; after a window of calm steps another one is."""
    both = [{"scalars": 4.0, "blocks": 1.0}] * 20
    rows = [*calm(120), *calm(20, 0.7), *both, *calm(200), *calm(20, 0.7)]
    assert bursts(rows) == {120 + BURST_STEPS: {"scalars": 7.0}, 360 + BURST_STEPS: {"scalars": 7.0}}


def test_the_worst_module_comes_first() -> None:
    rows = [*calm(120), *([{"scalars": 0.5, "blocks": 0.9}] * BURST_STEPS)]
    assert [*bursts(rows)[120 + BURST_STEPS]] == ["blocks", "scalars"]


def test_less_than_the_factor_one_batch_and_the_first_steps_are_no_burst() -> None:
    assert not bursts([*calm(120), *calm(50, 0.1 * BURST_FACTOR)])
    assert not bursts([*calm(120), *calm(BURST_STEPS - 1, 9.0), *calm(100)])
    assert not bursts([*calm(120), *calm(100, math.nan), *calm(10, math.inf)])
    rising = [{"scalars": min(0.2, 1e-4 * 1.2**step)} for step in range(200)]  # as of a net whose heads begin at zero
    assert not bursts(rising)


def test_noise_is_no_burst() -> None:
    """Of small batches norms differ by more than a factor of two."""
    noise = torch.randn(5_000, generator=stream("noise")).mul(0.5).exp().tolist()
    assert not bursts({"scalars": x} for x in noise)


def test_the_window_survives_a_checkpoint_and_checkpoints_from_before_stay_whole() -> None:
    watched = GradientNorms()
    for norms in [*calm(WINDOW, 1 / 3), *calm(BURST_STEPS, 2.0)]:
        watched = watched.with_step(norms)
    assert watched.peaks() == {"scalars": 2.0, "blocks": 0.1}
    stored = Manifest(step=1, images=1, gradients=watched, files={}).model_dump_json()
    assert Manifest.model_validate_json(stored).gradients == watched
    about = Manifest(step=1, images=1, files={})
    old = about.model_dump_json(exclude={"sum", "threads", "cores", "gradients"})
    assert about.checksum() == digest.short(old)
    assert about.model_copy(update={"gradients": watched}).checksum() != about.checksum()


class Parts(nn.Module):
    """Heads, a frozen layer, and a model of others with more parts than are named."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({f"part_{i}": nn.Linear(1, 1 + i) for i in range(parts)})
        self.heads = nn.ModuleDict({"v": nn.Linear(9, 99), "u": nn.Linear(9, 99)})
        self.old = nn.Linear(2, 2).requires_grad_(False)


def test_modules_of_a_net() -> None:
    few = parameters_by_module(Parts(3))
    assert [*few] == ["part_0", "part_1", "part_2", "heads.v", "heads.u"]
    many = parameters_by_module(net := Parts(40))
    assert len(many) == MAX_MODULES
    assert {"heads.v", "heads.u", "part_39", REST} <= set(many)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert sorted(map(id, trained)) == sorted(id(p) for group in many.values() for p in group)
