"""What is refused because it would go wrong silently, each by a name that the message contains."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from dumo.config.load import load
from dumo.report.evaluate_images import judge
from dumo.run.folder import RunFolder
from dumo.run.trained import TrainedRun, parse_size, require_count
from dumo.types import UserError


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders and files of images that cannot be judged as they are."""
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    for name, count in (("made", 24), ("real", 24), ("mixed", 24)):
        Path(name).mkdir()
        for i in range(count):
            Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(f"{name}/{i:03}.png")
    Image.new("RGB", (9, 9)).save("mixed/big.png")
    np.savez("sized.npz", np.zeros((30, 9, 9, 3), np.uint8))
    np.savez("colour.npz", draws.integers(0, 256, (520, 8, 8, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("images", "kind", "options", "name"),
    [
        ("mixed", "photos", {"against": "real"}, "big.png"),
        ("made", "photos", {"against": "sized.npz"}, "sized.npz"),
        ("made", "photos", {"against": "real", "fields": ["evaluate.protocol.samples=25"]}, "samples=25"),
        ("colour.npz", "digits", {"against": "real"}, "--against"),
        ("colour.npz", "digits", {}, "in colour"),
        ("made", "folder", {"against": "real"}, "protocol folder"),
    ],
)
def test_images_of_others(images: str, kind: str, options: dict[str, object], name: str) -> None:
    with pytest.raises(UserError, match=name):
        judge(images, kind, **options)  # pyright: ignore[reportArgumentType]
    assert not list(Path().glob("*.evaluation.json"))


def test_options_of_samples() -> None:
    run = load("digits")
    trained = TrainedRun(run, RunFolder(Path("run")), nn.Identity())
    with pytest.raises(UserError, match="prompts"):
        require_count(1, ["a", "b"], "prompts")
    with pytest.raises(UserError, match="9x9"):
        parse_size(run.data, "9x9")
    with pytest.raises(UserError, match="guidance"):
        trained.guide_of(3.0)
