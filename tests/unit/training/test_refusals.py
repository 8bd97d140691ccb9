"""What training refuses: one case per row, with the name that the message must contain."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn

from dumo.objectives import IMM, DuMo
from dumo.training.compile import compile_blocks
from dumo.training.layout import share_of
from dumo.training.log import read_log
from dumo.training.micro_batch import split_batch
from dumo.training.optim import Muon
from dumo.training.settings import Train
from dumo.training.state import begin
from dumo.types import Objective, UserError
from unit.training.adapted import Adapted
from unit.training.by_path import restore_last_finite, save
from unit.training.toy import Small

SPEC = Train(steps=4, batch=12, ema=())
HALF = {"weights": "bfloat16", "optimizer": {"kind": "adamw8bit"}, "precision": "bf16"}

# Fields of `train`.
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"ref": 0.5}, "ref"),
    ({"ema": [{"decay": 0.9}, {"decay": 0.9, "ramp": False}]}, "ema"),
    (HALF | {"optimizer": {"kind": "adamw"}}, "optimizer.kind"),
    (HALF | {"precision": "fp32"}, "precision"),
]

# Batches that an objective cannot take on so many ranks.
BATCHES: list[tuple[dict[str, Any], Objective, int, str]] = [
    ({"batch": 6}, IMM(), 1, "train.batch"),
    ({"batch": 8, "micro_batch": 2}, IMM(), 1, "train.micro_batch"),
    ({"batch": 8}, IMM(), 3, "train.batch"),
    ({"batch": 2}, DuMo(), 3, "train.batch"),
]


@pytest.mark.parametrize(("fields", "name"), FIELDS)
def test_fields(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Train.model_validate({"steps": 2, "batch": 4} | fields)
    assert name in str(refused.value)


@pytest.mark.parametrize(("fields", "objective", "ranks", "name"), BATCHES)
def test_batches(fields: dict[str, Any], objective: Objective, ranks: int, name: str) -> None:
    with pytest.raises(UserError) as refused:
        split_batch(Train(steps=2, **fields), objective, ranks)
    assert name in str(refused.value)


def muon_without_matrices(here: Path) -> None:
    Muon()(Small())


def a_rate_of_embedders_that_are_not_marked(here: Path) -> None:
    net = nn.Module()
    net.blocks = nn.ModuleList([nn.Linear(4, 4)])
    Muon(time_lr=1e-4)(net)


def nothing_to_train(here: Path) -> None:
    begin(Adapted().requires_grad_(False), SPEC)


def other_frozen_weights(here: Path) -> None:
    checkpoint = save(here, begin(Adapted(), SPEC), 1)
    restore_last_finite(checkpoint, begin(Adapted(source=1), SPEC))


def a_share_that_does_not_divide_the_ranks(here: Path) -> None:
    share_of(2, 3)


def blocks_to_compile_in_a_net_without_blocks(here: Path) -> None:
    compile_blocks(nn.Linear(2, 2))


def a_log_with_a_broken_line(here: Path) -> None:
    (here / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    read_log(here / "metrics.jsonl")


CASES: dict[Callable[[Path], object], str] = {
    muon_without_matrices: "optimizer.kind",
    a_rate_of_embedders_that_are_not_marked: "train.optimizer.time_lr",
    nothing_to_train: "frozen",
    other_frozen_weights: "frozen weights",
    a_share_that_does_not_divide_the_ranks: "train.share",
    blocks_to_compile_in_a_net_without_blocks: "blocks",
    a_log_with_a_broken_line: "line 2",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_others(case: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        case(tmp_path)
    assert CASES[case] in str(refused.value)
