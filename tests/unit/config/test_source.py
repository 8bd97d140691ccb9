"""What a word of the command line is taken for."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from dumo.config.overrides import override
from dumo.config.source import choose, folder_of_images, read
from dumo.types import UserError


def test_what_a_word_is_taken_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("digits/run.yaml", "cats/a.png", "mine.yaml"):
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).touch()
    kinds = {word: choose(word).kind for word in ("moons", "dumo:moons", "digits-trained", "mine.yaml", "cats")}
    assert [*kinds.values()] == ["recipe", "recipe", "trained", "file", "images"]
    for word in ("./digits", "digits/run.yaml"):
        assert (choose(word).kind, choose(word).is_resumed) == ("run", True)
        assert not choose(word, Path("again")).is_resumed
    for word in ("./digits", "digits"):
        assert (choose(word, Path("digits")).kind, choose(word, Path("digits")).is_resumed) == ("run", True)


def test_the_folder_of_a_pipeline_is_typed_in_quotes(tmp_path: Path) -> None:
    folder = tmp_path / "my model: sd3"
    folder.mkdir()
    (folder / "model_index.json").touch()
    with pytest.raises(UserError) as raised:
        choose(str(folder))
    typed = str(raised.value).partition("dumo train ")[2]
    tree: dict[str, Any] = {}
    override(tree, shlex.split(typed)[1:])
    assert tree == {"pipeline": {"source": str(folder)}}


def test_a_word_is_read_where_it_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python hands on a path as it was typed, which no shell has expanded; one that is a `Path` means itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (tmp_path / "mine.yaml", tmp_path / "$HOME.yaml"):
        place.write_text(f"base: moons\nabout: {place.stem}\n")
    for word in ("~/mine.yaml", "$HOME/mine.yaml", "mine.yaml"):
        assert choose(word).kind == "file"
        assert read(word).tree["about"] == "mine"
    assert read(Path("$HOME.yaml")).tree["about"] == "$HOME"


def test_texts_that_were_moved_with_a_run_are_found_next_to_it(tmp_path: Path) -> None:
    """A cache that is where the run says stays, and so does a place of another name than the default."""

    def texts_of_run(noted: Path) -> Path:
        file = tmp_path / "big/photos/run.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"format: 2\nnet: {{kind: dit, texts: {{kind: encoder, root: {noted}}}}}\n")
        return Path(read(file).tree["net"]["texts"]["root"])

    noted = tmp_path / "runs/texts"
    assert texts_of_run(noted) == noted
    next_to_run = tmp_path / "big/texts"
    next_to_run.mkdir(parents=True)
    assert texts_of_run(noted) == next_to_run
    of_user = tmp_path / "mine/embeddings"
    assert texts_of_run(of_user) == of_user
    noted.mkdir(parents=True)
    assert texts_of_run(noted) == noted


def test_a_run_of_images_has_the_whole_name_of_their_folder(tmp_path: Path) -> None:
    """Of a file it has no suffix."""
    album = tmp_path / "2024.05 Paris"
    album.mkdir()
    (tmp_path / "a.parquet").touch()
    assert folder_of_images(album) == Path("runs/2024.05 Paris")
    assert folder_of_images(tmp_path / "a.parquet") == Path("runs/a")
