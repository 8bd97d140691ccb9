"""A plan for ranks says what those ranks would hold and send, and is made by one process."""

import re
from dataclasses import asdict

import pytest
import torch.distributed

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.plan import cluster, plan
from dumo.run import memory
from dumo.run.net import outline
from dumo.training.muon import block_matrices
from dumo.types import UserError
from unit.run.adapted import freeze

GUIDED = ("net.width=64", "net.depth=1", "net.attention=2", "train.batch=64", "objective.guide.zeta=0.5")
RANKS = 8


def small(*words: str) -> Run:
    """Digits, guided: a dual slope that rides on the tape."""
    return load("digits", [*GUIDED, *words])


def counted(spec: Run, ranks: int = RANKS) -> cluster.RankStep:
    """A rank's step."""
    return cluster.count_step(outline(spec), spec.objective, spec.path, spec.data.shape, spec.train, ranks)


def held(spec: Run) -> dict[str, int]:
    """Bytes between passes, where each rank holds all."""
    return asdict(memory.held_bytes(outline(spec), spec.train))


@pytest.fixture(scope="module")
def steps() -> dict[str, cluster.RankStep]:
    """A rank's step of eight: each with all weights; in parts, by four passes; in parts that are given back."""
    layouts = {
        "replicated": (),
        "passes": ("train.share=8", "train.micro_batch=2"),
        "given back": ("train.share=8", "train.reshard=true"),
    }
    return {name: counted(small(*words)) for name, words in layouts.items()}


@pytest.mark.nightly
def test_ranks_hold_their_share(steps: dict[str, cluster.RankStep]) -> None:
    alone, whole = held(small()), steps["replicated"].memory
    for name in ("weights", "optimizer", "averages"):
        assert whole[name] == pytest.approx(alone[name], rel=0.01)
        for sharded in ("passes", "given back"):
            part = steps[sharded].memory[name]
            assert alone[name] / RANKS <= part <= 1.2 * alone[name] / RANKS  # shards are as large as the largest
    assert whole["gathered"] == pytest.approx(alone["gradients"], rel=0.01)
    assert steps["passes"].memory["gradients"] == pytest.approx(alone["gradients"], rel=0.01)  # whole until the last
    assert steps["given back"].memory["activations"] == pytest.approx(whole["activations"], rel=0.25)
    rows = {name: step.rows for name, step in steps.items()}
    assert rows == {"replicated": 8, "passes": 2, "given back": 8}
    assert steps["passes"].memory["activations"] < 0.5 * whole["activations"]


