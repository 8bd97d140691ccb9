"""The deviation of the data: of all numbers together, measured once, on the card, and in units of it no more."""

from pathlib import Path

import pytest
import torch

from dumo.config.load import load
from dumo.io.data_source import TensorData
from dumo.run.data import measure, recorded_facts, with_data_facts
from dumo.run.weights import load_run
from trained import train
from unit.run.known import tiny


def test_that_of_all_numbers_together() -> None:
    """Also between channels of other means; of digits 0.75."""
    x = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + torch.tensor([-1.0, 1.0])
    assert abs(measure(TensorData(x, torch.zeros(5000, dtype=torch.long))) - 1.25**0.5) < 0.05
    assert abs(measure(load("digits").data.open()) - 0.752) < 0.01


def test_it_is_measured_when_a_run_begins_and_then_kept() -> None:
    x = torch.tensor([[-2.0], [2.0]])
    c = torch.zeros(2, dtype=torch.long)
    first = with_data_facts(tiny(), None, TensorData(x, c))
    kept = with_data_facts(tiny(), first, TensorData(9 * x, c))
    assert recorded_facts(kept) == recorded_facts(first)
    anew = recorded_facts(with_data_facts(tiny(), None, TensorData(9 * x, c)))
    assert anew is not None
    assert anew.sd == 9 * measure(TensorData(x, c))


@pytest.mark.nightly
def test_a_run_notes_it_and_tells_what_it_means(tmp_path: Path) -> None:
    told, edm = list[str](), ["net.precondition=edm"]
    train(tiny("digits", *edm, "path.sd=0.75"), tmp_path / "digits", print_line=told.append)
    assert load_run(tmp_path / "digits").data_sd == measure(load("digits").data.open())
    assert not any("path.sd" in line for line in told)
    train(tiny("digits", *edm, "path.sd=0.3"), tmp_path / "narrow", print_line=told.append)
    (line,) = [line for line in told if "path.sd" in line]
    assert f"path.sd={load_run(tmp_path / 'narrow').data_sd:.2g}" in line
    assert load_run(str(tmp_path / "narrow")).spec.path.sd == 0.3
