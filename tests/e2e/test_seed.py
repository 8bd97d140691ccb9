"""An image is its seed and its number, whatever it is made beside; and the passes made are the passes asked for."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dumo.flow.generate import generate, labels
from dumo.run.folder import RunFolder, open_run
from dumo.run.sample import solver_of
from dumo.run.train import train
from e2e.shell import call, sets

COUNT = 64
CLOSE = 1e-5  # in [-1, 1]: a product of matrices rounds by the number of its rows. Measured: see the assertion


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A small transformer, trained until its modulations are far from zero."""
    folder = tmp_path_factory.mktemp("seed") / "digits"
    words = sets("net.width=64", "net.depth=1", "train.batch=32", "train.steps=80", "train.optimizer.lr=0.005")
    words += sets("train.schedule.warmup=10", "train.log_every=1")
    assert call("train", "digits", "--out", folder, *words).code == 0
    rows = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.7 * rows[0]
    return open_run(str(folder))


def made(trained: RunFolder, c: Tensor, nfe: int, batch: int, indices: Sequence[int] | None = None) -> Tensor:
    """Samples in batches of `batch`."""
    spec = trained.run
    reads = spec.objective.read(trained.net)
    return generate(
        trained.net,
        reads,
        spec.path,
        spec.sample.solver,
        c,
        nfe=nfe,
        seed=3,
        shape=spec.data.shape,
        batch=batch,
        indices=indices,
    ).x


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_same_image_at_any_batch(taught: RunFolder, nfe: int) -> None:
    c = labels(COUNT, 10)
    together = made(taught, c, nfe, COUNT)
    assert together.std() > 0.3  # there is something to see
    for batch in (1, 7):
        assert (made(taught, c, nfe, batch) - together).abs().max() <= CLOSE
    assert torch.equal(taught.sampler.sample(c, nfe=nfe, seed=3).x, together)


def test_any_image_can_be_made_alone(taught: RunFolder) -> None:
    c = labels(COUNT, 10)
    together = made(taught, c, 2, COUNT)
    for i in (0, 13, 63):
        alone = made(taught, c[i : i + 1], 2, 1, [i])
        assert (alone - together[i : i + 1]).abs().max() <= CLOSE
    assert (made(taught, c[13:14], 2, 1, [12]) - together[13:14]).abs().max() > 100 * CLOSE


@pytest.mark.parametrize(("solver", "nfe"), [("restart", 1), ("restart", 3), ("euler", 5), ("heun", 2), ("heun", 6)])
def test_passes_are_counted_by_the_net(taught: RunFolder, solver: str, nfe: int) -> None:
    rows = 0

    def count(_: object, inputs: tuple[Tensor, ...], __: object) -> None:
        nonlocal rows
        rows += len(inputs[0])

    hook = taught.net.register_forward_hook(count)
    try:
        samples = taught.sampler.sample(labels(5, 10), nfe=nfe, solver=solver_of(taught.run.sample, solver))
    finally:
        hook.remove()
    assert rows == 5 * nfe
    assert samples.nfe == nfe


def test_training_again_makes_the_same_weights(taught: RunFolder, tmp_path: Path) -> None:
    again = train(taught.run, tmp_path / "again")
    for mine, theirs in zip(again.shown.parameters(), taught.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
