"""What a run's folder holds, with a run.yaml that was read before it was opened."""

import os
from pathlib import Path

from dumo.config.load import RUN_FILE
from dumo.config.source import RunText, read_file
from dumo.run.index import Index


def written(folder: Path, text: str = "base: digits\n") -> RunText:
    """The text of a run.yaml that is written into a folder, as it is read there."""
    folder.mkdir(exist_ok=True)
    before = folder / f".{RUN_FILE}"
    before.write_text(text)
    os.replace(before, folder / RUN_FILE)  # as `dumo.io.file` writes it
    return read_file(folder / RUN_FILE)


def test_a_text_that_was_read_is_taken(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert Index.read(tmp_path, text).text is text
    assert Index.read(tmp_path).text == text


def test_what_was_written_since_is_read_again(tmp_path: Path) -> None:
    """As by a training that ended between the look at the words and the lock on the folder."""
    text = written(tmp_path, "base: digits\nabout: one\n")
    now = written(tmp_path, "base: digits\nabout: two\n")
    assert Index.read(tmp_path, text).text == now != text
    (tmp_path / RUN_FILE).unlink()
    assert Index.read(tmp_path, text).text is None


def test_a_text_of_another_place_counts_for_nothing(tmp_path: Path) -> None:
    other = written(tmp_path / "other")
    here = written(tmp_path / "here", "base: moons\n")
    assert Index.read(tmp_path / "here", other).text == here
    of_no_file = RunText(other.tree, "recipe digits")
    assert Index.read(tmp_path / "here", of_no_file).text == here
    assert Index.read(tmp_path, of_no_file).text is None
