"""What lies at a path is known by its files: images that are opened, and not those that dumo wrote."""

from pathlib import Path

import pytest

from dumo.config import place
from dumo.config.place import RUN_FILE
from dumo.data.rows import NoImagesError, open_rows


def test_a_table_is_known_in_upper_case_too(tmp_path: Path) -> None:
    assert place.is_table(Path("a.PARQUET"))
    (tmp_path / "a.TAR").touch()
    assert place.find_content(tmp_path, images=True) == "images"


@pytest.mark.parametrize("file", ["runs/a/samples/1.png", "runs/latents/a.tar", ".hidden/1.png", "photos/.1.png"])
def test_images_are_those_that_are_opened(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the samples and latents of runs, nor what is hidden; but where they are named themselves they are."""
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    (tmp_path / "runs/a").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs/a" / RUN_FILE).touch()
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, Path()):
        assert place.find_content(root, images=True) is None
        with pytest.raises(NoImagesError):
            open_rows(root)
    if not Path(file).name.startswith("."):
        assert place.find_content((tmp_path / file).parent, images=True) == "images"
