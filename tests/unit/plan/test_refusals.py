"""What the plans of a run refuse, and the name that each message has to contain."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from dumo.plan import photos
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
