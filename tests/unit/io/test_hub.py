"""What is fetched from the Hub: the files that are read, once, at the commit that a run was pinned to, also offline."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from dumo.io import hub
from dumo.types import UserError
from hub import COMMIT, Hub, Repository, serving

FILES = {"README.md": b"# a model", "config.json": b"{}", "model.safetensors": bytes(100), "model.bin": bytes(1000)}
OTHER = "f" * 40


def choose(files: Collection[str]) -> list[str]:
    """What is read."""
    return [file for file in files if file in ("config.json", "model.safetensors")]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with models, and an empty cache; the client has read the environment already."""
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        server.models = {"owner/model": Repository(dict(FILES)), "owner/gated": Repository(dict(FILES), is_gated=True)}
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        point_to(server.address, monkeypatch)
        forget()
        yield server


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client ask there."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def forget() -> None:
    """What this process has asked the Hub, as in a new one."""
    hub._find_snapshot.cache_clear()
    hub._file_sizes.cache_clear()


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("owner/model", True),
        ("owner/model-1.5_x", True),
        (f"here/model@{COMMIT}", True),
        ("here/model", False),
        ("runs/model", False),
        ("owner/run.yaml", False),
        ("owner/images.parquet", False),
        ("owner", False),
        ("owner/a/b", False),
        ("./owner/model", False),
        ("../model", False),
        ("/owner/model", False),
        ("~/model", False),
        ("~owner/model", False),
        ("$OWNER/model", False),
        ("owner/model@main", False),
    ],
)
def test_which_texts_are_names(text: str, is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub.is_hub_name(text) == is_one


def test_what_is_read_is_fetched_once(server: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    folder = hub.fetch("owner/model", choose)
    assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert capfd.readouterr().err == f"downloading owner/model at {COMMIT}: 0.102 kB\n"
    forget()
    server.sent.clear()
    assert hub.fetch("owner/model", choose) == folder
    assert (server.sent, capfd.readouterr().err) == ([], "")


def test_a_name_is_pinned_to_its_commit(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which stays when the Hub moves on, and is known offline; what cannot be asked stays without one."""
    pinned = hub.pin("owner/model")
    assert pinned == f"owner/model@{COMMIT}"
    before = hub.fetch(pinned, choose)
    server.models["owner/model"] = Repository(FILES | {"config.json": b"[]"}, OTHER)
    forget()
    assert hub.fetch(pinned, choose) == before
    assert hub.pin(pinned) == pinned
    assert hub.pin("owner/model") == f"owner/model@{OTHER}"
    assert (hub.fetch("owner/model", choose) / "config.json").read_bytes() == b"[]"
    for name, value in (("HF_HUB_OFFLINE", True), ("HF_HUB_OFFLINE", False)):
        forget()
        monkeypatch.setattr(constants, name, value)
        point_to("http://127.0.0.1:9", monkeypatch)
        assert hub.pin("owner/model") == f"owner/model@{OTHER}"
        assert hub.fetch(pinned, choose) == before
        assert hub.pin("owner/nowhere") == "owner/nowhere"


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_and_a_cache_the_error_is_the_clients(
    server: Hub, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(LocalEntryNotFoundError, match="HF_HUB_OFFLINE=0" if offline else "internet connection"):
        hub.fetch("owner/model", choose)


@pytest.mark.parametrize(("name", "error"), [("owner/gated", GatedRepoError), ("owner/none", RepositoryNotFoundError)])
def test_what_the_hub_refuses_is_its_own_error(server: Hub, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        hub.fetch(name, choose)
    assert hub.pin(name) == name


@pytest.mark.parametrize(("answer", "is_fetched"), [("n", False), ("", False), ("y", True), (None, True)])
def test_much_is_asked_for_on_a_terminal(
    server: Hub, answer: str | None, is_fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal nobody is asked."""
    monkeypatch.setattr(hub, "_MAX_BYTES", 10)
    monkeypatch.setattr("sys.stdin", Terminal(lambda: answer))
    monkeypatch.setattr("sys.stderr.isatty", lambda: answer is not None)
    if is_fetched:
        assert (hub.fetch("owner/model", choose) / "model.safetensors").exists()
    else:
        with pytest.raises(UserError, match="owner/model was not downloaded"):
            hub.fetch("owner/model", choose)
        assert server.sent == ["README.md"]


class Terminal:
    """Somebody who types an answer; None: there is nobody."""

    def __init__(self, answer: Callable[[], str | None]) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        """Whether there is somebody."""
        return self.answer() is not None

    def readline(self) -> str:
        """The answer."""
        return f"{self.answer()}\n"


def test_a_local_copy_of_a_data_set_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUMO_DATA", str(tmp_path))
    assert hub.local_copy("owner/pets") is None
    (tmp_path / "pets").mkdir()
    assert hub.local_copy("owner/pets") == tmp_path / "pets"
    assert hub.local_copy(f"owner/pets@{COMMIT}") is None
    monkeypatch.setenv("DUMO_DATA", "")
    assert hub.local_copy("owner/pets") is None
