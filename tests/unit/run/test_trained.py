"""Samples of a trained run: of several ranks, and with other options than its own."""

from pathlib import Path

import pytest
import torch

from dumo.config.load import load
from dumo.data import Latents
from dumo.flow.solver import Euler
from dumo.run.folder import RunFolder
from dumo.run.trained import TrainedRun
from dumo.run.weights import build
from forked import main_of
from meeting import outputs


@pytest.mark.slow
def test_rank_0_alone_has_the_samples_of_all(tmp_path: Path) -> None:
    outputs([main_of("unit.run.gathered", rank, tmp_path / "met", cwd=tmp_path) for rank in range(2)], 240)


def test_samples_with_other_options_open_the_autoencoder_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load("cifar10-latents", ["net.width=16", "net.depth=1", "data.root=x"])
    assert isinstance(run.data, Latents)
    opened: list[torch.device] = []

    class Doubling:
        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    def open_codec(_: object, device: torch.device) -> Doubling:
        opened.append(device)
        return Doubling()

    monkeypatch.setattr(type(run.data.codec), "open", open_codec)
    trained = TrainedRun(run, RunFolder(Path("run")), build(run).eval())
    c = torch.tensor([1, 2])
    assert next(trained.make_batches(c, nfe=1)).x.shape == (2, *run.data.shape)
    next(trained.make_batches(c, nfe=2, seed=3, solver=Euler(), guide=trained.guide_of(1)))
    assert len(opened) == 1
