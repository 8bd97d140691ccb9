"""What protocols and their evaluators share: names, labels, what they judge; samples gathered by number."""

import hashlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from dumo.data import Digits
from dumo.encoders.classifier import digits
from dumo.evaluation import ClipProtocol, Context, LikelihoodProtocol, MetricProtocol, ShippedProtocol, measures
from dumo.evaluation.images import ImageProtocol
from dumo.evaluation.protocol import Evaluator, Protocol
from dumo.evaluation.statistics import order_of
from dumo.evaluation.wholeset import Reference, collect
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
    assert order_of(torch.tensor([9, 2, 4])).tolist() == [1, 2, 0]
    with pytest.raises(UserError, match="3 images came, 2 different"):
        order_of(torch.tensor([9, 2, 9]))


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


def test_an_evaluator_scores_as_its_protocol_does() -> None:
    protocol = ShippedProtocol(kind="toy", samples=60)
    evaluator = protocol.evaluator(Context(Drawn, seed=3))
    assert isinstance(evaluator, Evaluator)
    x, reference = Drawn().reference(60, 9)[0], Reference.of(Drawn(), 60, 3)
    rows = torch.arange(60).flip(0)
    assert evaluator.score((part, x[part]) for part in rows.split(7)) == measures.score_toy(
        x, protocol.labels(), reference
    )
    assert evaluator.baselines() == measures.baselines_toy(reference, protocol.labels())
    assert evaluator.facts["reference"] == "60 draws of seed 3"
    assert "reference_sha256" not in evaluator.facts


def test_the_split_of_a_reference_is_named() -> None:
    x, c = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    assert Reference(x, c).facts(0, "train")["reference"] == "3 samples of split train"
    held_out = Reference(x, c, trained=x)
    assert held_out.facts(0, "test")["reference"] == "3 samples of split test, never trained on"
    assert held_out.facts(0, None)["reference"] == "3 samples held out, never trained on"


def test_a_finite_reference_is_known_by_its_hash_and_features_by_theirs() -> None:
    data = Digits().originals()
    facts = ShippedProtocol(kind="digits", samples=500).evaluator(Context(lambda: data)).facts
    assert facts["reference"] == "1,797 samples of the data"
    assert facts["reference_sha256"] == of_tensor(data.x)
    assert facts["features_sha256"] == hashlib.sha256(digits.file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("protocol", "name", "total"),
    [
        (ShippedProtocol(kind="digits"), "digits", 2000),
        (ShippedProtocol(kind="digits", samples=2000), "digits", 2000),
        (ShippedProtocol(kind="digits", samples=500), "digits (500 samples)", 500),
        (ShippedProtocol(kind="toy"), "toy", 10_000),
        (ShippedProtocol(kind="toy", samples=400), "toy (400 samples)", 400),
        (ShippedProtocol(kind="cifar10-features"), "cifar10-features", 5000),
        (ShippedProtocol(kind="photos", samples=60), "photos (60 samples)", 60),
        (ClipProtocol(kind="clip-score", samples=10), "clip-score (10 samples)", 10),
        (ImageProtocol(kind="adm-imagenet256-50k"), "adm-imagenet256-50k", 50_000),
        (ImageProtocol(kind="cifar10-train50k", samples=50_000), "cifar10-train50k", 50_000),
        (ImageProtocol(kind="folder", samples=9, frechet=False), "folder (9 samples, no Fréchet distances)", 9),
    ],
)
def test_a_name_says_what_is_not_as_it_says_and_labels_are_balanced(protocol: Protocol, name: str, total: int) -> None:
    assert (protocol.name, protocol.total) == (name, total)
    for classes in (0, 4, 10, 1000):  # in any stretch of the samples: splits of the Inception Score have all classes
        assert torch.equal(protocol.labels(classes), torch.arange(total) % max(classes, 1))


IMAGENET, FOLDER, CIFAR = (ImageProtocol(kind=k) for k in ("adm-imagenet256-50k", "folder", "cifar10-train50k"))
DIGITS, TOY, FEATURES, PHOTOS = (ShippedProtocol(kind=k) for k in ("digits", "toy", "cifar10-features", "photos"))
JUDGED = [  # protocol, shape, classes, what is said to it; None: it is judged
    (DIGITS, (1, 8, 8), 10, None),
    (DIGITS, (1, 8, 8), 0, None),
    (DIGITS, (2,), 0, r"digits judges .*\(1, 8, 8\) in 10 classes or none, not samples of shape \(2,\) in 0"),
    (DIGITS, (1, 8, 8), 1000, "in 1000: choose another protocol"),
    (TOY, (2,), 0, None),
    (TOY, (1, 8, 8), 10, r"toy judges vectors.* \(1, 8, 8\)"),
    (FEATURES, (3, 32, 32), 10, None),
    (FEATURES, (3, 32, 32), 0, None),
    (FEATURES, (1, 8, 8), 10, r"judges images of shape \(3, 32, 32\) .* not samples of shape \(1, 8, 8\) in 10"),
    (FEATURES, (3, 32, 32), 1000, "in 1000: choose another protocol"),
    (PHOTOS, (4, 8, 8), 0, "1 or 3 channels"),
    (IMAGENET, (3, 256, 256), 1000, None),
    (IMAGENET, (3, 32, 32), 1000, "256x256, not samples of shape .*decode"),
    (ImageProtocol(kind="adm-imagenet512-50k"), (3, 256, 256), 1000, "512x512, not"),
    (FOLDER, (1, 8, 8), 0, "any size, not samples of shape"),
    (FOLDER, (2,), 0, "any size, not samples of shape"),
    (CIFAR, (3, 32, 32), 17, "is of 10 classes, not 17"),
    (ImageProtocol(kind="cifar10-train50k", samples=2049), (3, 32, 32), 0, None),
    (ImageProtocol(kind="folder", samples=2048), (3, 64, 64), 0, "more than 2048 samples, here are 2048"),
    (ImageProtocol(kind="folder", samples=10, frechet=False), (3, 48, 64), 7, None),
    (ClipProtocol(kind="clip-score"), (2,), 0, r"judges images, not samples of shape \(2,\)"),
    (LikelihoodProtocol(levels=17), (2,), 0, "levels=null"),
]


@pytest.mark.parametrize(("protocol", "shape", "classes", "said"), JUDGED)
def test_what_cannot_be_judged_is_refused_before_any_work(
    protocol: Protocol, shape: tuple[int, ...], classes: int, said: str | None
) -> None:
    with pytest.raises(UserError, match=said) if said else nullcontext():
        protocol.check(shape, classes)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "faces"},
        {"kind": "digits", "seed": 1},
        {"kind": "digits", "samples": 100},
        {"kind": "toy", "samples": 1},
        {"kind": "cifar10-features", "samples": 999},
        {"kind": "adm-imagenet256-10k"},
        {"kind": "folder", "reference": "a.npz"},
    ],
)
def test_nothing_else_can_be_set(given: dict[str, object]) -> None:
    reader = TypeAdapter[Any](MetricProtocol)
    assert reader.validate_python({"kind": "toy"}) == ShippedProtocol(kind="toy")
    with pytest.raises(ValidationError):
        reader.validate_python(given)
