"""An upload brings every file as it is to a hub that is private where it is new; what fails is a line."""

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from dumo.export.hub import push, require_uploadable
from dumo.types import UserError
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


@pytest.mark.parametrize("refuses", ["/repos/create", "/objects/batch", "/commit/main", "everything"])
def test_what_a_hub_refuses_is_a_line(hub: Hub, out: Path, refuses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuses = refuses
    if refuses == "everything":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    with pytest.raises(UserError, match=r"is whole, and was not uploaded: .*hf upload --private owner/name") as error:
        push(out, REPOSITORY)
    assert "\n" not in str(error.value)
    assert hub.files == {}


def test_what_is_known_before_is_said_before(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_uploadable(REPOSITORY, "copy")
    for repository in ("name", "a/b/c", "owner/na me", "owner/-name", "", "../name"):
        with pytest.raises(UserError, match="is no OWNER/NAME"):
            require_uploadable(repository, "copy")
    with pytest.raises(UserError, match='parts="copy", or none'):
        require_uploadable(REPOSITORY, "link")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="set HF_TOKEN"):
        require_uploadable(REPOSITORY, "copy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        require_uploadable(REPOSITORY, "copy")
    assert hub.tokens == set()


def test_without_the_client_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:  # noqa: ANN401, any module
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="install huggingface_hub"):
        require_uploadable(REPOSITORY, "copy")
