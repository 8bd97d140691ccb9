"""Laws of generation: what an image depends on, and who counts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dumo.flow.path import Linear
from dumo.flow.reading import mean_velocity
from dumo.flow.sampling import Samples, join_batches, labels_in_turn, sample_batches, sample_trajectory
from dumo.flow.solver import Euler, Heun, Hop, Restart, Solver
from dumo.runtime.random import noise, stream
from dumo.types import Readings, UserError

SHAPE = (1, 8, 8)
ALL = [Euler(), Heun(), Restart(m=0.3), Hop()]


class Small(nn.Module):
    """A random net of u(x_t, t, r) with convolutions, linear layers and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.table, self.times, self.drop = nn.Embedding(10, 16), nn.Linear(2, 16), nn.Dropout(0.5)
        for i, p in enumerate(self.parameters()):
            p.data = 0.3 * torch.randn(p.shape, generator=stream("small", i))

    def forward(self, x: Tensor, c: Tensor, /, t: Tensor, r: Tensor) -> tuple[Tensor]:
        h = self.table(c) + self.times(torch.stack([t, r], 1))
        return (self.last(self.drop((self.first(x) + h[:, :, None, None]).tanh())),)


def generate(*args: Any, **options: Any) -> Samples:  # noqa: ANN401, those of `sample_batches`
    return join_batches(sample_batches(*args, **options))


def make(solver: Solver, nfe: int, batch: int, *, n: int = 64, seed: int = 0, net: nn.Module | None = None) -> Samples:
    net = net or Small()
    asked = {"nfe": nfe, "seed": seed, "shape": SHAPE, "batch": batch}
    return generate(net, mean_velocity(net), Linear(), solver, labels_in_turn(n, 10), **asked)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ALL)
