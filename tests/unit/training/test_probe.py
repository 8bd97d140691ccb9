"""The gradients of a loss's parts, compared over what both reach; and a run is the same with and without."""

import math

import pytest
import torch
from torch import nn

from dumo.flow.draw import draw
from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope
from dumo.nets import DiT
from dumo.objectives import DuMo, MeanFlow
from dumo.training.loop import Every, train
from dumo.training.record import Probe, compare_gradients, endpoint_drift, probe_net
from dumo.training.spec import Train
from dumo.training.state import State, begin
from dumo.training.step import Record, flow_of
from dumo.types import Noised, Objective, Reads, Terms, frozen
from theory.exact import APART, Exact, record
from unit.training.toy import AVERAGES, CLASSES, Small, Toy, batches, run, same, tensors, toy


def noised(n: int = 12) -> Noised:
    """The rows of a step of the toy."""
    x, c = batches(n)(0)
    return draw(Toy(), Linear(), x, c, torch.full_like(c, CLASSES), seed=0, step=0)


V, U = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, -2.0, 0.0])  # at an angle with cosine -0.8


class Fork(nn.Module):
    """A trunk w, and a head for each of two parts: 2 v w and 3 u w."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.u = (nn.Parameter(torch.full((n,), x)) for n, x in ((3, 1.0), (1, 2.0), (1, 3.0)))
        self.register_buffer("calls", torch.zeros(()))

    def loss(self) -> Terms:
        """Two rows; the gradient of each part, by w, is V and U."""
        self.calls += 1
        v, u = self.v / 2 * (V @ self.w) * torch.ones(2), self.u * (U @ self.w) * torch.tensor([0.0, 2 / 3])
        return Terms(0.7 * v + 0.3 * u, {"v": v, "u": u})


def test_a_cosine_known_beforehand() -> None:
    """The heads' own gradients, 3.5 and -2 / 3, count for nothing, nor do the weights of the parts in the loss."""
    net = Fork()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = probe_net(net, Reads(), ("v", "u"), noised(), net.loss)
    assert found.norms == pytest.approx({"v": 5.0, "u": 2.0})
    assert found.cosines == pytest.approx({"v,u": -0.8})
    assert found.drift is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert compare_gradients(net, ("u", "v"), net.loss)[1] == pytest.approx({"u,v": -0.8})
    assert probe_net(net, Reads(), ("v",), noised(), net.loss) is None


def test_parts_that_share_nothing_have_no_cosine() -> None:
    class Apart(Fork):
        def loss(self) -> Terms:
            parts = {"v": self.v.expand(2), "u": self.u.expand(2), "watched": torch.ones(2)}
            return Terms(parts["v"] + parts["u"], parts)

    norms, cosines = compare_gradients(net := Apart(), ("v", "u", "watched"), net.loss)
    assert norms == {"v": 0, "u": 0, "watched": 0}
    assert cosines.keys() == {"v,u", "v,watched", "u,watched"}
    assert all(math.isnan(value) for value in cosines.values())


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_trunk_of_a_net_is_what_both_heads_reach(checkpoint: bool) -> None:
    """Against the gradients of the two parts by autograd, over all parameters but those of the heads."""
    objective = DuMo(slope=DualSlope())
    torch.manual_seed(0)
    net = DiT(width=16, depth=2, attention=2, patch=2, checkpoint=checkpoint).build(objective.needs, (1, 4, 4), 2)
    for p in net.parameters():
        p.data = 0.3 * torch.randn_like(p)
    x, c = torch.randn(8, 1, 4, 4), torch.arange(8) % 2
    b = draw(objective, Linear(), x, c, torch.full_like(c, 2), seed=0, step=0)

    def loss() -> Terms:
        return objective.loss(net, frozen(net), b)

    trunk = [p for name, p in net.named_parameters() if not name.startswith("heads")]
    v, u = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss().parts[part].mean(), trunk)]) for part in ("v", "u")
    )
    norms, cosines = compare_gradients(net, ("v", "u"), loss)
    assert norms == pytest.approx({"v": v.norm().item(), "u": u.norm().item()}, rel=1e-5)
    assert cosines == pytest.approx({"v,u": torch.cosine_similarity(v, u, 0).item()}, rel=1e-4)


