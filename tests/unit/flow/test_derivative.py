"""A wrong du/dt is found, also on a network whose last layers are zero; a right one passes, however it is computed."""

import re

import pytest
import torch
from torch import Tensor, nn

import dumo
from contract.own import Perceptron, waves
from dumo.flow import derivative, trainable
from dumo.flow.adapter import NetAdapter
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.flow.slope import Along, DualSlope
from dumo.nets import DiT
from dumo.objectives import DuMo
from dumo.types import Cond, Frozen, Heads, Net, Sample, UserError
from unit.flow.test_refusals import TWO, Around, DetachesTime, X, points, slope

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
DUAL = slope("dual")


def make_dual_wrong(monkeypatch: pytest.MonkeyPatch, factor: float = 1.05) -> None:
    """Multiply every du/dt of `dual` by a factor."""
    own = DualSlope.__call__

    def wrong(self: DualSlope, net: Net, ref: Frozen, x: Sample, c: Cond, **inputs: Tensor) -> tuple[Heads, Along]:
        heads, along = own(self, net, ref, x, c, **inputs)
        return heads, lambda w: tuple(factor * du_dt for du_dt in along(w))

    monkeypatch.setattr(DualSlope, "__call__", wrong)


def fresh_dit() -> nn.Module:
    torch.manual_seed(0)
    return DiT(patch=4, width=16, depth=2, attention=1).build(TWO, (1, 8, 8), 0)


# ------------------------------------------------------------------------------------------------------- planted errors


def test_five_percent_are_found_on_a_fresh_dit_whose_zero_layers_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dumo.Flow(fresh_dit(), DUAL).check(IMAGES).startswith("dual: ")
    make_dual_wrong(monkeypatch)
    with pytest.raises(UserError, match=r"not dual: du/dt has a relative error of 0\.05 "):
        dumo.Flow(fresh_dit(), DUAL)(IMAGES)

    # The zero layers of the network itself hide the error: all that it computes is zero.
    monkeypatch.setattr("dumo.flow.module.copy_without_zero_layers", lambda net: None)
    assert dumo.Flow(fresh_dit(), DUAL).check(IMAGES) == "dual: relative error 0 against a central difference"


def test_without_a_named_slope_jvp_is_taken_for_a_wrong_dual(monkeypatch: pytest.MonkeyPatch) -> None:
    make_dual_wrong(monkeypatch)
    assert dumo.Flow(fresh_dit()).check(IMAGES).startswith("jvp: ")


def test_a_network_too_large_to_copy_is_compared_again_after_100_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivative, "_MAX_COPIED_PARAMETERS", 0)
    make_dual_wrong(monkeypatch)
    flow = dumo.Flow(fresh_dit(), DUAL)
    flow(IMAGES)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    flow.step = 99
    flow(IMAGES)
    with pytest.raises(UserError, match=r"not dual: du/dt has a relative error of 0\.05 "):
        flow(IMAGES)


def test_a_slope_that_is_nearly_right_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    make_dual_wrong(monkeypatch, 1.02)
    with pytest.raises(UserError, match=r"a relative error of 0\.02 "):
        dumo.Flow(points(), DUAL).check(X)
    make_dual_wrong(monkeypatch, 1 / 1.02)
    assert dumo.Flow(points(), DUAL).check(X).startswith("dual: ")


# ------------------------------------------------------------------------------------------------- which slope is taken


class AsksForTensors(Around):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(x, Tensor)
        return self.net(x, t)


class FloatsTime(Around):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        sizes = torch.tensor([[3 * float(s)] for s in t])
        return tuple(sizes * head for head in self.net(x, t))


def test_where_dual_does_not_run_jvp_is_taken() -> None:
    flow = dumo.Flow(AsksForTensors())
    flow(X)
    assert flow.slope_report.startswith("jvp: ")
    assert "not dual" in flow.slope_report
    assert flow.slope_report in repr(flow)


def test_the_slope_of_a_resumed_state_is_taken() -> None:
    first = dumo.Flow(AsksForTensors())
    first.check(X)
    other = dumo.Flow(points())
    other.set_extra_state(first.get_extra_state())
    assert other.check(X).startswith("jvp")


