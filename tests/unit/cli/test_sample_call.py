"""What a notebook asks of a run: every argument is taken as it is meant."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dumo
from dumo.data import Memory
from dumo.flow.path import Linear
from dumo.run.trained import TrainedRun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """DuMo on digits, barely trained."""
    changes = {"net.width": 32, "net.depth": 1, "net.attention": 4, "train.batch": 16, "train.steps": 2}
    return dumo.train("digits", changes, out=tmp_path_factory.mktemp("run") / "digits", device="cpu")


@pytest.mark.slow
def test_outputs_hold_the_same_images(run: TrainedRun) -> None:
    x = run.sample([3, 5], seed=1)
    grid = run.sample([3, 5], seed=1, output="np")
    assert (type(grid), grid.shape, grid.dtype) == (np.ndarray, (2, 8, 8, 1), np.float32)
    assert torch.equal(torch.from_numpy(grid), (x.permute(0, 2, 3, 1) + 1) / 2)
    pictures = run.sample([3, 5], seed=1, output="pil")
    assert [np.asarray(image).tolist() for image in pictures] == [np.asarray(image).tolist() for image in run.pil(x)]
    assert np.allclose(np.asarray(pictures[0]) / 255, grid[0, ..., 0], atol=0.5 / 255 + 1e-6)


def test_noise_is_what_samples_begin_with(run: TrainedRun) -> None:
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = run.sample([1, 2, 3], noise=z, nfe=1, solver="euler")
    v = run.readings.velocity
    assert v is not None
    assert torch.allclose(x, (z - v(z, torch.ones(3), torch.tensor([1, 2, 3]))).clamp(-1, 1), atol=1e-6)
    assert torch.equal(x[1:], run.sample([2, 3], noise=z[1:], nfe=1, solver="euler"))
    assert len(run.sample(noise=z)) == 3
    assert run.spec.path == Linear()


def test_a_generator_draws_the_seed(run: TrainedRun) -> None:
    def drawn(g: torch.Generator) -> torch.Tensor:
        return run.sample(count=2, generator=g)

    g = torch.Generator().manual_seed(7)
    one, two = drawn(g), drawn(g)
    assert not torch.equal(one, two)
    assert torch.equal(one, drawn(torch.Generator().manual_seed(7)))


@pytest.mark.slow
def test_guidance_is_that_of_the_spec(run: TrainedRun, tmp_path: Path) -> None:
    changes = {
        "objective.drop": 0.1,
        "train.steps": 1,
        "train.batch": 8,
        "net.width": 16,
        "net.depth": 1,
        "train.ema": [{"decay": 0.5}],
    }
    guided = dumo.train("digits-flow-matching", changes, out=tmp_path / "run", device="cpu")
    with torch.no_grad():
        for p in guided.net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p.shape)))
    before = guided.sample(count=4, nfe=2)
    after = guided.sample(count=4, nfe=2, guidance=3)
    spec = dumo.load(guided.folder, {"sample.guide.scale": 3}, device="cpu")
    spec.net.load_state_dict(guided.net.state_dict())
    assert torch.equal(after, spec.sample(count=4, nfe=2))
    assert not torch.equal(before, after)
    assert torch.equal(before, guided.sample(count=4, nfe=2, guidance=1.0))
    with pytest.raises(dumo.UserError, match=r"guidance = 3.*objective\.drop"):
        run.sample(guidance=3)


def test_numbers_of_numpy_and_torch_are_numbers(run: TrainedRun) -> None:
    x = run.sample([3, 3], seed=2, nfe=1)
    assert torch.equal(x, run.sample(np.int64(3), count=np.int64(2), seed=torch.tensor(2), nfe=np.uint8(1)))
    assert torch.equal(x, run.sample(torch.tensor([3, 3]), seed=np.int32(2), nfe=1))


def test_an_int_is_the_number_of_a_class_and_a_text_its_name(run: TrainedRun) -> None:
    names = tuple(str(number) for number in range(1, 11))
    data = Memory(name="numbered", shape=(1, 8, 8), classes=10, names=names, digest="")
    spec = run.spec.model_copy(update={"data": data})
    numbered = replace(run, spec=spec)
    x = numbered.sample([0, 1, np.int64(9)], nfe=1)
    assert torch.equal(x, run.sample([0, 1, 9], nfe=1))
    assert torch.equal(x, numbered.sample(["1", "2", "10"], nfe=1))
    assert torch.equal(x[:1], numbered.sample("0", nfe=1)), "a number, where no name fits"


def test_a_run_is_shown_in_a_line(run: TrainedRun) -> None:
    assert repr(run) == f"<dumo run {run.folder}: dumo on digits, net dit, step 2, on cpu>"
    assert repr(run.spec) == str(run.spec) == "<dumo on digits, net dit, 2 steps>"


def test_a_run_that_ends_by_the_clock_is_shown_without_the_steps_that_are_guessed(run: TrainedRun) -> None:
    train = run.spec.train.model_copy(update={"minutes": 6.0, "steps": 1})
    assert str(run.spec.model_copy(update={"train": train})) == "<dumo on digits, net dit, 6 minutes>"
