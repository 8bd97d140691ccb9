"""Colour images that Python gives are learned in latents, as those of a folder, and are kept for other processes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import dumo
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.data import Memory, is_latents
from dumo.data import memory as of_data
from dumo.data.image import open_store
from dumo.plan import photolatents, proposal
from e2e.shell import call
from e2e.test_photo_latents import blobs, noise

QUICK: dict[str, Any] = {
    "net.width": 32,
    "net.depth": 1,
    "net.route": None,
    "train.batch": 8,
    "train.coupling": None,
    "evaluate.protocol.samples": 20,
}
PIXELS = np.stack([blobs(i)[:48, :48] for i in range(24)])  # (24, 48, 48, 3)
CLASSES = np.arange(24) % 3


class Named(Dataset[tuple[Tensor, int]]):
    """A data set as torchvision's, whose classes have names that are not in order."""

    classes = ("pink", "blue", "green")

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(PIXELS[i]), int(CLASSES[i])


class Noisy(Named):
    """A data set whose rows are others at each read."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, c = super().__getitem__(i)
        return image ^ torch.randint(0, 2, image.shape, dtype=torch.uint8), c


@pytest.fixture(autouse=True)
def _quick_plans(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposal, "_step_seconds", lambda run, here: 0.5)


def plan(data: object, *changes: str, minutes: float | None = None) -> tuple[str, Run]:
    found = proposal.propose(Memory.of(data), changes, minutes=minutes, device="cpu")
    return dict(found.lines()).get("learned as", ""), found.run


@pytest.mark.parametrize(
    ("data", "classes", "titles"),
    [
        pytest.param(PIXELS, 0, (), marks=pytest.mark.slow),
        ((PIXELS, CLASSES), 3, ()),
        (PIXELS.transpose(0, 3, 1, 2) / 127.5 - 1, 0, ()),
        pytest.param(TensorDataset(torch.from_numpy(PIXELS), torch.from_numpy(CLASSES)), 3, (), marks=pytest.mark.slow),
        (Named(), 3, ("pink", "blue", "green")),
    ],
    ids=["array", "labels", "floats", "TensorDataset", "names"],
)
def test_colour_images_are_learned_in_latents(data: object, classes: int, titles: tuple[str, ...]) -> None:
    line, run = plan(data)
    assert line.startswith("latents by taef2, which changes these images by")
    assert line.endswith('in pixels by changes={"data.kind": "memory"}')
    assert (run.data.kind, run.data.shape, run.data.images.side) == ("latents", (32, 6, 6), 48)
    assert (run.data.labels, run.data.images.titles) == (classes, titles)
    assert (run.objective.drop > 0) == bool(classes)
    assert run.data.root.startswith("runs/latents/")

    # the images are kept, with their classes
    store = open_store(Path(run.data.images.root))
    images = run.data.originals()
    x, c = images.rows(slice(None))
    assert len(store) == 24
    assert torch.allclose(x, torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1)
    assert c.tolist() == (CLASSES.tolist() if classes else [0] * 24)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PIXELS[..., :1].squeeze(-1), "pixels: 8 of 8 images are grey, and latents are of colours"),
        (PIXELS[:, :16, :16], "pixels: images of 16 pixels are too small for latents, which begin at 32"),
        (Noisy(), "pixels: rows are others at each read, and latents are made once"),
        (np.stack([noise(i) for i in range(8)]), "more than 10% of full brightness (20.0 dB)"),
    ],
    ids=["grey", "small", "augmented", "noise"],
)
def test_other_images_are_learned_in_pixels(data: object, reason: str) -> None:
    line, run = plan(data)
    assert line.startswith("pixels: ")
    assert line.endswith(reason)
    assert (run.data.kind, run.net.kind) == ("memory", "unet")
    assert not Path("runs").exists(), "nothing is kept"


def test_more_samples_are_judged_than_there_are_classes() -> None:
    data = (np.zeros((501, 16, 16), dtype=np.uint8), np.arange(501))
    assert plan(data)[1].evaluate.protocol.total == 1002
    assert plan(data, "evaluate.protocol.samples=600")[1].evaluate.protocol.total == 600
    assert plan((data[0][1:], data[1][:-1]))[1].evaluate.protocol.total == 500


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(dumo.UserError, match="takes square images"):
        plan(PIXELS[:, :40])


@pytest.mark.parametrize("field", ["data.kind=memory", "net.kind=unet"])
def test_the_user_may_ask_for_pixels(field: str) -> None:
    line, run = plan(PIXELS, field)
    assert line.endswith("asks for them")
    assert run.data.kind == "memory"


@pytest.mark.usefixtures("_slow_autoencoder")
def test_settings_are_of_the_images_of_latents() -> None:
    _, run = plan(PIXELS, "data.side=40", "data.flip=false", "data.memory=0.5")
    assert (run.data.images.side, run.data.images.flip, run.data.memory) == (40, False, 0.5)


@pytest.fixture
def _slow_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = photolatents.AutoencoderTrial(decibels=25.0, encode_seconds=2.0)
    monkeypatch.setattr(photolatents, "try_autoencoder", lambda codec, pixels: trial)


@pytest.mark.usefixtures("_slow_autoencoder")
def test_many_images_in_little_time_are_not_encoded() -> None:
    line, run = plan(PIXELS, minutes=2)
    assert line.startswith("pixels: to encode them takes 1:36 of 2:00, more than 50%")
    assert run.data.kind == "memory"
    assert plan(PIXELS, minutes=4)[1].data.kind == "latents"


@pytest.mark.usefixtures("_slow_autoencoder")
def test_other_images_or_classes_have_another_cache() -> None:
    roots = {
        plan(data)[1].data.root
        for data in ((PIXELS, CLASSES), (PIXELS, CLASSES[::-1].copy()), (PIXELS[::-1].copy(), CLASSES), PIXELS)
    }
    assert len(roots) == 4
    assert plan((PIXELS, CLASSES))[1].data.root in roots


@pytest.mark.slow
def test_a_run_goes_on_in_another_process_without_the_array(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(steps: int, data: object = (PIXELS, CLASSES), out: str = "run", **parts: Any) -> str:  # noqa: ANN401
        changes = QUICK | {"train.steps": steps}
        assert dumo.train(data, changes, out=out, device="cpu", **parts).step == steps
        return capfd.readouterr().err

    printed = train(2)
    assert "learned as latents by taef2" in printed
    assert "encoding" in printed
    data = load("run").data
    assert is_latents(data)
    root = Path(data.root)

    # the same array again, for this run and for another one
    assert "encoding" not in train(3)
    assert "encoding" not in train(2, out="second")
    assert dumo.train("run", {"train.steps": 4}, data=(PIXELS, CLASSES), device="cpu").step == 4
    with pytest.raises(dumo.UserError, match="is a run on other images than these"):
        train(5, data=(PIXELS[::-1].copy(), CLASSES))
    monkeypatch.chdir(Path(__file__).parent)
    assert dumo.train(data=(PIXELS, CLASSES), changes=QUICK | {"train.steps": 5}, out=root.parents[2] / "run").step == 5
    monkeypatch.chdir(root.parents[2])

    # as in another process, where the latents were lost, too
    monkeypatch.setattr(of_data, "SOURCES", {})
    shutil.rmtree(root)
    resumed = call("train", "run", "--set", "train.steps=6")
    assert resumed.code == 0, resumed
    assert "encoding" in resumed.err
    for words in (("sample", "--nfe", "1"), ("evaluate", "--nfe", "1"), ("report",)):
        done = call(words[0], "run", *words[1:])
        assert done.code == 0, done

    # moved with its latents, it finds them, and the images
    Path("runs").rename("big-runs")
    Path("big").mkdir()
    Path("big-runs").rename("big/runs")
    Path("run").rename("big/runs/run")
    moved = load("big/runs/run").data
    assert is_latents(moved)
    assert (Path(moved.root).is_dir(), Path(moved.images.root).is_file()) == (True, True)


@pytest.mark.slow
def test_a_net_of_python_learns_pixels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 6, 3, padding=1)

        def forward(self, x: Tensor, c: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            del c, t
            return self.layer(x).chunk(2, 1)

    run = dumo.train(data=PIXELS, net=Net(), changes={"train.steps": 1, "train.batch": 4}, out="run", device="cpu")
    assert run.spec.data.kind == "memory"
