"""Inception against torch-fidelity's; the file of its weights; TensorFlow 1's resize by its definition."""

import hashlib
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dumo.encoders import inception
from dumo.encoders.inception import BLOCKS, Inception, InceptionFeatures, resize_tf1
from dumo.runtime.random import stream
from dumo.types import UserError
from golden import inception as recipe

WAY = f"docs/data.md says, and set {inception.VARIABLE}"
FILE = "pt_inception-2015-12-05-6726825d.pth"  # as it is published
NAMES = {"64": "f64", "192": "f192", "768": "f768", "2048": "pool", "logits_unbiased": "logits", "spatial": "spatial"}


@pytest.fixture(scope="module")
def net() -> Inception:
    return recipe.net()


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 256])
def test_every_output_is_torch_fidelitys(net: Inception, size: int) -> None:
    """The same weights on the same images: here bit for bit, and 1e-4 of the largest number on any machine."""
    seen = net(recipe.images(size))._asdict()
    for name, golden in recipe.golden()[str(size)].items():
        found = recipe.summary(seen[NAMES[name]])
        assert found["shape"] == golden["shape"]
        scale = max(abs(value) for row in golden["slice"] for value in row)
        for key in ("mean", "norm"):
            assert found[key] == pytest.approx(golden[key], rel=1e-4), name
        torch.testing.assert_close(
            torch.tensor(found["slice"]), torch.tensor(golden["slice"]), rtol=0, atol=1e-4 * scale
        )


def test_names_and_sizes_are_those_of_the_published_file() -> None:
    with torch.device("meta"):
        net = Inception()
    assert len(net.state_dict()) == 566 - 94  # of every convolution, but for a counter of batches each
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert sum(part.startswith("Mixed") for part, _ in net.named_children()) == len(BLOCKS) == 11
    assert net.get_parameter("Mixed_7b.branch3x3dbl_3b.conv.weight").shape == (384, 384, 3, 1)
    assert not any(p.requires_grad for p in net.parameters())


def test_precision_and_batch_around_it_change_nothing(net: Inception) -> None:
    x = recipe.images(64)
    two: InceptionFeatures = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        one: InceptionFeatures = net(x[:1])
    for alone, among in zip(one, two, strict=True):
        assert alone.dtype == torch.float32
        torch.testing.assert_close(alone, among[:1], rtol=1e-5, atol=1e-4)


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


@pytest.mark.nightly
def test_the_documented_line_makes_a_file_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the counters that the published file has; refused as long as its source is not the published one."""
    monkeypatch.chdir(tmp_path)
    net = recipe.net()
    counters = {name.replace("conv.weight", "bn.num_batches_tracked"): torch.tensor(0) for name in net.state_dict()}
    torch.save(net.state_dict() | {k: v for k, v in counters.items() if "num_batches" in k}, FILE)
    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    (command,) = (line for line in page.splitlines() if line.startswith("python -c"))
    exec(shlex.split(command)[2])
    source = hashlib.sha256(Path(FILE).read_bytes()).hexdigest()

    made = tmp_path / "inception.safetensors"
    refused(made, f"{source}, not {inception.SHA256}")
    monkeypatch.setattr(inception, "SHA256", source)
    monkeypatch.setenv(inception.VARIABLE, str(made))
    loaded = inception.load()
    assert loaded.origin == {"source": FILE, "sha256": source}
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, w in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], w)


def test_no_file_and_no_safetensors_are_refused_with_the_way(tmp_path: Path) -> None:
    refused(None, "no path is given and DUMO_INCEPTION is not set")
    pickle = tmp_path / "pickle.pth"
    torch.save({"fc.bias": torch.zeros(1008)}, pickle)
    refused(pickle, "pickle files are not supported")


@pytest.mark.slow
def test_other_weights_are_refused_by_name_and_shape(tmp_path: Path) -> None:
    refused(small(tmp_path / "shape"), r"is \(1,\) float32 in the file, \(.*\) float32 in Inception \(\d+ such names\)")
    refused(small(tmp_path / "more", A=torch.zeros(1)), r"A is \(1,\) float32 in the file, absent in Inception")
    fewer = tmp_path / "fewer"
    save_file({"fc.bias": torch.zeros(1008)}, fewer)
    refused(fewer, "Conv2d_1a_3x3.bn.bias is absent in the file")


@pytest.mark.slow
def test_other_numbers_or_another_source_are_refused(tmp_path: Path) -> None:
    weights, source = recipe.net().state_dict(), {"sha256": inception.SHA256}
    for wrong, said in (
        (torch.full((1008,), torch.nan), "not finite"),
        (torch.zeros(1008).half(), r"\(1008,\) float16"),
    ):
        save_file(weights | {"fc.bias": wrong}, tmp_path / "wrong", source)
        refused(tmp_path / "wrong", rf"fc\.bias is {said}")
    save_file(weights, tmp_path / "unsaid")
    refused(tmp_path / "unsaid", "was converted from a file with SHA-256 nothing, not 6726825d")


def noise(h: int, w: int) -> Tensor:
    return torch.randint(256, (1, 3, h, w), generator=stream("resize", h, w)).float()


@pytest.mark.parametrize(("h", "w", "size"), [(4, 4, 7), (5, 3, 8), (9, 16, 5), (32, 32, 32), (1, 1, 3)])
def test_is_the_definition(h: int, w: int, size: int) -> None:
    """out[i, j] = x at (i h / size, j w / size), between the four pixels around, the last row and column repeated."""
    x = noise(h, w).double()
    out = resize_tf1(x.float(), size)
    for i in range(size):
        for j in range(size):
            y, z = i * h / size, j * w / size
            a, b = int(y), int(z)
            rows = (1 - (y - a), a), (y - a, min(a + 1, h - 1))
            columns = (1 - (z - b), b), (z - b, min(b + 1, w - 1))
            wanted = sum(p * q * x[:, :, r, c] for p, r in rows for q, c in columns)
            torch.testing.assert_close(out[:, :, i, j].double(), wanted, rtol=1e-5, atol=1e-3)
