"""What a run costs, counted by one process: memory by layout on one rank and on several, operations, hours, disk."""

from dataclasses import asdict

import pytest
import torch.distributed

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.plan import cluster, cost
from dumo.plan.cost import LayoutMemory, count_cost, layouts
from dumo.run import memory
from dumo.run.flops import StepCost
from dumo.run.net import make_flow, meta_net
from dumo.run.weights import build
from dumo.runtime.random import random_batch
from dumo.training.frozen import trained_state_dict
from dumo.training.state import State, begin
from dumo.types import UserError
from e2e.shell import call
from recipe import recipe
from trained import ToyTrainer
from unit.run.adapted import freeze

TINY = ("net.width=16", "net.depth=1", "net.attention=2")
GUIDED = ("net.width=64", "net.depth=1", "net.attention=2", "train.batch=64", "objective.guide.zeta=0.5")
LORA = ["net.kind=diffusers", "net.texts.kind=codes", "pipeline=sd3-digits", "train.batch=2"]
RANKS = 8


def small(*words: str) -> Run:
    """Digits, guided: a dual slope that rides on the tape."""
    return load("digits", [*GUIDED, *words])


def counted(run: Run, ranks: int = RANKS) -> LayoutMemory:
    """The memory of a rank, as the run is."""
    return cost._count_memory("as is", run, ranks)


def held(run: Run) -> memory.HeldBytes:
    """Bytes between steps, where each rank holds all."""
    return memory.held_bytes(meta_net(run), run.train)


@pytest.fixture(scope="module")
def whole() -> LayoutMemory:
    """The memory of a rank of eight, each with all weights."""
    return counted(small())


def test_a_share_takes_less(whole: LayoutMemory) -> None:
    shared = counted(small("train.share=8"))
    assert whole.weights == held(small()).weights
    assert shared.weights < 1.01 * whole.weights / RANKS
    assert whole.rows == shared.rows == 8
    assert shared.total < whole.total
    assert not torch.distributed.is_initialized()


@pytest.mark.nightly
def test_gathered_weights_and_their_gradients_count(whole: LayoutMemory) -> None:
    """They are whole until the last pass."""
    alone = held(small())
    passes = counted(small("train.share=8", "train.micro_batch=2"))
    assert passes.rows == 2
    assert passes.activations > alone.weights + alone.gradients
    assert passes.activations < whole.activations


@pytest.mark.nightly
def test_what_is_given_back_leaves_no_cast_behind() -> None:
    """Only the weights of a block or two are gathered at a time. Autocast would keep a copy of all of them in bf16."""
    words = ("train.precision=bf16", "train.share=8", "train.reshard=true", "net.checkpoint=true", "train.batch=8")
    two, six = (counted(small(*words, f"net.depth={depth}")) for depth in (2, 6))
    four_blocks = RANKS * (six.weights - two.weights)
    assert six.activations - two.activations < 0.3 * four_blocks  # with copies 0.39


@pytest.mark.nightly
def test_a_few_blocks_tell_of_all_on_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small("net.depth=9", "train.share=8")
    few = counted(run)
    monkeypatch.setattr("dumo.run.flops.MAX_BLOCKS_RUN", 100)
    assert counted(run) == few


@pytest.mark.nightly
@pytest.mark.parametrize("recipe_name", ["digits-meanflow", "dumo-best", "cifar10"])
def test_rows_that_are_chosen_by_place_and_dropout_need_no_numbers(recipe_name: str) -> None:
    words = ["train.coupling=null", "train.batch=32"]
    words += ["net.depth=1"] if recipe_name == "cifar10" else ["net.width=64", "net.depth=1", "net.attention=2"]
    assert counted(load(recipe_name, words)).rows == 32 // RANKS


@pytest.mark.nightly
def test_bytes_of_moments_of_8_bits_and_weights_of_16() -> None:
    """Two of each three weights or so have rows of whole blocks here. Averages are in 32 bits."""
    pytest.importorskip("bitsandbytes")
    words = ("train.precision=bf16", "net.width=256")
    plain = held(small(*words))
    less = held(small(*words, "train.optimizer.kind=adamw8bit", "train.weights=bfloat16"))
    assert less.weights == pytest.approx(plain.weights / 2, rel=0.02)
    assert less.optimizer < 0.3 * plain.optimizer
    assert less.averages == pytest.approx(2 * less.weights, rel=0.02)


def test_what_is_counted_first_leaves_the_net_as_it_is() -> None:
    net = meta_net(small("train.weights=bfloat16", "train.optimizer.kind=adamw8bit", "train.precision=bf16"))
    run = small()
    before = {name: (x.dtype, x.device) for name, x in net.named_parameters()}
    memory.held_bytes(net, run.train.model_copy(update={"weights": "bfloat16"}))
    assert {name: (x.dtype, x.device) for name, x in net.named_parameters()} == before


@pytest.mark.slow
@pytest.mark.parametrize("part", [False, True])
def test_bytes_are_those_of_real_tensors(monkeypatch: pytest.MonkeyPatch, part: bool) -> None:
    """Of each memory once: what averages share with the net is the net's."""
    if part:
        freeze(monkeypatch)
    run = load("digits", [*TINY, "train.ema=[{decay: 0.9}, {decay: 0.99}]", "train.ref=0.9", "train.batch=32"])
    found = held(run)
    state = trained_one_step(run)
    modules = [state.net, *(average.module for average in state.averages.values())]
    weights = sum(t.nbytes for t in (*state.net.parameters(), *state.net.buffers()))
    own = (value for entry in state.optimizer.state.values() for value in entry.values())
    each = {x.data_ptr(): x.nbytes for net in modules for x in (*net.parameters(), *net.buffers())}
    assert (found.weights, found.averages) == (weights, sum(each.values()) - weights)
    assert found.averages == 2 * sum(x.nbytes for x in trained_state_dict(state.net).values())
    assert found.gradients == sum(p.grad.nbytes for p in state.net.parameters() if p.grad is not None)
    assert found.optimizer == sum(value.nbytes for value in own)


