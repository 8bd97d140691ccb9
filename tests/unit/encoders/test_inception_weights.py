"""The file of Inception's weights: made by the line in the error, refused where anything is off."""

import hashlib
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dumo.encoders import inception
from dumo.types import UserError
from golden import inception as recipe

WAY = rf"Fetch {inception.URL}.*python -c .*{inception.VARIABLE}"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(inception.VARIABLE, raising=False)


def refused(path: Path | None, match: str) -> None:
    with pytest.raises(UserError, match=rf"(?s){match}.*{WAY}"):
        inception.load(path)


def small(path: Path, **changes: Tensor) -> Path:
    """A file with all names and no shape right, but for `changes`."""
    names = recipe.net().state_dict()
    save_file({name: torch.zeros(1) for name in names} | changes, path)
    return path


def test_the_documented_line_makes_a_file_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the counters that the published file has; refused as long as its source is not the published one."""
    monkeypatch.chdir(tmp_path)
    net = recipe.net()
    counters = {name.replace("conv.weight", "bn.num_batches_tracked"): torch.tensor(0) for name in net.state_dict()}
    torch.save(net.state_dict() | {k: v for k, v in counters.items() if "num_batches" in k}, inception.FILE)
    exec(shlex.split(inception.MAKE)[2])
    source = hashlib.sha256(Path(inception.FILE).read_bytes()).hexdigest()

    made = tmp_path / "inception.safetensors"
    refused(made, f"{source}, not {inception.SHA256}")
    monkeypatch.setattr(inception, "SHA256", source)
    monkeypatch.setenv(inception.VARIABLE, str(made))
    loaded = inception.load()
    assert loaded.origin == {"source": inception.FILE, "sha256": source}
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, w in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], w)


def test_no_file_and_no_safetensors_are_refused_with_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(None, "no path is given and DUMO_INCEPTION is not set")
    refused(tmp_path / "none", "none is no file")
    monkeypatch.setenv(inception.VARIABLE, str(tmp_path))
    refused(None, "is no file")
    pickle = tmp_path / "pickle.pth"
    torch.save({"fc.bias": torch.zeros(1008)}, pickle)
    refused(pickle, "dumo reads no pickle")


def test_other_weights_are_refused_by_name_and_shape(tmp_path: Path) -> None:
    refused(small(tmp_path / "shape"), r"is \(1,\) float32 in the file, \(.*\) float32 in Inception \(\d+ such names\)")
    refused(small(tmp_path / "more", A=torch.zeros(1)), r"A is \(1,\) float32 in the file, absent in Inception")
    fewer = tmp_path / "fewer"
    save_file({"fc.bias": torch.zeros(1008)}, fewer)
    refused(fewer, "Conv2d_1a_3x3.bn.bias is absent in the file")


@pytest.mark.parametrize("wrong", [torch.full((1008,), torch.nan), torch.zeros(1008, dtype=torch.float16)])
def test_numbers_that_are_none_are_refused(wrong: Tensor) -> None:
    net = recipe.net()
    with pytest.raises(UserError, match=r"fc\.bias is (not finite|\(1008,\) float16)"):
        inception._check(net, {"sha256": inception.SHA256}, net.state_dict() | {"fc.bias": wrong}, Path("file"))


def test_a_file_that_tells_no_source_is_refused() -> None:
    net = recipe.net()
    with pytest.raises(UserError, match="says it was made of a file of sha256 nothing, not 6726825d"):
        inception._check(net, {}, dict(net.state_dict()), Path("file"))
