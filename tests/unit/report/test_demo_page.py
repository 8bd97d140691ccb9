"""The demo makes the samples that `dumo sample` makes, and says what a run cannot do."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dumo.report.demo_page import open_demo, sample, tunnel_text
from dumo.run.weights import load_run
from dumo.types import UserError
from trained import train
from unit.run import known


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    train(known.tiny("digits-flow-matching"), path)
    return path


def test_pictures_are_those_of_dumo_sample(folder: Path) -> None:
    opened = load_run(str(folder), device="cpu")
    pictures, note = sample(opened, "3", count=2, seed=5, nfe=2, letter="v", scale=1.0)
    assert note.startswith("2 NFE, ")
    x = opened.make_samples(torch.tensor([3, 3]), nfe=2, seed=5).x
    expected = ((x[1, 0] + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    image, caption = pictures[1]
    assert caption == "3"
    assert (np.asarray(image.convert("L").resize((8, 8), 0)) == expected).all()
    in_turn, _ = sample(opened, "", 3, 0, 1, "v", 1.0)
    assert [caption for _, caption in in_turn] == ["0", "1", "2"]


def test_a_persons_guidance_is_heeded(tmp_path: Path) -> None:
    train(known.tiny("digits", "objective.drop=0.1"), tmp_path / "digits")
    opened = load_run(str(tmp_path / "digits"), device="cpu")
    notes = [sample(opened, "3", 1, 0, 1, "u", scale)[1] for scale in (1.0, 3.0)]
    assert [note.split(",")[0] for note in notes] == ["1 NFE", "2 NFE"]


def test_points_are_one_picture(tmp_path: Path) -> None:
    train(known.tiny("moons"), tmp_path / "moons")
    pictures, _ = sample(load_run(str(tmp_path / "moons"), device="cpu"), "", 16, 0, 1, "u", 1.0)
    assert len(pictures) == 1


@pytest.mark.parametrize(
    ("condition", "letter", "scale", "name"),
    [("eleven", "v", 1.0, "eleven"), ("3", "u", 1.0, "does not train u"), ("3", "v", 3.0, "guidance")],
)
def test_what_a_run_was_not_taught_is_refused(
    condition: str, letter: str, scale: float, name: str, folder: Path
) -> None:
    with pytest.raises(UserError, match=name):
        sample(load_run(str(folder), device="cpu"), condition, 1, 0, 1, letter, scale)


def test_runs_of_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    train(known.tiny("moons"), tmp_path / "moons")
    with pytest.raises(UserError, match="different classes"):
        open_demo([str(folder), str(tmp_path / "moons")])
    assert len(open_demo([str(folder), str(folder)])) == 2


def test_the_tunnel_names_the_port() -> None:
    assert "ssh -L 7861:localhost:7861 " in tunnel_text("http://127.0.0.1:7861/")
