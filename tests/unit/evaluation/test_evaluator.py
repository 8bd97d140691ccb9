"""What protocols and their evaluators share: names, labels, what they judge; samples gathered by number."""

import hashlib

import pytest
import torch

from dumo.data import Digits
from dumo.encoders.classifier import digits
from dumo.evaluation import BundledProtocol, ClipProtocol, Context, measures
from dumo.evaluation.fid import ImageProtocol
from dumo.evaluation.protocol import Evaluator, Protocol
from dumo.evaluation.statistics import order_of
from dumo.evaluation.wholeset import Reference, collect
from dumo.io.digest import of_tensor


def test_samples_are_collected_by_number() -> None:
    x = torch.arange(12.0).view(6, 2)
    parts = [(rows, x[rows]) for rows in (torch.tensor([4, 0]), torch.tensor([5]), torch.tensor([2, 1, 3]))]
    assert torch.equal(collect(parts, 6), x)


def test_numbers_may_have_gaps_where_no_total_is_known() -> None:
    assert order_of(torch.tensor([9, 2, 4])).tolist() == [1, 2, 0]


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
    protocol = BundledProtocol(kind="toy", samples=60)
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
    facts = BundledProtocol(kind="digits", samples=500).evaluator(Context(lambda: data)).facts
    assert facts["reference"] == "1,797 samples of the data"
    assert facts["reference_sha256"] == of_tensor(data.x)
    assert facts["features_sha256"] == hashlib.sha256(digits.file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("protocol", "name", "total"),
    [
        (BundledProtocol(kind="digits"), "digits", 2000),
        (BundledProtocol(kind="digits", samples=2000), "digits", 2000),
        (BundledProtocol(kind="digits", samples=500), "digits (500 samples)", 500),
        (BundledProtocol(kind="toy"), "toy", 10_000),
        (BundledProtocol(kind="toy", samples=400), "toy (400 samples)", 400),
        (BundledProtocol(kind="cifar10-features"), "cifar10-features", 5000),
        (BundledProtocol(kind="photos", samples=60), "photos (60 samples)", 60),
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
DIGITS, TOY, FEATURES, PHOTOS = (BundledProtocol(kind=k) for k in ("digits", "toy", "cifar10-features", "photos"))
JUDGED: list[tuple[Protocol, tuple[int, ...], int]] = [
    (DIGITS, (1, 8, 8), 10),
    (DIGITS, (1, 8, 8), 0),
    (TOY, (2,), 0),
    (FEATURES, (3, 32, 32), 10),
    (FEATURES, (3, 32, 32), 0),
    (IMAGENET, (3, 256, 256), 1000),
    (ImageProtocol(kind="cifar10-train50k", samples=2049), (3, 32, 32), 0),
    (ImageProtocol(kind="folder", samples=10, frechet=False), (3, 48, 64), 7),
]


@pytest.mark.parametrize(("protocol", "shape", "classes"), JUDGED)
def test_what_is_judged(protocol: Protocol, shape: tuple[int, ...], classes: int) -> None:
    protocol.check(shape, classes)
