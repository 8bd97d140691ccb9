"""What `dumo.Flow` must hold to, although nothing would look wrong if it did not: see the comment at each line."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.optim.swa_utils import AveragedModel

import dumo
from contract.own import Perceptron, UNet
from dumo.flow.guide import CFG
from dumo.flow.module import Flow
from dumo.flow.path import Linear, Trig
from dumo.runtime import dist
from dumo.types import Frozen, Net, NoisyBatch, Terms
from unit.flow.test_flow import CASES, CLASSES, LABELS, TWO, flow_of, points
from unit.flow.test_refusals import Around, X
from unit.flow.test_refusals import points as net_of_points


def test_weights_of_theta_and_of_a_teacher_are_not_the_flows() -> None:
    """As submodules they would be trained, synchronized by DDP and saved."""
    case = CASES["points"]
    flow = case.flow(ref=AveragedModel(case.flow().net), teacher=case.flow("flow_matching"))
    names = [f"net.{name}" for name, _ in flow.net.named_parameters()]
    assert [name for name, _ in flow.named_parameters()] == names
    assert {*flow.state_dict()} == {*names, "_extra_state"}


@pytest.mark.usefixtures("two_ranks")
def test_ranks_drop_other_units() -> None:
    case = CASES["dropout"]
    masks: list[Tensor] = []
    for rank in range(2):
        flow = case.flow(shard=(rank, 2))
        assert isinstance(flow.net, UNet)
        flow.check(case.x, case.c)
        flow.net.dropout.register_forward_hook(lambda _, __, h: masks.append(h.detach() == 0))
        adapter = flow._adapter(case.c, flow._generator_key(0))
        adapter(case.x, LABELS, t=torch.ones(len(case.x)))
    assert masks[0].any()
    assert not torch.equal(*masks)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_network_that_draws_takes_the_derivative_of_all_rows(dropout: float) -> None:
    """A pass of the moving rows alone would draw other masks for them."""

    class Drops(Around):
        def forward(self, x: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
            x = nn.functional.dropout(x, dropout, self.training)
            return self.net(x, t + r)[:1]

    flow = dumo.Flow(Drops(), {"kind": "meanflow", "times": {"kind": "pair", "velocity_ratio": 0.5}})
    flow(X)
    moving = flow._noisy_batch(X, None, 1)[0].moving
    assert (moving is None) == bool(dropout)


@pytest.mark.parametrize("keeps", [True, False])
def test_casts_of_weights_are_kept_only_if_asked(keeps: bool) -> None:
    """Casts of gathered weights would stay in memory to the end of the loss."""
    flow = flow_of("flow_matching", CLASSES, precision="bf16")
    kept: list[bool] = []

    def loss(net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        kept.append(torch.is_autocast_cache_enabled())
        return flow.objective.loss(net, ref, b)

    batch = flow._noisy_batch(points(), LABELS, 0)[0]
    flow.compute_loss(batch, loss=loss, cache_casts=keeps)
    assert kept == [keeps]


def test_the_loss_is_in_the_precision_of_the_caller_or_of_the_flow() -> None:
    case = CASES["points"]

    def loss(precision: Any, is_called_in_bf16: bool) -> float:  # noqa: ANN401
        flow = case.flow(precision=precision)
        flow.check(case.x, case.c)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_called_in_bf16):
            return flow(case.x, case.c).item()

    plain, low = loss(None, False), loss("bf16", False)
    assert plain != low
    assert loss(None, True) == low
    assert loss("fp32", True) == plain


def test_layers_that_a_validation_in_inference_mode_makes_can_be_trained() -> None:
    class Lazy(Around):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = nn.LazyLinear(2)

        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            return self.net(self.lazy(x), t)

    flow = dumo.Flow(Lazy()).eval()
    with torch.inference_mode():
        flow(X.clone(), step=0)
    flow.train()(X).backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_no_guide_means_the_flows_own_and_a_plain_one_means_none() -> None:
    flow = flow_of("flow_matching", CLASSES, guide=CFG(scale=3.0))
    plain = flow_of("flow_matching", CLASSES)
    x, t = points(), torch.full((len(LABELS),), 0.5)

    def velocity(flow: Flow, guide: CFG | None) -> Tensor:
        read = flow.readings(guide=guide).velocity
        assert read is not None
        return read(x, t, LABELS)

    assert torch.equal(velocity(flow, CFG()), velocity(plain, None))
    assert not torch.allclose(velocity(flow, None), velocity(plain, None))


def test_a_network_that_is_called_directly_gets_no_adapter() -> None:
    """An adapter would hide `compile_tangents`, which a slope reads off theta^-."""
    net = Perceptron(TWO)
    flow = dumo.Flow(net, direct=True)
    assert flow._net_for_objective(None, None) is net
    assert flow._theta_minus(net).module is net
    assert dumo.Flow(net)._theta_minus(adapter := dumo.Flow(net)._adapter(None, None)).module is adapter


@pytest.fixture
def one_rank() -> Generator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_sharded_network_is_in_shards_again_after_samples() -> None:
    """The next optimizer step would not update weights that are whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    net = fully_shard(nn.Linear(3, 2))
    flow = dumo.Flow(net, "flow_matching", call=lambda net, x, t, c: net(torch.cat([x, t[:, None]], 1)))
    flow(points()).backward()
    flow.sample(2)
    assert all(isinstance(p, DTensor) for p in net.parameters())