def trained_one_step(run: Run) -> State:
    """The state after one step on random numbers."""
    state = begin(build(run), run.train)
    flow = make_flow(run, state)
    ToyTrainer(state, flow, run.train).step(random_batch("one", run.train.batch, run.data.shape, run.data.classes))
    return state


@pytest.mark.parametrize(("ranks", "words", "rows"), [(1, [], 32), (3, [], 11), (8, [], 4), (2, ["micro_batch=5"], 4)])
def test_memory_is_of_the_largest_pass(ranks: int, words: list[str], rows: int) -> None:
    run = load("digits", [f"train.{word}" for word in words])
    assert cost.most_rows(run, ranks) == rows


def names(run: Run, ranks: int = 1) -> list[str]:
    """The changes of the layouts."""
    return [name for name, _ in layouts(run, ranks)]


def test_layouts_are_those_that_take_less() -> None:
    checkpoint, share = "net.checkpoint=true", "train.share=8"
    assert names(small()) == ["as is", "train.micro_batch=1", checkpoint]
    assert names(small(), 8) == ["as is", "train.micro_batch=1", checkpoint, share]
    assert names(small(share, "net.checkpoint=2", "train.micro_batch=1"), 8) == ["as is", checkpoint]
    for name, run in layouts(small(), 1):
        if name == checkpoint:
            assert run.net.checkpoint is True


@pytest.mark.slow
def test_a_base_of_fewer_bits_is_a_layout_of_a_lora_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = [*LORA, "net.checkpoint=true", "net.lora.rank=4"]
    coded = [f"net.lora.frozen={coding}" for coding in ("int8", "nf4")]
    assert names(load("digits", lora)) == ["as is", "train.micro_batch=1", *coded]
    assert names(load("digits", [*lora, "net.lora.frozen=int8"])) == ["as is", "train.micro_batch=1", coded[1]]
    assert names(load("digits", [*LORA, "net.checkpoint=true"])) == ["as is", "train.micro_batch=1"]
    monkeypatch.setattr(cost, "installed_version", lambda _name: None)  # without bitsandbytes
    assert names(load("digits", lora)) == ["as is", "train.micro_batch=1"]


def test_rows_that_an_objective_needs_together_stay_together() -> None:
    """Some need rows of r < t and of r = t in a pass."""
    for run in (load("digits-imm", ["train.batch=32"]), load("digits-meanflow", ["train.batch=32"])):
        least = cost._least_micro_batch(run, 1)
        assert 1 < least < 32
        assert load("digits-imm" if run.objective.kind == "imm" else "digits-meanflow", [f"train.micro_batch={least}"])


def test_captions_that_are_not_known_yet_count_as_what_may_stay_on_the_device() -> None:
    on_device, on_host = (cost.text_bytes(load("text-256", [*TINY, f"net.texts.memory={gb}"])) for gb in (1.5, 0))
    assert (on_device, on_host) == (1.5e9, 0)


def test_hours_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_count_memory", lambda name, run, ranks: None)
    monkeypatch.setattr(cost, "step_cost", lambda *_, **__: StepCost(units=5.0, flops=10.0, pass_flops=2.0))
    run = small()
    found = count_cost(run, 2, tflops=2.0)
    assert found.flops == 10.0 * 64 * run.train.steps
    assert found.hours is not None
    assert found.hours * 3600 * 2 * 2e12 == pytest.approx(found.flops)
    assert count_cost(run).hours is None
    each = held(run)
    assert found.checkpoint_bytes == each.weights + each.optimizer + each.averages
    with pytest.raises(UserError, match="share = 2"):
        count_cost(small("train.share=2", "train.batch=63"), 3)


@pytest.mark.nightly
def test_the_memory_and_work_of_xl2() -> None:
    """118.62 G multiply-adds, 5.9 F a step (the tenth without labels needs no null pass), 240 epochs."""
    run = recipe("imagenet256-xl2")
    assert 40e9 < counted(run, 1).activations < 50e9  # 64 rows of 0.68 GB
    step = cost.step_cost(meta_net(run), run.objective, run.path, run.data.shape)
    assert step.units == pytest.approx(5.9, abs=1e-3)
    assert step.flops * 600_000 * 512 == pytest.approx(2 * 118.62e9 * 5.9 * 600_000 * 512, rel=1e-3)


def test_the_command() -> None:
    words = ("show", "moons", "--cost", "net.width=16")
    told = call(*words, "--tflops", "0.5")
    assert told.code == 0
    for word in ("operations", "hours", "1 GPU at 0.5 TFLOP/s", "checkpoints", "as is", "train.micro_batch=1", "total"):
        assert word in " ".join(told.out.split()), word
    found = call(*words, "--json").json["cost"]
    assert [row["layout"] for row in found["memory"]] == ["as is", "train.micro_batch=1"]
    row = found["memory"][0]
    assert row["total"] == sum(size for name, size in row.items() if name not in ("layout", "rows", "total"))
    assert asdict(counted(load("moons", ["net.width=16"]), 1)) == row
    assert call("show", "moons", "--ranks", "2").code == 2


def test_fake_ranks_leave_nothing_behind() -> None:
    with cluster.fake_ranks(4):
        assert torch.distributed.get_world_size() == 4
    assert not torch.distributed.is_initialized()
