"""Kernel distances, of all and by class: unbiased, their errors, and what is no difference, against exact laws."""

import math
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

from dumo.evaluation.estimate import Estimate, ties_with_least
from dumo.evaluation.mmd import (
    class_facts,
    class_mmd,
    class_mmd_null_sd,
    gaussian_mmd,
    gaussian_mmd_null_sd,
    mmd2,
    mmd_scores,
    shared_classes,
)
from dumo.runtime.random import stream

MEANS = 2.0 * torch.randn(3, 4, generator=stream("means"))
SHARES = torch.tensor([0.5, 0.3, 0.2])


def mixture(c: Tensor, key: object, shift: float = 0.0) -> Tensor:
    """Rows of three normal laws, by class, all of them moved along the first axis."""
    return MEANS[c] + torch.randn(len(c), 4, generator=stream("mixture", f"{key}")) + shift * torch.eye(4)[0]


def estimates(shift: float, count: int = 200) -> list[Estimate]:
    """Samples with classes in turn, against rows whose classes are drawn."""
    found: list[Estimate] = []
    for i in range(count):
        c, d = torch.arange(60) % 3, torch.multinomial(SHARES, 90, replacement=True, generator=stream("classes", i))
        found.append(gaussian_mmd(mixture(c, (i, 0), shift), mixture(d, (i, 1)), 3.0, c, d))
    return found


def test_gaussian_mmd_is_by_class_the_mean_over_pairs() -> None:
    c, d = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([1, 1, 0, 0, 1, 1])
    x, y = mixture(c, "x").double(), mixture(d, "y").double()
    p = [2 / 6, 4 / 6]

    def mean(a: Tensor, b: Tensor) -> float:
        """Of the kernel, over all pairs but those of a row with itself."""
        return fmean(
            math.exp(-float((one - other).square().sum()) / 8)
            for m, one in enumerate(a)
            for n, other in enumerate(b)
            if a is not b or m != n
        )

    whole = 0.0
    for i in range(2):
        for j in range(2):
            a, b, e, f = x[c == i], x[c == j], y[d == i], y[d == j]
            a, e = (b, f) if i == j else (a, e)
            whole += p[i] * p[j] * (mean(a, b) + mean(e, f) - mean(a, f) - mean(b, e))
    assert gaussian_mmd(x, y, 2.0, c, d).value == pytest.approx(1000 * whole, rel=1e-9)
    assert gaussian_mmd(x, y, 2.0).value == pytest.approx(1000 * mmd2(x, y, [2.0]), rel=1e-9)


def test_gaussian_mmd_of_two_normal_laws() -> None:
    """E k of N(0, I) and N(m, I) is (w^2 / (w^2 + 2))^(d/2) exp(-m^2 / 2 (w^2 + 2))."""
    shift, w, one = 1.0, 2.0, torch.zeros(80, dtype=torch.long)
    exact = 2000 * (w**2 / (w**2 + 2)) ** 2 * (1 - math.exp(-(shift**2) / (2 * (w**2 + 2))))
    values = [gaussian_mmd(mixture(one, (i, "a"), shift), mixture(one, (i, "b")), w).value for i in range(200)]
    assert fmean(values) == pytest.approx(exact, abs=3 * stdev(values) / 200**0.5)


@pytest.mark.slow
def test_gaussian_mmd_has_no_bias_and_knows_its_error() -> None:
    """Whatever the shares of the classes; where something differs its error is that of repeated draws."""
    same, other = estimates(0.0), estimates(1.0)
    scatter = stdev(one.value for one in same)
    assert abs(fmean(one.value for one in same)) < 3 * scatter / 200**0.5
    assert 1 < fmean(one.error for one in same) / scatter < 1.7  # where nothing differs it is too large
    assert fmean(one.error for one in other) == pytest.approx(stdev(one.value for one in other), rel=0.2)