def affine(a: float) -> Reads:
    """Velocity 2 x + t and endpoint a x^2 + 3 t^2, whose drift is 2 a x (2 x + t) + 6 t."""
    return Reads(velocity=lambda x, t, c: 2 * x + t[:, None], endpoint=lambda x, t, c: a * x**2 + 3 * t[:, None] ** 2)


def test_the_drift_of_an_endpoint_known_beforehand() -> None:
    b = noised()
    x, t = b.x_t, b.t[:, None]
    wanted = (2 * 0.7 * x * (2 * x + t) + 6 * t).square().mean().item()
    assert endpoint_drift(affine(0.7), b) == pytest.approx(wanted, rel=1e-9)  # of squares a central difference is exact
    assert endpoint_drift(Reads(velocity=affine(1.0).velocity), b) is None


@pytest.mark.parametrize("objective", [DuMo(guide=Guide()), MeanFlow(guide=Guide())], ids=lambda o: o.kind)
def test_the_readings_of_an_exact_net_do_not_drift(objective: Objective) -> None:
    net = Exact(APART, objective.needs)
    b = record(objective, APART, 64)
    assert (endpoint_drift(objective.read(net), b) or 0) < 1e-6  # O(h^2), squared
    if objective.kind == "dumo":
        net.probe.data[1, 0] = 0.2  # u is off by 0.2, so the endpoint by 0.2 t
        assert endpoint_drift(objective.read(net), b) == pytest.approx(0.2**2, rel=1e-2)


def probes(spec: Train, state: State | None = None, *hooks: Every) -> tuple[State, dict[int, Probe]]:
    """Train, and keep what was found by step."""
    found: dict[int, Probe] = {}

    def keep(state: State, record: Record) -> None:
        if record.probe:
            found[record.step] = record.probe

    return run(state or begin(Small(dtype=torch.float32), spec), spec, hooks=[Every(1, keep), *hooks]), found


SPEC = Train(steps=9, batch=12, micro_batch=3, ema=AVERAGES, ref=0.9, clip=0.5)


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without() -> None:
    without, none = probes(SPEC)
    watched, found = probes(SPEC.model_copy(update={"probe_every": 2}))
    assert same(tensors(without), tensors(watched))
    assert not none
    assert [*found] == [2, 4, 6, 8]
    assert all(-1 <= probe.cosines["v,pull"] <= 1 and min(probe.norms.values()) > 0 for probe in found.values())
    assert not probes(SPEC.model_copy(update={"probe_every": 0}))[1]


def test_it_is_of_the_step_s_own_rows_after_the_step() -> None:
    """Those of its last piece, at the weights that the step leaves."""
    state, found = probes(SPEC.model_copy(update={"steps": 4, "probe_every": 4, "ref": "self"}))
    x, c = batches(12, torch.float32)(3)
    b = draw(Toy(), Linear(), x, c, torch.full_like(c, CLASSES), seed=0, step=3, progress=0.75)[9:]
    norms, cosines = compare_gradients(state.net, ("v", "pull"), lambda: Toy().loss(state.net, frozen(state.net), b))
    assert found[4] == Probe(norms, cosines, None)


def test_one_part_has_nothing_to_agree_with() -> None:
    calls: list[int] = []

    def alone(terms: Terms, b: Noised) -> Terms:
        """Without the pull."""
        calls.append(len(b.t))
        return Terms(terms.parts["v"], {"v": terms.parts["v"]})

    spec, found = Train(steps=3, batch=12, probe_every=1), list[Record]()
    hook = Every(1, lambda _, record: found.append(record))
    state = begin(Small(), spec)
    train(state, flow_of(state, spec, toy(alone), Linear(), CLASSES), batches(), spec, [hook])
    assert [record.probe for record in found] == [None] * 3
    assert calls == [12] * 3  # no pass for nothing
