"""What is not trained is there once, is in no checkpoint, and changes no number of what is."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dumo.training.checkpoint import parts_of
from dumo.training.duration import Duration
from dumo.training.ema import MovingAverage
from dumo.training.frozen import digest, frozen_weights, trained_state_dict
from dumo.training.milestone import save_milestone
from dumo.training.optim import AdamW
from dumo.training.settings import Train
from dumo.training.state import State, begin
from dumo.types import UserError
from unit.training.adapted import Adapted
from unit.training.by_path import restore, restore_last_finite, save
from unit.training.toy import AVERAGES, Small, run, same, tensors

SPEC = Train(steps=4, batch=12, ema=AVERAGES, ref=0.99, clip=1.0)
ADAPTERS = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("down", "up")}


def whole(spec: Train) -> State:
    """A state in which nothing is shared and the optimizer is handed the adapters: the same run, in more memory."""
    net = Adapted()
    averages = {ema.decay: MovingAverage(ema, net) for ema in spec.ema}
    for average in averages.values():
        average.module = deepcopy(net).requires_grad_(False).eval()
    return State(
        net, AdamW().optimizer_of([p for p in net.parameters() if p.requires_grad]), Duration.of(spec), averages
    )


def shared(state: State, average: MovingAverage) -> dict[str, bool]:
    """Which parameters and buffers of an average are the net's own tensors."""
    there = dict([*average.module.named_parameters(), *average.module.named_buffers()])
    return {name: there[name] is x for name, x in [*state.net.named_parameters(), *state.net.named_buffers()]}


def test_sharing_changes_no_number() -> None:
    ours, theirs = run(begin(Adapted(), SPEC), SPEC), run(whole(SPEC), SPEC)
    assert same(tensors(ours), tensors(theirs))
    before, after = Adapted().state_dict(), ours.net.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == ADAPTERS


def test_an_average_holds_what_is_trained() -> None:
    state = run(begin(Adapted(), SPEC), SPEC)
    for average in state.averages.values():
        assert {name for name, is_shared in shared(state, average).items() if not is_shared} == ADAPTERS
        assert average.module.get_parameter("again.weight") is average.module.get_parameter("first.weight")
        assert not any(torch.equal(average.module.get_parameter(n), state.net.get_parameter(n)) for n in ADAPTERS)
        assert not any(p.requires_grad for p in average.module.parameters())
    assert all(state.net.get_parameter(name).requires_grad for name in ADAPTERS)
    assert not any(shared(begin(Small(), SPEC), MovingAverage(AVERAGES[0], Small())).values())


def test_the_optimizer_has_what_is_trained() -> None:
    state = run(begin(Adapted(), SPEC), SPEC)
    assert {name.partition(".")[2] for name in parts_of(state)["optimizer"]} == ADAPTERS
    (group,) = state.optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(state.net.get_parameter(name)) for name in ADAPTERS}


def test_a_checkpoint_holds_what_is_trained_and_comes_back(tmp_path: Path) -> None:
    old = run(begin(Adapted(), SPEC), SPEC)
    target = save(tmp_path / "checkpoints", old, 1)
    for part in ("net", "ema-0.99", "ema-0.9"):
        assert load_file(target / part / "00000.safetensors").keys() == ADAPTERS
    assert load_file(save_milestone(tmp_path, old)).keys() == ADAPTERS

    new = begin(Adapted(seed=1), SPEC)
    restore(target, new)
    assert same(tensors(old), tensors(new))
    longer = SPEC.model_copy(update={"steps": 6})
    assert same(tensors(run(new, longer)), tensors(run(old, longer)))
    assert {name for name, is_shared in shared(new, new.averages[0.9]).items() if not is_shared} == ADAPTERS


def test_other_frozen_weights_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    target = save(tmp_path, run(begin(Adapted(), SPEC), SPEC), 1)
    other = begin(Adapted(source=1), SPEC)
    before = tensors(other)
    with pytest.raises(UserError):
        restore_last_finite(target, other)
    assert same(before, tensors(other))


def test_the_digest_is_of_what_is_frozen_alone() -> None:
    assert digest(Small()) is None
    assert digest(Adapted().to("meta")) is None
    one = digest(Adapted())
    assert one == digest(Adapted(seed=1))
    assert one != digest(Adapted(source=1))
    assert one != digest(Adapted(width=11))
    assert one != digest(Adapted(dtype=torch.float32))
    odd = Adapted()
    odd.last.bias.data[0] += 1e-15
    assert one != digest(odd)


@pytest.mark.parametrize("x", [torch.zeros(()), torch.zeros(0, 3), torch.ones(1000, dtype=torch.bfloat16)])
def test_any_tensor_has_a_digest(x: Tensor) -> None:
    def of(x: Tensor) -> str | None:
        net = nn.Module()
        net.x = nn.Parameter(x, requires_grad=False)
        return digest(net)

    assert of(x) == of(x.clone())
    assert of(x) != of(x.reshape(-1, 1))
    if x.numel():
        assert of(x) != of(x + 1)


def test_names_are_those_of_the_state_dict() -> None:
    """A weight in two places is frozen in both."""
    net = Adapted()
    assert {"first.weight", "again.weight"} < frozen_weights(net).keys()
    assert trained_state_dict(net).keys() | frozen_weights(net).keys() == net.state_dict().keys()
