"""Drift: the field by hand, its rest where samples are the data, and which way it moves others."""

from itertools import product

import pytest
import torch

from dumo.config.load import load
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.objectives.drift import RADII, WEIGHT, Drift, drift
from dumo.testing.exact import D
from dumo.testing.properties import loss_of
from dumo.training.micro_batch import rows_kept_together
from dumo.types import UserError
from theory.exact import drawn
from theory.formula import Polynomial, passes
from theory.pulled import adds, moves_samples_back


@pytest.mark.parametrize("omega", [1.0, 2.5])
def test_field_by_hand(omega: float) -> None:
    """Row by row; classes do not meet but for guidance, and have units of their own."""
    x, y = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    c, radii = torch.tensor([0, 0, 1, 0, 1, 0, 2, 0, 0, 2, 2, 0]), (0.03, 0.3, 1.0)
    x, y = (a * (1 + 9 * (c == 2))[:, None] for a in (x, y))
    found, sizes = drift(x, y, c, radii, 6, omega)
    of = {"samples": x, "data": y, "any data": y}
    for first, k in product((0, 6), range(3)):
        group = range(first, first + 6)
        own = [i for i in group if c[i] == k]
        weight = {"samples": 1.0, "data": 1.0, "any data": (omega - 1) * (len(own) - 1) / 5}
        sees = [
            (i, s, j) for i, s in product(own, of) for j in (group if s == "any data" else own) if j != i and weight[s]
        ]
        if not sees:
            continue
        far = {(i, s, j): (x[i] - of[s][j]).norm() for i, s, j in sees}
        unit = sum(weight[s] * d for (_, s, _), d in far.items()) / sum(weight[s] for _, s, _ in far)
        total, mean = torch.zeros(len(own), 3, dtype=D), 0
        for radius in radii:
            kernel = {key: (-d / unit / radius).exp() for key, d in far.items()}
            row = {i: sum(v for (p, _, _), v in kernel.items() if p == i) for i in own}
            column = {(s, j): sum(v for (_, *q), v in kernel.items() if q == [s, j]) for _, s, j in sees}
            least = torch.tensor(1e-6, dtype=D)
            a = {
                (i, s, j): weight[s] * max(v / row[i] * v / column[s, j], least).sqrt()
                for (i, s, j), v in kernel.items()
            }
            v = torch.zeros(len(own), 3, dtype=D)
            for (i, s, j), (p, apart, o) in product(sees, sees):
                if i == p and s == "data" and apart != "data":
                    v[own.index(i)] += a[i, s, j] * a[p, apart, o] * (y[j] - of[apart][o]) / unit * 3**0.5
            size = v.square().mean().sqrt()
            total, mean = total + v / size, mean + size / len(radii)
        assert torch.allclose(found[own], total, rtol=1e-9, atol=1e-12)
        assert torch.allclose(sizes[own], mean.expand(len(own)))


def test_guidance_moves_samples_away_from_other_classes() -> None:
    """Two classes beside each other on a line, samples as the data: each moves off the other, and rests without."""
    x = torch.randn(128, 1, generator=torch.Generator().manual_seed(0), dtype=D)
    c = torch.arange(128) % 2
    x, side = x + 2.0 * c[:, None] - 1, 2.0 * c[:, None] - 1
    assert drift(x, x, c, RADII, 64)[0].abs().max() < 1e-9
    assert (drift(x, x, c, RADII, 64, 2.0)[0] * side).mean() > 0.3


def test_drift_rests_where_samples_are_the_data() -> None:
    """To rounding; and a row that meets nobody stays where it is."""
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    v, size = drift(x, x, torch.arange(16) % 3, (0.02, 0.2), 8)
    assert v.abs().max() < 1e-9
    assert size.max() < 1e-12
    assert not drift(x, x + 1, torch.arange(16), (0.02, 0.2), 8)[0].any()


def test_drift_by_captions_is_drift_by_classes() -> None:
    """Whatever says which rows belong together."""
    x, y = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    c = torch.arange(16) % 3
    one, other = (drift(x, y, told, (0.2,), 8)[0] for told in (c, torch.eye(3)[c].view(16, 3, 1)))
    assert torch.equal(one, other)


def test_by_hand() -> None:
    """u(z, 1) descends the field of its samples; one pass more."""
    objective = Drift(size=8, slope=JvpSlope(), drop=0.3)
    net, b = Polynomial(2), drawn(objective, 16, progress=1.0)
    u = net(b.z, b.c, t=0 * b.t + 1)[1]
    v, force = drift((b.z - u).detach(), b.x, b.c, RADII, 8)
    loss = WEIGHT * ((u - u.detach() + v) ** 2).sum(1) / 2
    assert torch.equal(loss_of(objective, net, b).notes["force"], force)
    adds(objective, net, b, loss)
    assert passes(objective.model_copy(update={"slope": DualSlope()}), b) == (2, 0)


def test_samples_of_another_width_are_moved_back() -> None:
    assert moves_samples_back(Drift(slope=JvpSlope(), drop=0.0), WEIGHT)


def test_rows_of_a_group_stay_together() -> None:
    run = load("digits-drift")
    assert rows_kept_together(run.train, run.objective) == 256
    with pytest.raises(UserError, match="multiple of 256"):
        load("digits-drift", ["train.batch=300"])
