"""What is read of a user's law and objective is what these declare. That they keep the contract, other tests say."""

import pytest
import torch

from contract.outside import Alternate, Outside
from dumo.flow.draw import draw
from dumo.flow.path import Linear
from dumo.run.config.check import check
from dumo.run.config.load import load
from dumo.run.plan.cost import exact_rows
from dumo.types import Noised, UserError

N = 8


def record(first: int = 0, n: int = N) -> Noised:
    c = torch.zeros(n, dtype=torch.long)
    return draw(Outside(), Linear(), torch.zeros(n, 2), c, c, seed=0, step=0, batch=N, first=first)


def test_the_record_knows_which_rows_its_law_lets_move() -> None:
    b = record()
    assert b.moving == Alternate().moving(N)
    assert b.rows_by_step == ([0, 2, 4, 6], [1, 3, 5, 7])
    assert (b.r < b.t).tolist() == list(b.moving)
    assert record(first=3, n=2).moving == b.moving[3:5] == b[3:5].moving


def test_its_other_laws_are_drawn_by_name() -> None:
    b = record()
    assert b.drawn.keys() == {"counts"}
    assert ((b.drawn["counts"] >= 1) & (b.drawn["counts"] <= 2)).all()


def test_a_piece_of_a_batch_parts_no_rows_that_it_keeps_together() -> None:
    run = load("moons-meanflow", ["train.batch=64"]).model_copy(update={"objective": Outside()})
    check(run)
    odd = run.model_copy(update={"train": run.train.model_copy(update={"batch": 63})})
    with pytest.raises(UserError, match="batch = 63 is no multiple of 2, the rows that belong together"):
        check(odd)
    assert exact_rows(Outside()) == 2