@pytest.mark.slow
def test_the_deviation_of_no_difference_is_that_of_draws() -> None:
    """With samples that have the shares of the reference, with classes and without."""
    d = torch.arange(400) % 3
    for c in (torch.arange(300) % 3, None):
        one_class = torch.zeros(400, dtype=torch.long)
        classes = (one_class[:300], one_class) if c is None else (c, d)
        known = gaussian_mmd_null_sd(classes[0], mixture(d, "known"), 3.0, classes[1])
        values = list[float]()
        for i in range(100):
            own = (
                (torch.arange(300) % 3, d)
                if c is not None
                else tuple(torch.randint(3, (n,), generator=stream("own", i, n)) for n in (300, 400))
            )
            x, y = mixture(own[0], (i, 2)), mixture(own[1], (i, 3))
            values.append(gaussian_mmd(x, y, 3.0, *(own if c is not None else ())).value)
        assert known == pytest.approx(stdev(values), rel=0.25)


def test_the_deviation_of_no_difference_where_samples_have_other_shares() -> None:
    """Samples in turn of two classes, which are nine tenths and a tenth of the data."""
    c = torch.arange(60) % 2
    d = (torch.arange(200) % 10 == 0).long()
    known = gaussian_mmd_null_sd(c, mixture(d, "known"), 3.0, d)
    values = [gaussian_mmd(mixture(c, (i, 4)), mixture(d, (i, 5)), 3.0, c, d).value for i in range(150)]
    assert known == pytest.approx(stdev(values), rel=0.2)


def test_the_deviation_of_no_difference_in_classes_of_two_rows() -> None:
    """A row is half of the mean of its class, which takes half of the variance of what is left."""
    d = torch.arange(60) // 2
    known = gaussian_mmd_null_sd(d, torch.randn(60, 4, generator=stream("known")), 3.0, d)
    values: list[float] = []
    for i in range(300):
        x, y = torch.randn(2, 60, 4, generator=stream("two rows", i))
        values.append(gaussian_mmd(x, y, 3.0, d, d).value)
    assert known == pytest.approx(stdev(values), rel=0.25)


