"""Two ranks are one process that makes two passes, to the bit; more of them are, to rounding; in every layout."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dumo
from dumo import recipes

DIGITS = [name for name in recipes.names() if name.partition("-")[0] == "digits"]
VARIANTS = [
    "digits+objective.guide.fraction=0.5",
    "digits+objective.slope.kind=dual",
    "digits+objective.slope.kind=dual+train.precision=bf16",
    "digits+teacher",
    "digits-meanflow+pairs",
    "digits-three-heads+train.clip=100",
    "moons",
]
FEW = {3: "digits-imm", 4: "digits-three-heads-shortcut+objective.guide.fraction=0.25"}  # all were tried: docs/log.md


def run(ranks: int, cases: list[str], folder: Path) -> list[dict[str, Any]]:
    """A row per case and layout, by so many processes."""
    roots = Path(dumo.__file__).parents[1], Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots)), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("layouts.py"))
    words = [str(ranks), str(folder / f"meet-{ranks}"), *cases]
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), *words], env=env, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    outs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks
    return [json.loads(line) for line in outs[0].splitlines()]


def test_two_ranks_are_two_pieces_to_the_bit(tmp_path: Path) -> None:
    check_bits(run(2, ["digits-cm", "digits+train.probe_every=1"], tmp_path), 2)


@pytest.mark.slow
def test_every_recipe_on_two_ranks_to_the_bit(tmp_path: Path) -> None:
    assert len(DIGITS) >= 22
    check_bits(run(2, [*DIGITS, *VARIANTS], tmp_path), len(DIGITS) + len(VARIANTS))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", FEW)
def test_more_ranks_to_rounding_over_30_steps(ranks: int, tmp_path: Path) -> None:
    (row,) = run(ranks, [FEW[ranks]], tmp_path)
    assert 0 < row["loss"] < 1e-6, row
    assert row["differ"], row  # it was another split


def check_bits(rows: list[dict[str, Any]], cases: int) -> None:
    """All layouts of all cases, all numbers equal."""
    assert len(rows) == 4 * cases
    for row in rows:
        assert row["numbers"] > 50
        assert row["differ"] == [], (row["case"], row["share"], row["reshard"])
        assert row["loss"] < 1e-7
