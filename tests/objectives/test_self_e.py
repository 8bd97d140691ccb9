"""Self-E: its formula by hand, its predictions on Gaussians in closed form, the spread of its samples, its passes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dumo.flow.path import Linear
from dumo.flow.solver import Euler, Hop
from dumo.objectives import FlowMatching, SelfE
from dumo.testing.exact import D, ExactNet, Gaussian, column, exact_batch, growth, spread, table
from dumo.testing.network import CountedNet
from dumo.testing.properties import loss_of
from dumo.types import Frozen, Heads, NoisyBatch
from theory.exact import drawn
from theory.formula import Polynomial, agree

SAME = Gaussian(table([0.6, 0.6, 0.6])[0], table([1.0, -0.5, 0.2])[0])  # two classes and the null, of one width
WIDTHS = Gaussian(table([0.4, 0.9, 0.7])[0], table([1.0, -0.5, 0.2])[0])


def target_by_hand(objective: SelfE, net: nn.Module, ref: nn.Module, b: NoisyBatch, v: Tensor) -> Tensor:
    """(x_t - x*) / t of every row with a label and r < t, by lambda and Eq. 20, or Eq. 16 without lengths; else v_t."""
    t, r = column(b.t), column(b.r)
    x_hat = b.x_t - t * v
    x_r = (1 - r) * x_hat + r * b.drawn["z_fresh"].to(D)
    x_self = x_hat + objective.pull * r * (net(x_r, b.null, t=b.r, r=b.r)[0] - ref(x_r, b.c, t=b.r, r=b.r)[0])
    lam = t / (1 - t) - r / (1 - r)
    both = b.x + lam * x_self
    x_star = both * b.x.norm(dim=1, keepdim=True) / both.norm(dim=1, keepdim=True)
    if not objective.scaled:
        x_star = both / (1 + lam)
    return torch.where(column(b.kept) & (r < t), (b.x_t - x_star) / t, b.v_t).detach()


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def test_loss_and_gradient_are_those_of_the_formula(scaled: bool) -> None:
    """theta^- makes V(c), and the net V(null); rows without a label, and with r = t, learn v_t."""
    objective = SelfE(drop=0.3, scaled=scaled, pull=0.7)
    net, ref = Polynomial(1), Polynomial(1)
    ref.a.data = ref.a.data.roll(1) / 2
    b = drawn(objective, 24)
    (v,) = net(b.x_t, b.c, t=b.t, r=b.r)
    loss = (v - target_by_hand(objective, net, ref, b, v)).square().mean(1)
    agree(objective, net, b, loss, {"v": loss}, ref=ref, close=1e-9)


def test_the_gradient_is_that_of_both_squares() -> None:
    """Eq. 16 for each row, divided by 1 + lambda: |v - v_t|^2 + lambda |v - v_self|^2."""
    objective, net = SelfE(scaled=False), Polynomial(1)
    b = drawn(objective, 24)
    t, r = column(b.t), column(b.r)
    (v,) = net(b.x_t, b.c, t=b.t, r=b.r)
    x_r = (1 - r) * (b.x_t - t * v) + r * b.drawn["z_fresh"].to(D)
    v_c, v_null = (net(x_r, c, t=b.r, r=b.r)[0] for c in (b.c, b.null))
    v_self = (v + r / t * (v_c - v_null)).detach()
    lam = (t - r) / ((1 - t) * (1 - r)) * column(b.kept)
    squares = (v - b.v_t).square() + lam * (v - v_self).square()
    (gradient,) = torch.autograd.grad((squares / (1 + lam)).sum(), v)
    assert torch.allclose(gradient, 2 * (v - target_by_hand(objective, net, net, b, v)), rtol=1e-9)


class Predictions(ExactNet):
    """The exact velocity at r = t, and elsewhere that of the prediction at which Eq. 16 has no gradient."""

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, **inputs: Tensor) -> Heads:
        (v,) = super().forward(x, c, t=t, **inputs)
        r, flow = inputs["r"], self.flow
        assert isinstance(flow, Gaussian)
        x_hat = column(1 / t.clamp(min=1e-12)) * (x - self.prediction(flow, x, c, t, r))
        return (torch.where(column((r < t) & (c < flow.classes)), x_hat, v),)

    def prediction(self, flow: Gaussian, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """(E[x | x_t] - lambda r b) / (1 + lambda r (1 - r) (k_s - k_s0)), for the mean over z'."""
        mean, null = flow.mean[c], flow.mean[-1]
        posterior = x - column(t) * flow.velocity(x, c, t)
        lam = t / (1 - t) - r / (1 - r)
        k, k_null = growth(flow.std[c], r), growth(flow.std[-1], r)
        b = -(mean - null) - (1 - r) * (k * mean - k_null * null)
        return (posterior - column(lam * r * b)) / column(1 + lam * r * (1 - r) * (k - k_null))