@pytest.mark.nightly
def test_what_is_frozen_has_no_gradients_and_lies_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a rank with all weights as without ranks, in a share of it, and in no checkpoint."""
    freeze(monkeypatch)
    spec = small("train.share=8")
    alone, part = held(spec), counted(spec).memory
    assert alone["gradients"] < 0.5 * alone["weights"]
    for name in ("weights", "optimizer", "averages"):
        assert alone[name] / RANKS <= part[name] <= 1.25 * alone[name] / RANKS  # the table of positions is whole
    kept = [p.nbytes for p in outline(spec).parameters() if p.requires_grad]
    assert 4 * sum(kept) == pytest.approx(cluster.cluster(spec, RANKS)["checkpoint"]["bytes"], rel=0.02)


def test_ranks_send_what_their_layout_asks_for(steps: dict[str, cluster.RankStep]) -> None:
    """As test_collective.py counts it of real steps, in copies of all weights."""
    expected = {
        "replicated": {"all-reduce": 1},
        "passes": {"all-gather": 1, "reduce-scatter": 1},
        "given back": {"all-gather": 4, "reduce-scatter": 1},
    }
    whole = held(small())["gradients"]
    for name, step in steps.items():
        assert step.passes == (4 if name == "passes" else 1), name
        assert step.sent.keys() == step.calls.keys() == expected[name].keys(), name
        for kind, copies in expected[name].items():
            assert step.calls[kind] == 2 * copies, (name, kind)  # the block, and the rest of the net
            assert copies <= step.sent[kind] / whole <= 1.05 * copies, (name, kind)
    assert not torch.distributed.is_initialized()


def test_muon_gathers_each_matrix_once_more(steps: dict[str, cluster.RankStep]) -> None:
    spec = small("train.share=8", "train.optimizer.kind=muon")
    step, found = counted(spec), block_matrices(outline(spec))
    assert step.calls["all-gather"] == steps["passes"].calls["all-gather"] + len(found)
    more = step.sent["all-gather"] - steps["passes"].sent["all-gather"]
    assert more == sum(p.nbytes for p in found)
    assert step.memory["optimizer"] < 0.75 * steps["passes"].memory["optimizer"]


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["digits-meanflow", "dumo-best"])
def test_rows_that_are_chosen_by_place_are_known_without_numbers(recipe: str) -> None:
    """Of r = t, and of jumps to the data."""
    words = ["net.width=64", "net.depth=1", "net.attention=2", "train.coupling=null"]
    assert counted(load(recipe, words)).rows == 32 // RANKS


@pytest.mark.nightly
def test_every_pass_gathers_what_was_given_back() -> None:
    step = counted(small("train.share=2", "train.reshard=true", "train.micro_batch=8"), 2)
    assert (step.passes, step.calls) == (4, {"all-gather": 4 * 4 * 2, "reduce-scatter": 2})


@pytest.mark.nightly
def test_what_is_given_back_leaves_no_cast_behind() -> None:
    """Autocast would keep all weights in bf16, half of them as bytes count, where one block is there at a time."""
    words = ("train.precision=bf16", "train.share=8", "train.reshard=true", "net.checkpoint=true", "train.batch=8")
    two, six = (counted(small(*words, f"net.depth={depth}")).memory for depth in (2, 6))
    four_blocks = RANKS * (six["weights"] - two["weights"])
    assert six["activations"] - two["activations"] < 0.1 * four_blocks


@pytest.mark.nightly
def test_hours_and_disk() -> None:
    spec = small("train.keep=3")
    facts = cluster.cluster(spec, 1, tflops=2.0)
    assert facts["flops"] == pytest.approx(plan.plan(spec)["flops"])
    assert facts["hours"] * 3600 * 2e12 == pytest.approx(facts["flops"])
    alone, given = held(spec), (spec.objective, spec.path, spec.data.shape)
    assert facts["memory"]["peak"] == memory.training_bytes(outline(spec), *given, spec.train, 64).total
    assert facts["checkpoint"]["bytes"] == alone["weights"] + alone["optimizer"] + alone["averages"]
    assert facts["checkpoint"]["most"] == 4 * facts["checkpoint"]["bytes"]
    more = cluster.step_units(outline(spec), *given, "self", frees_weights=True) - facts["units"]
    assert more == pytest.approx(1.0)  # a pass of its own, where there was one to ride on
    with pytest.raises(UserError, match=r"share = 2 does not divide 3"):
        cluster.cluster(small("train.share=2", "train.batch=63"), 3)


@pytest.mark.nightly
def test_bytes_of_moments_of_8_bits_and_weights_of_16() -> None:
    """Two of each three weights or so have rows of whole blocks here."""
    pytest.importorskip("bitsandbytes")
    words = ("train.share=2", "train.precision=bf16", "net.width=256", "train.ema=[]")
    plain = counted(small(*words), 2).memory
    less = counted(small(*words, "train.optimizer.kind=adamw8bit", "train.weights=bfloat16"), 2).memory
    assert less["weights"] == pytest.approx(plain["weights"] / 2, rel=0.02)
    assert less["optimizer"] < 0.3 * plain["optimizer"]


@pytest.mark.slow
def test_averages_of_weights_of_16_bits_are_in_32() -> None:
    pytest.importorskip("bitsandbytes")
    words = ("train.optimizer.kind=adamw8bit", "train.weights=bfloat16", "train.precision=bf16")
    memory = counted(small(*words), 1).memory
    assert memory["averages"] == pytest.approx(2 * memory["weights"], rel=0.02)


@pytest.mark.nightly
def test_the_first_layout_that_fits() -> None:
    spec, tried = small(), list[str]()
    peak = sum(counted(spec, 2).memory.values())
    assert cluster.fit(spec, 2, peak) == {}
    assert cluster.fit(spec, 2, peak - 1, tried.append) == {"train.micro_batch": 16}
    assert [line.partition(":")[0] for line in tried] == ["as it is", "train.micro_batch=8", "train.micro_batch=16"]


@pytest.mark.nightly
def test_a_base_of_fewer_bits_is_the_last_way_and_of_a_lora_alone() -> None:
    """And no way is one that the run has gone already, or cannot go."""
    words = [
        "net.kind=diffusers",
        "net.texts.kind=codes",
        "pipeline=sd3-digits",
        "net.checkpoint=true",
        "train.batch=2",
    ]
    tried: list[str] = []
    for spec in (load("digits", [*words, "net.lora.rank=4"]), load("digits", words)):
        tried.append("")
        rank = "net.lora.rank below 4, " if spec.net.lora else ""
        said = f"no layout keeps within 1 KiB on each of 1 rank: .*: {rank}train.optimizer.kind=adamw8bit, "
        with pytest.raises(UserError, match=said):
            cluster.fit(spec, 1, 1024, tried.append)
    names = [line.partition(":")[0] for line in tried]
    coded = [f"net.lora.frozen={one}{rows}" for one in ("int8", "nf4") for rows in ("", " train.micro_batch=1")]
    assert names == ["", "as it is", "train.micro_batch=1", *coded, "", "as it is", "train.micro_batch=1"]


def test_all_blocks_are_computed_again_where_every_second_one_is() -> None:
    tried: list[str] = []
    with pytest.raises(UserError, match="no layout keeps within 1 KiB"):
        cluster.fit(small("net.checkpoint=2"), 1, 1024, tried.append)
    assert any(line.startswith("net.checkpoint=true") for line in tried)


def test_where_none_fits_all_are_tried_in_order() -> None:
    """None of these is counted: weights alone are too much."""
    tried: list[str] = []
    said = r"no layout keeps within 1 KiB on each of 2 ranks: the least is more than .* KiB, train.share=2 train.*"
    said += r"; or set what is not tried: train.optimizer.kind=adamw8bit, train.weights=bfloat16 .*, train.ema=\[\]$"
    with pytest.raises(UserError, match=said):
        cluster.fit(small("train.batch=32"), 2, 1024, tried.append)
    layouts = list(dict.fromkeys(line.partition(":")[0].replace(" train.micro_batch=8", "") for line in tried))
    share, checkpoint = "train.share=2", "net.checkpoint=true"
    reshard = f"{share} train.reshard=true"
    ways = [checkpoint, share, f"{checkpoint} {share}", reshard, f"{checkpoint} {reshard}"]
    assert layouts == ["as it is", "train.micro_batch=8", *ways]


def test_captions_may_stay_on_the_host() -> None:
    """Which is said, and not tried."""
    words = ["net.width=16", "net.depth=1", "net.attention=2"]
    for on_device, hint in (("1", "net.texts.memory=0 (captions stay on the host)"), ("0", "train.ema=[]")):
        with pytest.raises(UserError, match=rf"{re.escape(hint)}$"):
            cluster.fit(load("text-256", [*words, f"net.texts.memory={on_device}"]), 1, 1024)
