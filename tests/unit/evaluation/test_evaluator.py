"""What evaluators share: samples gathered by number, whatever came in which batch."""

import hashlib

import pytest
import torch

from dumo.data import Digits
from dumo.encoders import digits
from dumo.evaluation import Context, ShippedProtocol, shipped
from dumo.evaluation.protocol import Evaluator, Reference, collect, ordered
from dumo.io.digest import of_tensor
from dumo.types import UserError


def test_samples_are_collected_by_number() -> None:
    x = torch.arange(12.0).view(6, 2)
    parts = [(rows, x[rows]) for rows in (torch.tensor([4, 0]), torch.tensor([5]), torch.tensor([2, 1, 3]))]
    assert torch.equal(collect(parts, 6), x)
    for wrong, said in ((parts[1:], "4 images came, 4 different"), ([*parts, parts[1]], "7 images came, 6 different")):
        with pytest.raises(UserError, match=f"{said} numbers among them, where each of 0 to 5 must come once"):
            collect(wrong, 6)
    with pytest.raises(UserError, match="there are no samples to judge"):
        collect([], 6)


def test_numbers_may_have_gaps_where_no_total_is_known_but_none_twice() -> None:
    assert ordered(torch.tensor([9, 2, 4])).tolist() == [1, 2, 0]
    with pytest.raises(UserError, match="3 images came, 2 different"):
        ordered(torch.tensor([9, 2, 9]))


def test_a_digest_is_of_numbers_shape_and_type() -> None:
    x = torch.arange(6.0)
    assert of_tensor(x) == of_tensor(x.clone())
    others = [x + 1, x.view(2, 3), x.double(), x.flip(0), x[:5]]
    assert len({of_tensor(y) for y in (x, *others)}) == 6
    assert of_tensor(x.view(2, 3).T) == of_tensor(x.view(2, 3).T.contiguous())


class Drawn:
    """Points without end."""

    size = None

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        draws = torch.Generator().manual_seed(100 * seed + i)
        return torch.randn(n, 2, generator=draws), torch.zeros(n, dtype=torch.long)


class Finite:
    """The digits that the classifier was trained on."""

    size = 1797

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return Digits().originals().reference(0, 0)


def test_an_evaluator_scores_as_its_protocol_does() -> None:
    protocol = ShippedProtocol(kind="toy", samples=60)
    evaluator = protocol.evaluator(Context(Drawn, seed=3))
    assert isinstance(evaluator, Evaluator)
    x, reference = Drawn().reference(60, 9)[0], Reference.of(Drawn(), 60, 3)
    rows = torch.arange(60).flip(0)
    assert evaluator.score((part, x[part]) for part in rows.split(7)) == shipped.score_toy(
        x, protocol.labels(), reference
    )
    assert evaluator.baselines() == shipped.baselines_toy(reference, 60)
    assert evaluator.facts["reference"] == "60 draws of seed 3"
    assert "reference_sha256" not in evaluator.facts


def test_a_finite_reference_is_known_by_its_hash_and_features_by_theirs() -> None:
    facts = ShippedProtocol(kind="digits", samples=500).evaluator(Context(Finite)).facts
    assert facts["reference"] == "1,797 samples of the data"
    assert facts["reference_sha256"] == of_tensor(Digits().originals().x)
    assert facts["features_sha256"] == hashlib.sha256(digits.WEIGHTS.read_bytes()).hexdigest()
