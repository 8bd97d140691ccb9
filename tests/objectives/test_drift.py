"""Drift: the field by hand, its rest where samples are the data, and which way it moves others."""

from itertools import product

import pytest
import torch

from contract.case import step
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.objectives.drift import RADII, WEIGHT, Drift, drift
from dumo.run.config.load import load
from dumo.training.step import together
from dumo.types import UserError
from theory.exact import D, drawn
from theory.formula import Polynomial, passes
from theory.pulled import adds, moves_samples_back


def test_field_by_hand() -> None:
    """Row by row; classes do not meet, and have units of their own."""
    x, y = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    c, radii = torch.tensor([0, 0, 1, 0, 1, 0, 2, 0, 0, 2, 2, 0]), (0.03, 0.3, 1.0)
    x, y = (a * (1 + 9 * (c == 2))[:, None] for a in (x, y))
    found, sizes = drift(x, y, c, radii, 6)
    for first, k in product((0, 6), range(3)):
        own = [i for i in range(first, first + 6) if c[i] == k]
        sees = {i: [j for j in own if j != i] for i in own}
        far = {(i, side, j): (x[i] - (x, y)[side][j]).norm() for i in own for side in (0, 1) for j in sees[i]}
        if not far:
            continue
        unit, total, mean = torch.stack([*far.values()]).mean(), torch.zeros(len(own), 3, dtype=D), 0
        for radius in radii:
            kernel = {key: (-d / unit / radius).exp() for key, d in far.items()}
            a = {
                (i, s, j): max(
                    k
                    / sum(v for (p, _, _), v in kernel.items() if p == i)
                    * k
                    / sum(v for (_, q, o), v in kernel.items() if (q, o) == (s, j)),
                    torch.tensor(1e-6, dtype=D),
                ).sqrt()
                for (i, s, j), k in kernel.items()
            }
            v = torch.zeros(len(own), 3, dtype=D)
            for n, i in enumerate(own):
                for j, other in product(sees[i], sees[i]):
                    v[n] += a[i, 1, j] * a[i, 0, other] * (y[j] - x[other]) / unit * 3**0.5
            size = v.square().mean().sqrt()
            total, mean = total + v / size, mean + size / len(radii)
        assert torch.allclose(found[own], total, rtol=1e-9, atol=1e-12)
        assert torch.allclose(sizes[own], mean.expand(len(own)))


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
    assert torch.equal(step(objective, net, b).notes["force"], force)
    adds(objective, net, b, loss)
    assert passes(objective.model_copy(update={"slope": DualSlope()}), b) == (2, 0)


def test_samples_of_another_width_are_moved_back() -> None:
    assert moves_samples_back(Drift(slope=JvpSlope(), drop=0.0), WEIGHT)


def test_rows_of_a_group_stay_together() -> None:
    run = load("digits-drift")
    assert together(run.train, run.objective) == 256
    with pytest.raises(UserError, match="no multiple of 256"):
        load("digits-drift", ["train.batch=300"])
