"""What every objective's record keeps: keyed by row, so that any share of it has the same rows."""

import pytest
import torch

from contract.case import name, objectives
from contract.drawn import counting
from dumo.flow.noisy_batch import Noise, Signs, draw
from dumo.flow.path import Linear
from dumo.flow.times import OfSampler
from dumo.testing import properties
from dumo.testing.properties import tensors_of
from dumo.types import NoisyBatch, Objective

each = pytest.mark.parametrize("objective", list(objectives(drop=0.4)), ids=name)
N = 24


def rows(objective: Objective, step: int = 3, seed: int = 0, first: int = 0, n: int = N) -> NoisyBatch:
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(N, 2, 3, generator=g), torch.arange(N) % 5
    some = slice(first, first + n)
    return draw(
        objective, Linear(), x[some], c[some], torch.full_like(c, 5)[some], seed=seed, step=step, batch=N, first=first
    )


@each
def test_shares_of_the_draw_are_the_whole(objective: Objective) -> None:
    properties.draws_are_keyed_by_row(objective)


@each
def test_draws_are_keyed_by_seed_and_step(objective: Objective) -> None:
    state = torch.get_rng_state()
    base, again = tensors_of(rows(objective)), tensors_of(rows(objective))
    assert all(torch.equal(v, again[key]) for key, v in base.items())
    has_fixed_times = len(base["t"].unique()) == 1 or isinstance(objective.times, OfSampler)
    one_time = {"t"} if has_fixed_times else set[str]()  # of a law that has nothing to draw
    for other in (tensors_of(rows(objective, step=4)), tensors_of(rows(objective, seed=1))):
        for key in {"t", "z", "kept", "x_t", *rows(objective).drawn} - one_time:
            assert not torch.equal(base[key], other[key]), key
    assert torch.equal(state, torch.get_rng_state())


@each
def test_record_is_consistent(objective: Objective) -> None:
    b = rows(objective)
    assert isinstance(objective, Objective)
    assert torch.equal(b.v_t, b.z - b.x)
    assert torch.allclose(b.x_t, b.x + b.t[:, None, None] * b.v_t, rtol=0, atol=1e-6)
    assert (b.r <= b.t).all() or objective.times.climbs
    assert torch.equal(b.c == 5, ~b.kept)
    assert torch.equal(b.c[b.kept], (torch.arange(N) % 5)[b.kept])


def test_siblings_see_the_same_noise_and_the_same_dropped_labels() -> None:
    """So they can be compared in one run."""
    records = [rows(o) for o in objectives(drop=0.4)]
    for b in records[1:]:
        assert torch.equal(b.z, records[0].z)
        assert torch.equal(b.kept, records[0].kept)


@each
@pytest.mark.parametrize("world", [1, 2, 8, 64])
def test_a_rank_draws_samples_for_its_own_rows_only(objective: Objective, world: int) -> None:
    """Its noise grows with its share of the batch; what is a number per row is drawn for the whole batch."""
    batch, shape = 64, (5, 7)
    x, c = torch.zeros(batch, *shape), torch.arange(batch) % 5
    share, samples = batch // world, 1 + sum(isinstance(law, Noise | Signs) for law in objective.needs.laws.values())
    with counting() as whole:
        draw(objective, Linear(), x, c, c, seed=0, step=3)
    assert 2 * batch < whole.scalars < 12 * batch
    for first in sorted({0, share % batch, batch - share}):  # two neighbours and the last tell of all
        mine = slice(first, first + share)
        with counting() as drawn:
            draw(objective, Linear(), x[mine], c[mine], c[mine], seed=0, step=3, batch=batch, first=first)
        assert drawn.scalars == whole.scalars
        assert drawn.rows == samples * list(range(batch)[mine])
        assert drawn.shaped == samples * share * 35