def test_same_image_at_any_batch_size(solver: Solver) -> None:
    """Convolutions of other batch sizes add in another order, so last bits differ: by 4e-6 at values near 2."""
    whole = make(solver, 4, 64).x
    assert whole.abs().mean() > 0.1
    for batch in (1, 7):
        assert (make(solver, 4, batch).x - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("solver", ALL)
def test_the_net_counts_the_passes_asked_for(solver: Solver) -> None:
    for nfe in (2, 4):
        assert make(solver, nfe, 8, n=16).nfe == nfe
    assert make(solver, 2, 7, n=16).nfe == 2  # a last batch of 2 counts no less


def test_images_are_numbered() -> None:
    """Some images made alone are those of the whole, and one batch of one pass is the formula itself."""
    net, c = Small().eval(), labels_in_turn(20, 10)
    some = [3, 17, 4]
    asked = {"nfe": 1, "seed": 5, "shape": SHAPE, "indices": some, "batch": 2}
    alone = generate(net, mean_velocity(net), Linear(), Hop(), c[some], **asked).x
    z = noise(5, range(20), 0, SHAPE)
    with torch.no_grad():
        u = net(z, c, t=torch.ones(20), r=torch.zeros(20))[0]
    torch.testing.assert_close(alone, (z - u)[some], atol=1e-5, rtol=0)


def test_restart_gets_each_image_its_own_fresh_noise() -> None:
    net, c = Small().eval(), labels_in_turn(6, 10)
    made = generate(net, mean_velocity(net), Linear(), Restart(m=0.3), c, nfe=2, seed=1, shape=SHAPE, batch=4).x
    z, again = noise(1, range(6), 0, SHAPE), noise(1, range(6), 1, SHAPE)
    one, m, zero = torch.ones(6), torch.full((6,), 0.3), torch.zeros(6)
    with torch.no_grad():
        x_m = 0.3 * again + 0.7 * (z - net(z, c, t=one, r=zero)[0])
        want = x_m - 0.3 * net(x_m, c, t=m, r=zero)[0]
    torch.testing.assert_close(made, want, atol=1e-5, rtol=0)


def test_the_net_is_left_as_it_was() -> None:
    net = Small()
    net.table.eval()
    modes = [part.training for part in net.modules()]
    first = make(Euler(), 2, 4, n=8, net=net)
    assert modes == [part.training for part in net.modules()]
    assert not net._forward_hooks
    assert not first.x.requires_grad
    assert (first.x.dtype, first.x.device.type, first.x.shape) == (torch.float32, "cpu", (8, *SHAPE))
    assert torch.equal(first.x, make(Euler(), 2, 4, n=8, net=net).x)  # dropout was off

    def broken(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        generate(net, Readings(broken), Linear(), Euler(), labels_in_turn(2, 10), nfe=1, seed=0, shape=SHAPE)
    assert modes == [part.training for part in net.modules()]
    assert not net._forward_hooks


def test_refuses_before_the_first_pass() -> None:
    net, c = Small(), labels_in_turn(2, 10)

    def never(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        raise AssertionError

    for solver, nfe, indices, error, says in (
        (Hop(), 1, None, UserError, "flow_map"),
        (Heun(), 3, None, UserError, "nfe = 3"),
        (Euler(), 1, [7], ValueError, "1 indices for 2 rows of c"),
    ):
        with pytest.raises(error, match=says):
            generate(net, Readings(never), Linear(), solver, c, nfe=nfe, seed=0, shape=SHAPE, indices=indices)


def test_passes_are_in_the_precision_that_is_asked_for() -> None:
    """bf16 is the net under autocast, what it answers widened before anything is added up; else autocast is off."""
    net, c, z = Small().eval(), labels_in_turn(8, 10), noise(0, range(8), 0, SHAPE)
    asked = {"nfe": 1, "seed": 0, "shape": SHAPE}
    plain = generate(net, mean_velocity(net), Linear(), Hop(), c, **asked).x
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (u,) = net(z, c, t=torch.ones(8), r=torch.zeros(8))
        assert torch.equal(generate(net, mean_velocity(net), Linear(), Hop(), c, **asked).x, plain)
    assert u.dtype == torch.bfloat16
    low = generate(net, mean_velocity(net), Linear(), Hop(), c, **asked, precision="bf16").x
    assert torch.equal(low, z - u.float())
    assert 1e-4 < (low - plain).abs().max() < 0.1


@pytest.mark.parametrize("points", [1, 3, 8])
def test_points_divide_the_steps(points: int) -> None:
    net, c, z = Small().eval(), labels_in_turn(2, 10), noise(0, range(2), 0, SHAPE)
    with pytest.raises(ValueError, match=f"points={points} must be at least 2 and divide the 4 steps of nfe=8"):
        sample_trajectory(mean_velocity(net), Linear(), Heun(), z, c, nfe=8, points=points)


def test_no_images_are_no_batches() -> None:
    net, c = Small(), labels_in_turn(1, 10)[:0]
    assert not [*sample_batches(net, mean_velocity(net), Linear(), Hop(), c, nfe=1, seed=0, shape=SHAPE)]


def test_labels_go_round() -> None:
    assert labels_in_turn(12, 5).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert labels_in_turn(5, 10, [7, 3]).tolist() == [7, 3, 7, 3, 7]
    assert labels_in_turn(3, 0).tolist() == [0, 0, 0]
    assert labels_in_turn(2, 1000).dtype == torch.int64


@pytest.mark.parametrize(
    ("n", "classes", "only", "named"),
    [
        (4, 10, [3, 10], "label 10"),
        (4, 10, [-1], "label -1"),
        (4, 0, [0], "label 0"),
        (0, 10, None, "100,000,000"),
        (-1, 10, None, "100,000,000"),
    ],
)
def test_what_has_no_labels_is_refused(n: int, classes: int, only: list[int] | None, named: str) -> None:
    with pytest.raises(UserError, match=named):
        labels_in_turn(n, classes, only)


def test_a_network_in_bf16_gives_float32_to_guidance_and_solvers() -> None:
    net = Small()
    types: list[torch.dtype] = []

    def endpoint(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        (u,) = net(x, c, t=t, r=0 * t)
        types.append(u.dtype)
        return x - u

    c = labels_in_turn(4, 10)
    asked = {"nfe": 2, "seed": 0, "shape": SHAPE, "precision": "bf16"}
    generate(net, Readings(endpoint=endpoint), Linear(), Restart(), c, **asked)
    assert {*types} == {torch.float32}
