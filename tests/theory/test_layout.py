"""Two ranks are one process that makes two passes, to the bit; more of them are, to rounding; in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from dumo.config import recipe_files
from dumo.config.load import load
from forked import main_of
from meeting import outputs

OTHERS = (
    "digits-words",  # tested elsewhere
    "digits-drift",  # a variant of it has groups of 8, not of 256
    "digits-pi-flow",  # among the variants, with a teacher, which it needs
)
DIGITS = [name for name in recipe_files.names() if name.partition("-")[0] == "digits" and name not in OTHERS]
VARIANTS = [
    "digits+objective.slope.kind=dual",
    "digits+train.optimizer.kind=muon",
    "digits+objective.slope.kind=dual+train.precision=bf16",
    "digits+train.coupling={group: 16}+data.held=360",
    "digits+teacher",
    "digits-pi-flow+teacher+train.clip=100",
    "digits-meanflow+pairs",
    "digits-three-heads+train.clip=100+objective.times={kind: jumps}",
    "digits+net.depth=3+net.modern=true+net.magnitude=preserved",
    "digits-match+train.clip=100+train.steps=2+objective.alpha=1.2",
    "digits-critic+train.clip=100+train.steps=2",
    "digits-drift+train.clip=100+objective.size=8+train.batch=32",
    "dumo-best",
    "moons",
]
PATIENCE = 900  # seconds, on a busy machine
FEW = {3: "digits-imm", 4: "digits-three-heads-shortcut"}  # all were tried: docs/log.md


def run(ranks: int, cases: list[str], folder: Path) -> list[dict[str, Any]]:
    """A row per case and layout, by so many processes."""
    words = (ranks, folder / f"meet-{ranks}", *cases)
    (out, _), *_ = outputs([main_of("theory.layouts", rank, *words, cwd=folder) for rank in range(ranks)], PATIENCE)
    return [json.loads(line) for line in out.splitlines()]


AVERAGE = "digits-cm+train.clip=100+train.batch=8+once"
MUON = "moons+train.optimizer.kind=muon+train.batch=8+net.depth=2+once"
CASE_NAMES = {AVERAGE: "average", MUON: "muon"}


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASE_NAMES, ids=CASE_NAMES.__getitem__)
def test_two_ranks_are_two_pieces_to_the_bit(case: str, tmp_path: Path) -> None:
    check_bits(run(2, [case], tmp_path), [case])


@pytest.mark.nightly
def test_every_recipe_on_two_ranks_to_the_bit(tmp_path: Path) -> None:
    assert len(DIGITS) >= 22
    cases = [*map(uncut, DIGITS), *VARIANTS]
    check_bits(run(2, cases, tmp_path), cases)


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", FEW)
def test_more_ranks_to_rounding_over_30_steps(ranks: int, tmp_path: Path) -> None:
    (row,) = run(ranks, [FEW[ranks]], tmp_path)
    assert 0 < row["loss"] < 2e-6, row  # IMM on three: .83e-6 on one processor, 1.2e-6 on another
    assert row["differ"], row  # it was another split


def uncut(name: str) -> str:
    """A recipe whose gradients are not cut: of shards that is to rounding (docs/gpus.md)."""
    return name if load(name).train.clip is None else f"{name}+train.clip=100"


def check_bits(rows: list[dict[str, Any]], cases: list[str]) -> None:
    """All cases in their layouts, all numbers equal."""
    assert len(rows) == sum(1 if "+once" in case else 4 if "+" in case else 2 for case in cases)
    for row in rows:
        assert row["numbers"] > 50
        assert row["differ"] == [], (row["case"], row["share"], row["reshard"])
        # The logged loss is a sum in float32 of all rows, which ranks and micro-batches add up in other orders.
        assert row["loss"] < 5e-7
        assert row["norms"] < 1e-5  # of shards the parts are added up in another order
