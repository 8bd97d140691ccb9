"""An upload brings every file as it is to a new private repository; what fails is the Hub's own error."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors.torch import save_file

from dumo.export.upload import push, require_uploadable
from hub import Hub, serving

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of its client, about itself
REPOSITORY = "owner/name"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """One on this machine; its client has read the environment already."""
    with serving() as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder as an export is."""
    (folder := tmp_path / "few-steps" / "transformer").mkdir(parents=True)
    save_file({"x": torch.arange(5.0)}, folder / "model.safetensors")
    (folder.parent / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# é\n", encoding="utf-8")
    (folder.parent / "dumo.json").write_text("{}\n", encoding="utf-8")
    return folder.parent


def test_what_arrives_is_the_folder(hub: Hub, out: Path) -> None:
    assert push(out, REPOSITORY) == f"{hub.address}/owner/name"
    assert hub.files == {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert len(hub.blobs) == 1
    assert hub.tokens == {"Bearer hf_mine"}
    assert [made.get("visibility", made.get("private")) for made in hub.made] in (["private"], [True])


def test_one_file_arrives_under_its_name(hub: Hub, out: Path) -> None:
    file = out / "transformer" / "model.safetensors"
    push(file, REPOSITORY)
    assert hub.files == {"model.safetensors": file.read_bytes()}


@pytest.mark.parametrize("refuses", ["/repos/create", "/objects/batch", "/commit/main"])
def test_what_a_hub_refuses_is_its_own_error(hub: Hub, out: Path, refuses: str) -> None:
    hub.refuses = refuses
    with pytest.raises(HfHubHTTPError, match="403"):
        push(out, REPOSITORY)
    assert hub.files == {}


def test_who_may_upload_is_asked_before(hub: Hub) -> None:
    require_uploadable(REPOSITORY, "copy")
    assert hub.tokens == {"Bearer hf_mine"}
    assert hub.made == []
    hub.refuses = "/whoami-v2"
    with pytest.raises(HfHubHTTPError, match="403"):
        require_uploadable(REPOSITORY, "copy")


def test_without_a_token_nothing_is_uploaded(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LocalTokenNotFoundError):
        require_uploadable(REPOSITORY, "copy")
    assert hub.tokens == set()