class Shifted(Predictions):
    """Of classes and null of one width: E[x | x_t] + lambda (mu - mu_0) r^2 / D(r), with D the variance at r."""

    def prediction(self, flow: Gaussian, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        posterior = x - column(t) * flow.velocity(x, c, t)
        lam = (t / (1 - t) - r / (1 - r)).nan_to_num(posinf=3.0)  # infinite at t = 1, where any shift will do
        shift = lam * r**2 / spread(flow.std[c], r) ** 2 * (flow.mean[c] - flow.mean[-1])
        return posterior + column(shift)


def exact_rows(objective: SelfE, flow: Gaussian) -> NoisyBatch:
    """Rows with v_t replaced by its mean given x_t, where lambda is finite."""
    b = exact_batch(objective, flow)
    return b[[i for i, t in enumerate(b.t.tolist()) if 0 < t < 1]]


@pytest.mark.parametrize(
    ("net", "flow", "z"), [(Shifted, SAME, 1.0), (Predictions, SAME, 1.0), (Predictions, WIDTHS, 0.0)]
)
def test_predictions_of_gaussians_are_those_in_closed_form(net: type[Predictions], flow: Gaussian, z: float) -> None:
    """Each row is at rest, of one width for any z', of two for its mean, z' = 0: V is linear in z'.

    So is the velocity at r = t, and on rows without a label.
    """
    objective = SelfE(drop=0.2, scaled=False)
    b = exact_rows(objective, flow)
    b = replace(b, drawn={"z_fresh": z * b.drawn["z_fresh"]})
    assert loss_of(objective, net(flow, objective.needs), b).loss.max() < 1e-20


def test_the_pull_of_equal_widths_is_the_same_everywhere() -> None:
    """V(c) - V(null) = -(mu - mu_0) r / D(r), wherever x_r is."""
    net = ExactNet(SAME, SelfE().needs)
    b = exact_rows(SelfE(), SAME)
    (v_c,), (v_null,) = (net(b.x_t, c, t=b.r, r=b.r) for c in (b.c, b.null))
    r = b.r / spread(SAME.std[b.c], b.r) ** 2
    assert torch.allclose(v_c - v_null, column(-r * (SAME.mean[b.c] - SAME.mean[-1])))


def test_a_prediction_judged_without_noise_is_the_posterior_mean() -> None:
    """At r = 0 there is no pull: the target is that of flow matching, whatever the network says."""
    objective, net = SelfE(scaled=False, drop=0.1), Polynomial(1)
    b = exact_rows(objective, WIDTHS)
    b = replace(b, r=0 * b.r)
    terms = loss_of(objective, net, b)
    (v,) = net(b.x_t, b.c, t=b.t, r=b.r)
    t = column(b.t)
    lam = column(b.kept) * t / (1 - t)
    # x_self is the prediction itself, so only the weight of the data is smaller.
    assert torch.allclose(terms.loss, ((v - b.v_t) / (1 + lam)).square().mean(1))


@pytest.mark.parametrize(("nfe", "share"), [(1, 0.0), (2, 0.441), (4, None), (8, None)])
def test_samples_have_the_spread_of_eulers(nfe: int, share: float | None) -> None:
    """Of one width, the pull shifts samples, and does not widen them."""
    objective = SelfE()
    net, c = Shifted(SAME, objective.needs), torch.zeros(2, dtype=torch.long)
    z = table([-1.0, 0.0], [1.0, 0.0])
    by_hop = Hop()(objective.readings(net), Linear(), z, c, nfe, lambda k: z)
    readings = FlowMatching().readings(ExactNet(SAME, FlowMatching().needs))
    by_euler = Euler()(readings, Linear(), z, c, nfe, lambda k: z)
    width = (by_hop[1] - by_hop[0])[0].item() / 2 / 0.6
    assert torch.allclose(by_hop[1] - by_hop[0], by_euler[1] - by_euler[0], atol=1e-12)
    if share is not None:
        assert width == pytest.approx(share, abs=5e-4)


def test_a_jump_asks_for_the_next_time() -> None:
    """x_s = x_t - (t - s) v(x_t, t, s), Eq. 22; there is no jump to the data in one pass that could be restarted."""
    objective, net = SelfE(), Polynomial(1)
    b = drawn(objective, 8)
    readings = objective.readings(net)
    assert readings.flow_map is not None
    assert readings.endpoint is None
    s = b.t / 3
    expected = b.x_t - column(b.t - s) * net(b.x_t, b.c, t=b.t, r=s)[0]
    assert torch.equal(readings.flow_map(b.x_t, b.t, s, b.c), expected)


class CountedRows(CountedNet):
    """Counts rows, too."""

    rows = 0

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        """A pass of the network."""
        self.rows += len(x)
        return super().forward(x, c, **inputs)


def test_passes_are_of_the_rows_that_are_judged() -> None:
    """All 24 rows have gradients; for the half with r < t the net makes V(null), and theta^- V(c)."""
    objective = SelfE()
    net, ref = CountedRows(Polynomial(1)), CountedRows(Polynomial(1))
    objective.loss(net, Frozen(ref), drawn(objective, 24))
    assert (net.graded, net.still, net.rows) == (1, 1, 36)
    assert (ref.graded, ref.still, ref.rows) == (0, 1, 12)
