"""A path that leads to something else is refused by what lies there, whatever its name, links and permissions are."""

import os
from pathlib import Path

import pytest

from dumo.config import place
from dumo.config.place import RUN_FILE
from dumo.data.image import NoImagesError, open_store
from dumo.types import UserError

TOO_LONG = "a" * 5000


def test_a_folder_named_as_a_run_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).mkdir()
    (tmp_path / RUN_FILE / RUN_FILE).touch()
    with pytest.raises(UserError, match=r"is no run's folder \(it has no run\.yaml\)"):
        place.require_run_folder("there", tmp_path)


def test_a_link_that_leads_nowhere_is_no_file(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("gone")
    with pytest.raises(UserError, match=r"it is a link to gone, which is not there\): bring that back, or train one"):
        place.require_run_folder("link", link)


def test_names_that_are_too_long_are_refused_as_others_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(TOO_LONG)
    assert place.find_run_file(path) is None
    with pytest.raises(UserError, match="it is not there"):
        place.require_run_folder(TOO_LONG, path)
    with pytest.raises(UserError, match="there is no run's folder or evaluation aaa"):
        place.require_evaluation(TOO_LONG)
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        place.require_log(path)


def test_a_folder_that_may_not_be_looked_into_spoils_no_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a colleague's private folder in a shared runs/."""
    stat = os.stat

    def forbid(path: Path, **how: bool) -> os.stat_result:
        if "private" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    for name in ("private", "digits"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RUN_FILE).touch()
    monkeypatch.setattr(os, "stat", forbid)
    assert place.list_run_folders(tmp_path) == [str(tmp_path / "digits")]
    assert place.list_sources(tmp_path) == [str(tmp_path / "digits")]
    assert place.list_sources(tmp_path / "none") == []


def test_a_table_is_known_in_upper_case_too(tmp_path: Path) -> None:
    assert place.is_image(Path("a.PNG"))
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
            open_store(root)
    if not Path(file).name.startswith("."):
        assert place.find_content((tmp_path / file).parent, images=True) == "images"


def test_an_evaluation_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "evaluation_old.json").touch()
    with pytest.raises(UserError, match=r"has no evaluation\.json: run dumo evaluate"):
        place.require_evaluation(tmp_path)
    (tmp_path / "evaluation-step4-1.json").touch()
    place.require_evaluation(tmp_path)