@pytest.mark.parametrize("large", [0, 200], ids=["small classes", "and a large one"])
def test_the_deviation_of_no_difference_by_some_of_many_classes(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    d = torch.cat([torch.arange(400) // 2, torch.full((large,), 200)])
    y = torch.randn(len(d), 4, generator=stream("many classes"))
    by_all = gaussian_mmd_null_sd(d, y, 3.0, d)
    monkeypatch.setattr("dumo.evaluation.mmd.MAX_NULL_ROWS", 150)
    assert gaussian_mmd_null_sd(d, y, 3.0, d) == pytest.approx(by_all, rel=0.1)


@pytest.mark.nightly
def test_class_mmd_is_the_mean_of_classes_without_bias_and_knows_its_error() -> None:
    """Of normal laws that are 2, 1 and 0 apart, in classes of shares that samples do not have."""
    w = 2.0
    shifts = torch.tensor([2.0, 1.0, 0.0])
    c = torch.arange(60) % 3
    d = torch.multinomial(SHARES, 90, replacement=True, generator=stream("classes"))
    shares = d.bincount() / len(d)
    by_class = 2000 * (w**2 / (w**2 + 2)) ** 2 * (1 - (-shifts.square() / (2 * (w**2 + 2))).exp())
    found = list[Estimate]()
    for i in range(300):
        x = mixture(c, ("law", i))
        x[:, 0] += shifts[c]
        found.append(class_mmd(x, mixture(d, ("data", i)), w, c, d))
    scatter = stdev(one.value for one in found)
    assert fmean(one.value for one in found) == pytest.approx(float(shares @ by_class), abs=3 * scatter / 300**0.5)
    assert fmean(one.error for one in found) == pytest.approx(scatter, rel=0.15)


@pytest.mark.nightly
def test_the_deviation_of_class_mmd_is_exact_in_classes_of_a_few_rows() -> None:
    c = torch.tensor([0, 0, 0, 1, 1, 1])
    d = torch.tensor([0] * 7 + [1] * 5)
    values = list[float]()
    squares = list[float]()
    for i in range(500):
        y = mixture(d, ("few", i))
        values.append(class_mmd(mixture(c, ("fewer", i)), y, 3.0, c, d).value)
        squares.append(class_mmd_null_sd(c, y, 3.0, d) ** 2)
    assert abs(fmean(values)) < 3 * stdev(values) / 500**0.5
    assert fmean(squares) ** 0.5 == pytest.approx(stdev(values), rel=0.05)


def test_class_mmd_alone_sees_labels_of_other_classes() -> None:
    c, d = torch.arange(300) % 3, torch.arange(600) % 3
    x, y = mixture(c, "samples"), mixture(d, "reference")
    scores = mmd_scores(x, y, width=3.0, sample_c=(c + 1) % 3, real_c=d)
    assert scores["mmd"] < 2 * gaussian_mmd_null_sd(c, y, 3.0, d)
    assert scores["class_mmd"] > 100 * class_mmd_null_sd(c, y, 3.0, d)
    assert scores["class_mmd"] > 10 * scores["class_mmd_sd"]


def test_class_mmd_is_the_same_whatever_classes_are_called() -> None:
    c, d = torch.arange(30) % 3, torch.arange(50) % 3
    x, y = mixture(c, "samples", 1.0), mixture(d, "reference")
    names = torch.tensor([2, 0, 1])
    order = torch.randperm(30, generator=stream("order"))
    again = class_mmd(x[order], y, 3.0, names[c][order], names[d])
    assert again == pytest.approx(class_mmd(x, y, 3.0, c, d), rel=1e-9)
    assert class_mmd_null_sd(names[c], y, 3.0, names[d]) == pytest.approx(class_mmd_null_sd(c, y, 3.0, d), rel=1e-9)


def test_a_class_with_one_image_on_a_side_is_left_out_and_said() -> None:
    c = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4])
    d = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3])
    x, y = torch.randn(8, 4, generator=stream("x")), torch.randn(9, 4, generator=stream("y"))
    assert shared_classes(c, d) == [0, 1]
    assert class_mmd(x, y, 2.0, c, d) == class_mmd(x[:5], y[:5], 2.0, c[:5], d[:5])
    assert gaussian_mmd(x, y, 2.0, c, d) == pytest.approx(tuple(gaussian_mmd(x[:5], y[:5], 2.0, c[:5], d[:5])))
    assert gaussian_mmd(x[:3], y, 2.0, torch.tensor([0, 1, 2]), d) == gaussian_mmd(x[:3], y, 2.0)  # none is left
    assert gaussian_mmd(x[:5], y, 2.0, c[:5], d) == gaussian_mmd(x[:5], y, 2.0)  # two classes are lost, and seen
    assert gaussian_mmd_null_sd(c, y, 2.0, d) == pytest.approx(gaussian_mmd_null_sd(c[:5], y[:5], 2.0, d[:5]))
    assert class_facts(c, d) == {
        "class_mmd": "over 2 of 5 classes, without 2, 3, 4, which have fewer than 2 images on a side"
    }
    every = torch.arange(40).repeat(2)
    without_11, without_12 = (class_facts(every[(every > 10) & (every != k)], every) for k in (11, 12))
    assert without_11 != without_12  # twelve classes each, the first ten alike
    assert class_facts(c[:5], d[:5]) == class_facts(torch.zeros(5, dtype=torch.long), d) == {}
    assert "class_mmd" not in mmd_scores(x[:3], y, width=2.0, sample_c=torch.tensor([0, 1, 2]), real_c=d)


def test_what_cannot_be_told_from_the_least_is_level() -> None:
    found = [Estimate(1.0, 0.3), Estimate(1.9, 0.4), Estimate(2.1, 0.4), Estimate(5.0, 2.1)]
    assert ties_with_least(found) == [True, True, False, True]