@pytest.mark.usefixtures("two_ranks")
def test_a_batch_that_grows_on_one_rank_is_refused() -> None:
    """Its rows would have the noise of the next rank's."""
    flow = dumo.Flow(net_of_points(), shard=(0, 2))
    flow(X)
    flow(X[:4])
    flow(X)
    for step in (None, 9):
        with pytest.raises(dumo.UserError, match="16 rows on rank 0 of 2, but earlier batches had at most 8"):
            flow(torch.cat([X, X]), step=step)
    alone = dumo.Flow(net_of_points())
    alone(X)
    alone(torch.cat([X, X]))
    flow.eval()(torch.cat([X, X]), step=0)


@pytest.mark.parametrize("sizes", [(8, 5, 6), (3, 8, 2), (2, 2, 8)])
def test_ranks_with_batches_of_unequal_sizes_share_no_noise(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest first batch of all ranks counts."""

    def values_of_ranks(value: object) -> list[object]:
        return [(True, size) if isinstance(value, tuple) else size for size in sizes]

    monkeypatch.setattr(dist, "all_values", values_of_ranks)
    noises: list[Tensor] = []
    for rank, size in enumerate(sizes):
        flow = dumo.Flow(net_of_points(), shard=(rank, len(sizes)))
        flow(X[:size])
        batch, _ = flow._noisy_batch(X[:size], None, 1)
        noises.append(batch.z)
    rows = torch.cat(noises)
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize(
    ("objective", "settings", "name"),
    [
        ("flow_matching", {}, "objective.kind was dumo, and is flow_matching"),
        ({"kind": "dumo", "beta": 0.2}, {}, "objective.beta was 0.7, and is 0.2"),
        ("dumo", {"time_scale": 2.0}, "time_scale was 1.0, and is 2.0"),
        ("dumo", {"path": Trig()}, "path.kind was linear, and is trig"),
        ("dumo", {"path": Linear(sd=0.5)}, "path.sd was 1.0, and is 0.5"),
    ],
)
@pytest.mark.parametrize("is_trained", [False, True])
def test_a_state_is_loaded_into_a_flow_that_learns_the_same_alone(
    objective: str | dict[str, object], settings: dict[str, Any], name: str, is_trained: bool
) -> None:
    flow = dumo.Flow(net_of_points())
    if is_trained:
        flow(X)
    state = flow.state_dict()
    dumo.Flow(net_of_points(), guide=CFG(), seed=3).load_state_dict(state)
    with pytest.raises(dumo.UserError, match=name):
        dumo.Flow(net_of_points(), objective, **settings).load_state_dict(state)


def test_a_buffer_that_holds_nan_is_named() -> None:
    net = net_of_points()
    net.register_buffer("scale", torch.tensor([1.0, torch.nan]))
    with pytest.raises(dumo.UserError, match="'scale' contains NaN"):
        dumo.Flow(net)(X)


def test_samples_of_another_thread_leave_the_mode_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that trains would lose its dropout meanwhile."""
    case = CASES["dropout"]
    flow = case.flow()
    assert isinstance(flow.net, UNet)
    flow(case.x, case.c)
    before = flow.net.dropout.training, flow.net.dropout.forward
    seen: list[tuple[bool, bool]] = []

    def drop(part: nn.Dropout, h: Tensor) -> Tensor:
        seen.append((part.training, flow.net.dropout.training))
        return nn.functional.dropout(h, part.p, part.training)

    monkeypatch.setattr(nn.Dropout, "forward", drop)
    with ThreadPoolExecutor(1) as pool:
        samples = pool.submit(flow.sample, 2).result()
        velocity = pool.submit(flow.velocity, case.x, 0.5, case.c).result()
    assert {*seen} == {(False, True)}
    assert flow.net.dropout.training == before[0]
    assert torch.equal(samples, flow.sample(2))
    assert torch.equal(velocity, flow.velocity(case.x, 0.5, case.c))


@pytest.mark.parametrize("is_training", [True, False])
def test_a_first_loss_that_one_rank_validates_alone_is_refused(
    is_training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "all_values", lambda value: [value, (not value[0], value[1])])
    with pytest.raises(dumo.UserError, match="validate on all ranks"):
        dumo.Flow(net_of_points()).train(is_training)(X)