@pytest.mark.parametrize("build", [DetachesTime, FloatsTime])
def test_where_time_is_cut_off_a_difference_is_named_and_serves(build: type[Around]) -> None:
    with pytest.raises(UserError, match='"central"'):
        dumo.Flow(build())(X)
    assert dumo.Flow(build(), slope("central")).check(X).startswith("central: ")


# -------------------------------------------------------------------------------------------------------- the reference


class Float32Embedding(nn.Module):
    """Waves of up to 1000 radians, in float32 whatever the type of the weights, as diffusers embeds times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(18, 32), nn.SiLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return self.layers(torch.cat([x, waves(100 * t.float()).to(x.dtype)], 1)).chunk(2, 1)


def test_a_network_that_embeds_time_in_float32_is_compared() -> None:
    text = dumo.Flow(Float32Embedding()).check(X)
    found = re.fullmatch("dual: relative error (.+) against a central difference", text)
    assert found
    assert float(found[1]) < 0.003


def test_the_reference_is_the_derivative_to_seven_digits() -> None:
    b = draw(DuMo(), Linear(), X, torch.zeros(8, dtype=torch.long), 0, seed=0, step=0)
    net = NetAdapter(points(), TWO, None, labelled=False)
    inputs = trainable.inputs_of(b, TWO)
    exact, gap = derivative.central_difference(net, b.x_t, b.v_t, b.c, inputs)
    assert gap < 1e-7
    net_in_float64 = points().double()
    _, tangents = torch.func.jvp(
        lambda x, t: net_in_float64(x, t),
        (b.x_t.double(), b.t.double()),
        (b.v_t.double(), torch.ones(8, dtype=torch.float64)),
    )
    for found, true in zip(exact, tangents, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-7, atol=1e-7)


class JoinsLate(nn.Module):
    """It takes x and times apart, in the types in which they come, or x in 16 bits."""

    def __init__(self, *, casts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(2, 16)
        self.time = nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)
        self.casts = casts

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        if self.casts:
            x = x.bfloat16()
        h = self.into(x) + self.time(waves(t).to(x.dtype))
        return self.out(nn.functional.silu(h)).to(x.dtype).chunk(2, 1)


@pytest.mark.parametrize("case", ["latents of 16 bits", "weights of 16 bits", "casts inside"])
def test_du_dt_is_not_compared_where_differences_cannot_be_taken(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case != "casts inside":
        monkeypatch.setattr(derivative, "_MAX_COPIED_PARAMETERS", 0)
    net = JoinsLate(casts=case == "casts inside")
    x = X if case == "casts inside" else X.bfloat16()
    if case == "weights of 16 bits":
        net = net.bfloat16()
    flow = dumo.Flow(net)
    with torch.autocast("cpu", torch.bfloat16, enabled=case != "weights of 16 bits"):
        assert flow(x).isfinite()
    assert flow.slope_report.startswith("dual: not checked")


def test_a_network_of_16_bits_is_compared_in_float64() -> None:
    flow = dumo.Flow(JoinsLate().bfloat16())
    assert flow(X.bfloat16()).isfinite()
    assert flow.slope_report.startswith("dual: ")
    assert "not checked" not in flow.slope_report


def test_layers_of_zeros_are_noise_in_the_copy_alone() -> None:
    net = Perceptron(TWO)
    nn.init.zeros_(net.out.weight)
    nn.init.zeros_(net.out.bias)
    copied = derivative.copy_without_zero_layers(net)
    assert isinstance(copied, Perceptron)
    assert copied.out.weight.any()
    assert copied.out.bias.any()
    assert torch.equal(copied.body[0].weight, net.body[0].weight)
    assert not net.out.weight.any()


def test_a_device_without_float64_is_compared_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MPS, on which no tensor may become float64."""
    devices: list[str] = []
    own = derivative.float64_copy

    def watch(net: nn.Module, device: torch.device) -> nn.Module:
        devices.append(device.type)
        return own(net, device)

    monkeypatch.setattr(derivative, "float64_copy", watch)
    dumo.Flow(points()).check(X)
    assert devices == ["cpu"]
