"""The protocol of own images: it sees what is wrong with samples, from few images on, and says what it is not."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from dumo.data import Digits
from dumo.encoders.classifier import ShippedClassifier, cifar10
from dumo.evaluation import BundledProtocol, Context, small_sets
from dumo.evaluation.measures import baselines_digits, score_digits
from dumo.evaluation.mmd import random_parts
from dumo.evaluation.small_sets import MAX_IMAGES, PhotosEvaluator, indices_of_classes
from dumo.evaluation.wholeset import Reference
from dumo.io.data_source import TensorData
from dumo.io.picture import from_uint8
from dumo.report import score
from dumo.report.comparison import require_comparable
from dumo.report.score import verdict
from dumo.runtime.random import stream
from dumo.types import UserError

PROTOCOL = BundledProtocol(kind="photos", samples=60)
Row = dict[str, float]


def drawn(n: int, key: str, side: int = 32) -> Tensor:
    """Smooth patches of colour, no two alike, as rounded colours."""
    coarse = torch.rand(n, 3, 4, 4, generator=stream("photos", key)) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return from_uint8(((smooth + 1) * 127.5).round().to(torch.uint8))


def opened(x: Tensor, c: Tensor | None = None, protocol: BundledProtocol = PROTOCOL) -> PhotosEvaluator:
    c = torch.zeros(len(x), dtype=torch.long) if c is None else c
    evaluator = protocol.evaluator(Context(lambda: TensorData(x, c), int(c.max() + 1) if c.any() else 0))
    assert isinstance(evaluator, PhotosEvaluator)
    return evaluator


def scores(evaluator: PhotosEvaluator, x: Tensor) -> Row:
    """Given in two batches, the second first."""
    index = torch.arange(len(x))
    return evaluator.score([(index[20:], x[20:]), (index[:20], x[:20])])


@pytest.fixture(scope="module")
def own() -> PhotosEvaluator:
    return opened(drawn(60, "real"))


@pytest.fixture(scope="module")
def good(own: PhotosEvaluator) -> Row:
    return scores(own, drawn(60, "fresh"))


@pytest.mark.slow
def test_fresh_images_of_the_same_law_are_as_a_perfect_sampler(own: PhotosEvaluator, good: Row) -> None:
    perfect = own.baselines()["perfect"]
    assert abs(good["mmd"] - perfect["mean"]) < 3 * perfect["sd"]
    assert good["pixel_fd"] == pytest.approx(perfect["pixel_fd"], rel=0.3)
    assert good["copies"] == perfect["copies"] == 0
    assert min(good["precision"], good["recall"]) > 0.7
    sentence = verdict([{"nfe": 1, "solver": "restart", **good}], own.baselines())
    assert sentence is not None
    assert sentence.startswith(("Indistinguishable", "Close to the data"))


@pytest.mark.nightly
def test_noise_is_far_off_and_is_the_other_baseline_and_collapse_shows_in_recall(
    own: PhotosEvaluator, good: Row
) -> None:
    noise = torch.randn(60, 3, 32, 32, generator=stream("noise"))
    found, known = scores(own, noise), own.baselines()["noise"]
    assert found["mmd"] == pytest.approx(known["mean"], rel=0.1)
    assert found["mmd"] > 10 * abs(good["mmd"])
    assert found["precision"] < 0.2
    one = drawn(1, "real").expand(60, -1, -1, -1) + 0.05 * torch.randn(60, 3, 32, 32, generator=stream("one"))
    assert scores(own, one)["recall"] < 0.2
    sentences = [verdict([{"nfe": 1, **found}, {"nfe": 2, **row}], own.baselines()) or "" for row in (found, good)]
    assert [sentence.startswith("Looks untrained") for sentence in sentences] == [True, False]


@pytest.mark.parametrize("turn", [lambda x: x, lambda x: x.flip(-1)], ids=["as they are", "mirrored"])
def test_copies_are_told(own: PhotosEvaluator, turn: "type[Tensor]") -> None:
    """Half of the samples are images that the net was trained on, a little noisy."""
    copied = turn(drawn(60, "real"))[:30] + 0.02 * torch.randn(30, 3, 32, 32, generator=stream("little"))
    assert scores(own, torch.cat([copied, drawn(30, "fresh")]))["copies"] == 0.5


def test_copies_are_of_images_that_were_trained_on() -> None:
    """Half of the samples are, and a tenth of the images that were held out."""
    trained, held = drawn(40, "trained", side=8), drawn(60, "held", side=8)
    held[:6] = trained[34:]
    one_class = torch.zeros(60, dtype=torch.long)
    context = Context(lambda: TensorData(held, one_class), trained=lambda: TensorData(trained, one_class[:40]))
    evaluator = PROTOCOL.evaluator(context)
    assert isinstance(evaluator, PhotosEvaluator)
    assert scores(evaluator, torch.cat([trained[:30], drawn(30, "fresh", side=8)]))["copies"] == 0.5
    assert evaluator.baselines()["perfect"]["copies"] == 0.1
    assert evaluator.facts["copies"] == "looked for among 40 of 40 images that were trained on"


def test_a_report_says_that_copies_of_some_images_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "copies" not in opened(drawn(60, "real", side=8)).facts
    monkeypatch.setattr(small_sets, "MAX_IMAGES", 40)
    evaluator = opened(drawn(60, "real", side=8))
    assert evaluator.facts["copies"] == "looked for among 40 of 60 images of the data"
    found, baselines, _ = said_of(evaluator, drawn(60, "fresh", side=8))
    evaluation = {"results": [found], "baselines": baselines, "card": evaluator.facts}
    assert "copies: looked for among 40 of 60 images of the data" in score.terminal_lines(evaluation, None)


def test_one_copy_by_chance_is_within_the_spread() -> None:
    perfect = opened(drawn(60, "real", side=8)).baselines()["perfect"]
    assert perfect["copies"] == 0
    assert 1 / 60 < 2 * perfect["copies_sd"] < 4 / 60


def in_classes(c: Tensor, key: str) -> Tensor:
    """Small images, each class of a lightness of its own."""
    return 0.3 * drawn(len(c), key, side=8) + (0.3 * c - 0.6)[:, None, None, None]


def test_recall_is_as_perfect_where_a_class_has_far_more_images_than_samples() -> None:
    real_c = torch.cat([torch.zeros(220), torch.arange(80) % 4 + 1]).long()
    protocol = BundledProtocol(kind="photos", samples=100)
    evaluator = opened(in_classes(real_c, "real"), real_c, protocol)
    found = scores(evaluator, in_classes(protocol.labels(5), "fresh"))
    perfect = evaluator.baselines()["perfect"]
    assert found["recall"] == pytest.approx(perfect["recall"], abs=0.1)
    assert found["pixel_fd"] == pytest.approx(perfect["pixel_fd"], rel=0.3)


def test_where_each_class_has_one_image_classes_are_not_matched() -> None:
    evaluator = opened(drawn(61, "real", side=8), torch.arange(61), BundledProtocol(kind="photos", samples=122))
    found = scores(evaluator, drawn(122, "fresh", side=8))
    assert found["recall"] > 0.5


@pytest.mark.slow
def test_samples_are_compared_with_images_of_their_classes() -> None:
    """Classes come in turn; a set that has one of them nine times in ten must not count for a difference."""
    x, c = drawn(100, "real"), torch.arange(100) % 10 == 0
    x[c] = -x[c].abs()  # dark ones are rare
    evaluator = opened(x, c.long())
    fresh = drawn(60, "fresh")
    dark = PROTOCOL.labels(2).bool()
    fresh[dark] = -fresh[dark].abs()
    perfect = evaluator.baselines()["perfect"]
    assert abs(scores(evaluator, fresh)["mmd"] - perfect["mean"]) < 3 * perfect["sd"]
    rows = indices_of_classes(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 0, 1]), stream("alike"))
    assert torch.tensor([0, 1, 0, 1])[rows].tolist() == [1, 0, 1]
    assert set(rows[[0, 2]].tolist()) == {1, 3}  # each once


@pytest.mark.slow
def test_it_says_what_it_is_and_is_not(own: PhotosEvaluator, good: Row) -> None:
    assert "not Inception" in own.facts["features"]
    assert own.facts["features_sha256"] == cifar10.sha256
    assert "60 images" in own.facts["spread"]
    assert not [name for name in good if "fid" in name]
    assert "spread" not in opened(drawn(500, "real", side=8)).facts


@pytest.mark.parametrize(("count", "side", "channels"), [(20, 40, 3), (25, 8, 1), (41, 100, 3)])
def test_few_images_of_any_size(count: int, side: int, channels: int) -> None:
    x = drawn(count, "real", side=side)[:, :channels]
    evaluator = opened(x, protocol=BundledProtocol(kind="photos", samples=20))
    found = evaluator.score([(torch.arange(20), x[:20])])
    assert all(torch.tensor(value).isfinite() for value in found.values())
    assert found["copies"] == 1


@dataclass(frozen=True)
class Large:
    """More images than are looked at, made when asked for; `asked` counts them."""

    size: int
    asked: list[int]

    def __len__(self) -> int:
        return self.size

    def rows(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        some = torch.arange(self.size)[rows]
        self.asked.append(len(some))
        return some.view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / self.size, some * 0

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        raise AssertionError("all at once")


@pytest.mark.nightly
def test_large_sets_are_sampled_evenly_and_never_held() -> None:
    data = Large(3 * MAX_IMAGES, [])
    evaluator = PROTOCOL.evaluator(Context(lambda: data))
    assert isinstance(evaluator, PhotosEvaluator)
    assert sum(data.asked) == len(evaluator.real) == MAX_IMAGES
    assert max(data.asked) <= 64
    levels = evaluator.real.rows[:, -1]
    assert (levels.min(), levels.max()) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.01))
    assert "5,000 of 15,000" in evaluator.facts["reference"]


@dataclass(frozen=True)
class PartlyUnreadable(Large):
    """Images of which the first `num_unreadable` cannot be read."""

    num_unreadable: int = 64

    def rows(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        x, c = super().rows(rows)
        is_read = torch.arange(self.size)[rows] >= self.num_unreadable
        return x[is_read], c[is_read]


@dataclass(frozen=True)
class InTurn(Large):
    """Images whose classes take turns."""

    def rows(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        x, _ = super().rows(rows)
        return x, torch.arange(self.size)[rows] % 10


@pytest.mark.parametrize("is_read_in_pieces", [True, False], ids=["in turn", "sorted"])
def test_some_images_of_a_set_are_of_all_classes(is_read_in_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of the classes is: every second image would be of every second class, the first of few."""
    monkeypatch.setattr(small_sets, "MAX_IMAGES", 100)
    data = InTurn(200, []) if is_read_in_pieces else TensorData(drawn(200, "real", 8), torch.arange(200) // 20)
    evaluator = PROTOCOL.evaluator(Context(lambda: data, 10))
    assert isinstance(evaluator, PhotosEvaluator)
    assert len(evaluator.real_c) == 100
    assert evaluator.real_c.unique().tolist() == list(range(10))


def test_progress_is_told_also_where_no_image_of_a_piece_can_be_read() -> None:
    ticks: list[tuple[int, int]] = []
    context = Context(lambda: PartlyUnreadable(100, []), tick=lambda done, total: ticks.append((done, total)))
    assert "36 of 100 images" in PROTOCOL.evaluator(context).facts["reference"]
    assert ticks == [(64, 100), (100, 100)]


def test_a_reference_is_known_by_its_pixels_whatever_a_machine_makes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(60, "real", side=8)
    here = opened(x)
    features = ShippedClassifier.features
    monkeypatch.setattr(ShippedClassifier, "features", lambda net, images: features(net, images) * (1 + 1e-6))
    there = opened(x)
    assert not torch.equal(here.real.rows, there.real.rows)
    require_comparable({"here": here.facts, "there": there.facts})
    grey, colours = (opened(x[:, :1].expand(-1, channels, -1, -1)).facts for channels in (1, 3))
    others = [opened(x.flip(0)).facts, grey, colours]
    assert len({facts["reference_sha256"] for facts in (here.facts, *others)}) == 4


def test_other_classes_of_the_same_images_are_another_reference_where_samples_have_classes() -> None:
    x = drawn(60, "real", side=8)
    fine, coarse, none = (opened(x, torch.arange(60) % count).facts for count in (6, 3, 1))
    with pytest.raises(UserError, match="  classes_sha256: "):
        require_comparable({"fine": fine, "coarse": coarse})
    require_comparable({"fine": fine, "none": none})


def test_what_it_does_not_judge() -> None:
    with pytest.raises(UserError):
        PROTOCOL.evaluator(Context(lambda: PartlyUnreadable(100, [], num_unreadable=100)))
    with pytest.raises(UserError):
        opened(drawn(20, "real")).score([(torch.arange(40), drawn(40, "real"))])


def crops(key: str, each: int = 60) -> tuple[Tensor, Tensor]:
    """Squares of two photos that come with scikit-learn, which are the classes, reduced to 32 pixels a side."""
    folder = Path(str(files("sklearn.datasets") / "images"))
    found: list[Tensor] = []
    for name in ("china.jpg", "flower.jpg"):
        photo = torch.from_numpy(np.array(Image.open(folder / name))).permute(2, 0, 1).float()
        rows, columns = (torch.randint(n - 96, (each,), generator=stream(key, name, n)) for n in photo.shape[1:])
        squares = [photo[:, i : i + 96, j : j + 96] for i, j in zip(rows.tolist(), columns.tolist(), strict=True)]
        found.append(avg_pool2d(torch.stack(squares), 3))
    return from_uint8(torch.stack(found, 1).flatten(0, 1).round().to(torch.uint8)), torch.arange(2 * each) % 2


@pytest.fixture(scope="module")
def folder() -> PhotosEvaluator:
    return opened(*crops("folder"), BundledProtocol(kind="photos", samples=120))


def said_of(evaluator: PhotosEvaluator, x: Tensor) -> tuple[Row, dict[str, Row], str]:
    """The scores of samples, the baselines, and the verdict."""
    found = scores(evaluator, x)
    baselines = evaluator.baselines()
    sentence = verdict([{"nfe": 1, "solver": "restart", **found}], baselines)
    assert sentence is not None
    return found, baselines, sentence


@pytest.mark.slow
def test_no_summary_praises_noise_of_the_colours_of_photos(folder: PhotosEvaluator) -> None:
    """Normal noise that has the mean and the covariance of the folder's pixels, which precision and pixels praise."""
    x, _ = crops("folder")
    flat = x.flatten(1)
    weights = torch.randn(120, 120, generator=stream("coloured")) / 120**0.5
    noise = (flat.mean(0) + weights @ (flat - flat.mean(0))).view_as(x)
    found, baselines, sentence = said_of(folder, noise)
    perfect = baselines["perfect"]
    assert found["pixel_fd"] < 1.5 * perfect["pixel_fd"]
    summary = score.summary_names(score.score_names({"nfe": 1, **found}))
    assert summary == ["class_mmd", "recall", "copies"]
    assert found["class_mmd"] > 10 * perfect["class_mmd_sd"]
    assert sentence.startswith(("Far from the data", "Looks untrained"))


@pytest.mark.nightly
def test_a_sampler_that_ignores_its_label_is_marked_down(folder: PhotosEvaluator) -> None:
    """The same images, which are new crops of the photos, with the classes they were asked for and without."""
    x, _ = crops("samples")
    good, baselines, as_asked = said_of(folder, x)
    bad, _, shuffled = said_of(folder, x[torch.randperm(len(x), generator=stream("shuffled"))])
    perfect = baselines["perfect"]
    assert abs(good["class_mmd"]) < 3 * perfect["class_mmd_sd"]
    assert abs(bad["mmd"] - good["mmd"]) < 4 * perfect["sd"]
    assert bad["class_mmd"] > 8 * perfect["class_mmd_sd"]
    assert as_asked.startswith(("Indistinguishable", "Close to the data"))
    assert "do not show the requested classes" in shuffled


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "noise", "blur", "lost", "copies", "classes"])
def test_only_new_digits_are_like_the_data(fault: str) -> None:
    """The five faults of docs/reproduce.md: of 600 digits, none seen in training, judged against 600 others."""
    x, c = Digits().originals().reference(0, 0)
    some, real, trained = random_parts(c, 3, stream("thirds"))
    y, d = x[some], c[some].clone()
    if fault == "noise":
        y = y + 0.2 * torch.randn(y.shape, generator=stream("noise"))
    elif fault == "blur":
        y = 0.8 * y + 0.2 * avg_pool2d(pad(y, (1, 1, 1, 1), value=-1), 3, 1)
    elif fault == "lost":
        y = torch.where((d == 3)[:, None, None, None], y[d == 3][torch.arange(len(y)) % 3], y)
    elif fault == "copies":
        y = torch.cat([x[trained][: len(y) // 4], y[len(y) // 4 :]])
        d = torch.cat([c[trained][: len(y) // 4], d[len(y) // 4 :]])
    elif fault == "classes":
        d[::20] = (d[::20] + 1) % 10
    reference = Reference(x[real], c[real], trained=x[trained])
    row = {"nfe": 1, **score_digits(y, d, reference)}
    sentence = verdict([row], baselines_digits(reference, d))
    assert sentence is not None
    assert sentence.startswith("Indistinguishable") == (fault == "none"), row


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(0.1, 0.15)], "Indistinguishable"),
        ([(0.1, 0.3)], "Close to the data"),
        ([(0.1, 6.0)], "Far from the data"),
        ([(0.1, 90.0)], "Far from the data"),  # all of other classes: trained all the same
        ([(6.0, 6.0)], "Far from the data"),
        ([(60.0, 60.0)], "Looks untrained"),
        ([(0.1, 6.0), (0.3, 0.3)], "Close to the data"),  # the best row is that of the best classes
    ],
)
def test_states_by_class(rows: list[tuple[float, float]], said: str) -> None:
    baselines = {
        "perfect": {"mean": 0.0, "sd": 0.1, "class_mmd": 0.0, "class_mmd_sd": 0.1},
        "noise": {"mean": 100.0, "sd": 1.0, "class_mmd": 100.0},
    }
    results = [{"nfe": 1, "solver": "hop", "mmd": whole, "class_mmd": by_class} for whole, by_class in rows]
    sentence = verdict(results, baselines)
    assert sentence is not None
    assert sentence.startswith(said)
    assert sentence.endswith(".")
    assert ("do not show the requested classes" in sentence) == (said == "Far from the data" and rows[0][0] < 1)


def test_states_without_noise() -> None:
    """Of protocols that do not measure it: by how many times, and by precision."""
    real = {"perfect": {"mean": 0.2, "sd": 0.1, "auc": 0.5, "auc_sd": 0.01}}
    read = {"perfect": {"mean": 0.2, "sd": 0.1, "accuracy": 0.98, "accuracy_sd": 0.01}}
    near = "Close to the data, but distinguishable: worse than a perfect sampler in"
    like = "Indistinguishable from a perfect sampler: at most two standard deviations worse in"
    for baselines, row, said in (
        (real, {"fd": 0.4, "auc": 0.482}, f"{like} fd, auc."),
        (real, {"fd": 0.4, "auc": 0.518, "kid": 9.0}, f"{like} fd, auc."),
        (real, {"fd": 0.4, "auc": 0.53}, f"{near} auc."),
        (real, {"fd": 0.4, "auc": 0.47}, f"{near} auc."),
        (real, {"fd": 0.41, "auc": 0.5}, f"{near} fd."),
        (real, {"fd": 0.41, "auc": 0.53}, f"{near} fd, auc."),
        (read, {"fd": 0.4, "accuracy": 1.0}, f"{like} fd, accuracy."),
        (read, {"fd": 0.4, "accuracy": 0.97}, f"{like} fd, accuracy."),
        (read, {"fd": 0.4, "accuracy": 0.95}, f"{near} accuracy."),
        (real, {"fd": 9.0, "precision": 0.5}, "Far from the data: worse than a perfect sampler in fd."),
        (real, {"fd": 12.0, "precision": 0.01}, "Looks untrained: worse than a perfect sampler in fd."),
        (real, {"fd": 3.0, "precision": 0.01}, f"{near} fd."),
    ):
        assert verdict([{"nfe": 1, **row}], baselines) == said
