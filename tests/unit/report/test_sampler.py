"""Laws of sampling for the page: its images are those of `dumo sample`, and what lies between two noises is noise."""

import pytest
import torch

from dumo.report.sampler import Sampler, between
from dumo.run.sample import sample_batches
from dumo.runtime.random import stream
from dumo.types import UserError


def test_a_seed_is_that_of_dumo_sample(digits: Sampler) -> None:
    """By every reading, with fresh noise between the passes too; alone, and beside other seeds."""
    for reading in digits.readings.values():
        made = digits.make(reading, 3, 7, digits.fresh([5, 2**60]))
        assert made.nfe == 3
        for row, seed in enumerate((5, 2**60)):
            c = torch.tensor([7])
            (part,) = sample_batches(digits.opened, nfe=3, c=c, seed=seed, solver=reading.solver)
            torch.testing.assert_close(made.x[[row]], part.x)


def test_between_two_noises_lies_noise() -> None:
    """Each of mean 0 and deviation 1, in every draw, and neighbours are equally far apart."""
    a, b = (lambda k, name=name: torch.randn(1, 200_000, generator=stream(name, k)) for name in "ab")
    for k in (0, 1):
        rows = between(a, b, 5)(k)
        torch.testing.assert_close(rows[[0, -1]], torch.cat([a(k), b(k)]), atol=1e-6, rtol=0)
        torch.testing.assert_close(rows.std(1), torch.ones(5), atol=0.01, rtol=0)
        gaps = rows.diff(dim=0).norm(dim=1)
        torch.testing.assert_close(gaps / gaps.mean(), torch.ones(4), atol=0.01, rtol=0)


def test_what_takes_too_long_is_stopped_between_passes(digits: Sampler) -> None:
    """And the net is as it was: without hooks, in its own mode."""
    late, reading = Sampler(digits.opened, limit=0), digits.readings["u"]
    with pytest.raises(UserError, match="took too long"):
        late.make(reading, 1, 0, late.fresh([0]))
    net = digits.opened.net
    assert [*net._forward_pre_hooks, *net._forward_hooks] == []
    assert digits.make(reading, 1, 0, digits.fresh([0])).nfe == 1


@pytest.mark.parametrize("letter", ["w", "", "<script>"])
def test_a_reading_that_is_none_is_refused(letter: str, digits: Sampler) -> None:
    with pytest.raises(UserError, match="take u or v"):
        digits.reading(letter)


def test_images_that_are_all_equally_far_apart_lie_so_far_from_the_nearest(
    digits: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Sampler(digits.opened)
    monkeypatch.setitem(other.__dict__, "data", (torch.eye(12).view(12, 1, 3, 4), 12))
    assert other.spacing == pytest.approx(2**0.5)


def test_a_prompt_is_what_a_run_of_captions_is_asked(words: Sampler) -> None:
    """A caption of the data is its own number; another text has one behind all, the same whenever it is asked."""
    run = words.opened.run
    assert words.condition(run.conditions.name(3)) == 3
    new = words.condition("a red bicycle")
    assert new > run.data.classes
    assert words.condition(" a red bicycle ") == new
    made = [words.make(words.reading("u"), 1, c, words.fresh([1])).x for c in (new, 3)]
    assert not torch.equal(*made)
    for wrong in ("", "  ", "7" * 10_001):
        with pytest.raises(UserError, match="a prompt"):
            words.condition(wrong)
