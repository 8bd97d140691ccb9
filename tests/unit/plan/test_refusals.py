"""What the plans of a run refuse, and the name that each message has to contain."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from dumo.config.load import load_recipe
from dumo.plan import photos
from dumo.plan.prepare import prepare
from dumo.run.folder import RunFolder
from dumo.types import UserError

DAMAGED_CAPTIONS = b'{"file_name": "0.png", "text": '


@pytest.mark.parametrize(
    ("files", "changes", "name"),
    [
        ({}, ("data.kind=digits",), "data.kind"),
        ({}, ("data.captions={kind: files}",), "data.captions"),
        ({"metadata.jsonl": DAMAGED_CAPTIONS}, (), "metadata.jsonl"),
        ({"0.txt": b"a cat"}, (), "1.png"),
        ({"0.png": b"no image", "1.png": b"no image", "2.png": b"no image"}, (), "0.png"),
    ],
    ids=["other data", "no captions", "damaged captions", "few captions", "no images"],
)
def test_photos(
    files: dict[str, bytes], changes: Sequence[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40)).save(f"photos/{i}.png")
    for file, content in files.items():
        Path("photos", file).write_bytes(content)
    with pytest.raises(UserError) as error:
        photos.propose("photos", changes, device="cpu")
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("source", "out", "name"),
    [("digits", "new", "--from 3"), ("run", None, "--out"), ("run", "run", "--out"), ("run", "new", "--from 3")],
    ids=["a recipe", "no folder", "its own folder", "no checkpoint"],
)
def test_a_new_run_from_a_checkpoint(
    source: str, out: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    RunFolder(Path("run")).write_run(load_recipe("digits"))
    with pytest.raises(UserError) as error:
        prepare(source, out=None if out is None else Path(out), step=3)
    assert name in str(error.value)
