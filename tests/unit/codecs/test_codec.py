"""Codecs: what they promise of scale and shape, and how they refuse weights that are not the ones meant."""

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pyarrow.parquet as parquet
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dumo.codecs import Codec, DcAe, Identity, QwenVae, SdVae, Taef2
from dumo.codecs.autoencoder import CONFIG, WEIGHTS
from dumo.codecs.taesd import Tiny
from dumo.random import keyed, stream
from dumo.types import UserError

SPEC = TypeAdapter[Codec](Codec)
PSNR = {  # dB on rows 0, 125 ... 875 of imagenet-sample
    256: (32.2, 35.8, 32.7, 25.6, 26.0, 22.6, 20.7, 35.6),
    64: (28.8, 29.2, 29.0, 21.2, 26.0, 21.5, 25.5, 27.6),
}
DEVIATION = {256: 0.83, 64: 0.89}  # of taef2's latent, before the scale


def images(side: int, count: int = 2) -> Tensor:
    """Uniform noise in [-1, 1]."""
    return torch.rand(count, 3, side, side, generator=stream("images", side)) * 2 - 1


def filled(net: nn.Module) -> nn.Module:
    """The net with normal weights that keep the size of what goes through."""
    draws = stream("weights")
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=draws) / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else p.data
    return net


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Random weights in taef2's layout, in half precision."""
    file = tmp_path / "tiny.safetensors"
    save_file({key: p.half() for key, p in filled(Tiny(32)).state_dict().items()}, file)
    return file


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A small AutoencoderKL of 4 channels and factor 2, as diffusers saves it."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    net = AutoencoderKL(**blocks, block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16)
    filled(net).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A small AutoencoderDC of 4 channels and factor 2, as diffusers saves it."""
    from diffusers import AutoencoderDC

    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in {
        "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8), "layers_per_block": (1, 1),
        "qkv_multiscales": ((), (5,)),
    }.items()}  # fmt: skip
    filled(AutoencoderDC(latent_channels=4, attention_head_dim=4, **sides)).save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    """A small AutoencoderKLQwenImage of the published 16 channels and factor 8, as diffusers saves it."""
    from diffusers import AutoencoderKLQwenImage

    filled(AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1)).save_pretrained(tmp_path / "frame")
    return tmp_path / "frame"


def test_identity_gives_what_it_gets() -> None:
    codec = Identity().open()
    assert codec.sha256 is None
    assert codec.shape(32) == (3, 32, 32)
    assert torch.equal(codec.encode(images(8)), images(8))
    assert torch.equal(codec.decode(images(8)), images(8))
    assert codec.decode(3 * images(8)).abs().max() == 1


def test_every_kind_comes_back_from_its_own_words() -> None:
    for codec in (Identity(), Taef2(), SdVae(), DcAe(), QwenVae(), DcAe(variant="sana", scale=tuple(range(1, 33)))):
        assert SPEC.validate_json(SPEC.dump_json(codec)) == codec
        assert SPEC.validate_python(codec.model_dump()) == codec


def test_published_shapes_and_scales() -> None:
    """SD-VAE: Rombach et al. 2022; DC-AE: the `scaling_factor` of each published config."""
    assert (SdVae().shape(256), SdVae().scale) == ((4, 32, 32), 0.18215)
    assert (DcAe().shape(512), DcAe().scale) == ((32, 16, 16), 0.3189)
    assert (DcAe(variant="mix").scale, DcAe(variant="sana").scale) == (0.4552, 0.41407)
    assert DcAe(variant="sana").weights == "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
    assert DcAe(variant="sana", weights="here", scale=2.0).model_dump()["weights"] == "here"
    assert Taef2().shape(64) == (32, 8, 8)
    assert QwenVae().shape(512) == (16, 64, 64)


def test_sides_that_do_not_divide_are_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match="250 pixels do not divide by 8"):
        SdVae().shape(250)
    with pytest.raises(UserError, match="12 pixels do not divide by 8"):
        Taef2(weights=str(tiny), sha256=None).open().encode(images(12))


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.0}, {"scale": -1.0}, {"scale": (1.0, 2.0)}, {"shift": (0.0,)}, {"sha256": "abc"}, {"size": 3}]
)
@pytest.mark.parametrize("kind", ["identity", "taef2", "sd-vae", "dc-ae", "qwen-vae"])
def test_impossible_numbers_are_refused(kind: str, wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SPEC.validate_python({"kind": kind} | wrong)


def test_normalisations_compose() -> None:
    """What was normalised by the channels' mean and deviation has 0 and 1, and decodes to the same."""
    codec = SdVae(shift=0.5)
    raw = torch.randn(8, 4, 4, 4, generator=stream("raw"), dtype=torch.float64) * 7 + 3
    x = codec.normalise(raw)
    mean, deviation = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
    better = codec.normalised(tuple(mean.tolist()), tuple(deviation.tolist()))
    y = better.normalise(raw)
    torch.testing.assert_close(y, (x - mean[:, None, None]) / deviation[:, None, None], rtol=0, atol=1e-12)
    torch.testing.assert_close(better.restore(y), raw, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="channel 2 never changes"):
        codec.normalised((0.0,) * 4, (1.0, 1.0, 0.0, 1.0))


def test_tiny_has_the_published_layout(tiny: Path) -> None:
    """The count of taef2's parameters, and where a pixel's change reaches: 8 x 8 pixels and their surroundings."""
    net = Tiny(32)
    assert sum(p.numel() for p in net.parameters()) == 2_677_027
    assert {key.split(".")[0] for key in net.state_dict()} == {"encoder", "decoder"}
    assert [type(layer).__name__ for layer in net.decoder[:4]] == ["Clamp", "Conv2d", "ReLU", "Block"]
    codec = Taef2(weights=str(tiny), sha256=None).open()
    x = codec.encode(images(16))
    assert x.shape == (2, 32, 2, 2)
    assert codec.decode(x).shape == (2, 3, 16, 16)
    double = Taef2(weights=str(tiny), sha256=None, scale=2.4).open()
    torch.testing.assert_close(double.encode(images(16)), 2 * x)
    torch.testing.assert_close(double.decode(2 * x), codec.decode(x))
    assert codec.sha256 == hashlib.sha256(tiny.read_bytes()).hexdigest()


def test_encoding_records_no_gradient(tiny: Path) -> None:
    codec = Taef2(weights=str(tiny), sha256=None).open()
    x = codec.encode(images(16).requires_grad_())
    assert not x.requires_grad
    (x * torch.ones(1, requires_grad=True)).sum().backward()  # and what comes can be trained on


def test_sd_vae_gives_diffusers_moments(vae: Path) -> None:
    from diffusers import AutoencoderKL

    net = AutoencoderKL.from_pretrained(vae).eval()
    spec = SdVae(weights=str(vae), factor=2, shift=0.1)
    codec = spec.open()
    moments = codec.encode(images(16))
    assert moments.shape == (2, 8, 8, 8)
    assert moments.is_contiguous()  # as files of tensors want it, whatever layout convolutions take
    with torch.no_grad():
        law = net.encode(images(16)).latent_dist
        torch.testing.assert_close(moments[:, :4], (law.mean - 0.1) * 0.18215)
        torch.testing.assert_close(moments[:, 4:], law.std * 0.18215)
        x = codec.sample(moments, "draw", rows=[7, 3])
        z = keyed("draw", rows=[7, 3], shape=x.shape[1:])
        torch.testing.assert_close(x, moments[:, :4] + moments[:, 4:] * z)
        torch.testing.assert_close(codec.decode(x), net.decode(x / 0.18215 + 0.1).sample.clamp(-1, 1))
    assert codec.sha256 == hashlib.sha256((vae / WEIGHTS).read_bytes()).hexdigest()


def test_dc_ae_gives_diffusers_latent(deep: Path) -> None:
    from diffusers import AutoencoderDC

    net = AutoencoderDC.from_pretrained(deep).eval()
    scale = (0.5, 1.0, 2.0, 4.0)
    codec = DcAe(weights=str(deep), channels=4, factor=2, scale=scale).open()
    x = codec.encode(images(16))
    assert x.shape == (2, *codec.shape(16))
    with torch.no_grad():
        raw = net.encode(images(16)).latent
        torch.testing.assert_close(x, raw * torch.tensor(scale)[:, None, None])
        assert torch.equal(codec.sample(x, "draw", rows=range(2)), x)
        torch.testing.assert_close(codec.decode(x), net.decode(raw).sample.clamp(-1, 1))


def test_qwen_vae_gives_the_latent_of_the_stock_pipeline(frame: Path) -> None:
    """As `QwenImagePipeline` decodes and its twin for images encodes, with the mean and deviation of the config."""
    from diffusers import AutoencoderKLQwenImage

    net = AutoencoderKLQwenImage.from_pretrained(frame).eval()
    codec = QwenVae(weights=str(frame)).open()
    mean, std = (torch.tensor(net.config[f"latents_{name}"]).view(1, 16, 1, 1, 1) for name in ("mean", "std"))
    moments = codec.encode(images(16))
    assert moments.shape == (2, 32, 2, 2)
    assert moments.is_contiguous()
    with torch.no_grad():
        law = net.encode(images(16).unsqueeze(2)).latent_dist
        torch.testing.assert_close(moments[:, :16], ((law.mean - mean) * (1.0 / std))[:, :, 0])
        torch.testing.assert_close(moments[:, 16:], (law.std / std)[:, :, 0])
        x = codec.sample(moments, "draw", rows=range(2))
        theirs = net.decode(x.unsqueeze(2) / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
        torch.testing.assert_close(codec.decode(x), theirs)
    torch.testing.assert_close(codec.decode(x)[:1], codec.decode(x[:1]))  # a row is a video, and no frame of one


def truncated(file: Path) -> None:
    """Cut the last bytes off."""
    file.write_bytes(file.read_bytes()[:-10])


def other(file: Path) -> None:
    """Weights of one more output channel."""
    save_file(Tiny(33).state_dict(), file)


@pytest.mark.parametrize(
    ("spoil", "sha256", "said"),
    [
        (Path.unlink, None, r"there is no such file.*taesd.*set codec.weights"),
        (truncated, None, "is damaged or is not safetensors.*take another copy"),
        (lambda file: file.write_bytes(b"PK\3\4" * 99), None, "dumo reads no pickle"),
        (other, None, r"decoder.1.weight is \(64, 33, 3, 3\) in the file, \(64, 32, 3, 3\) in the codec"),
        (Path.exists, "0" * 64, "has SHA-256 [0-9a-f]{64}, and codec.sha256 asks for 0{64}"),
    ],
)
def test_wrong_weights_are_refused(tiny: Path, spoil: Callable[[Path], object], sha256: str | None, said: str) -> None:
    spoil(tiny)
    with pytest.raises(UserError, match=said):
        Taef2(weights=str(tiny), sha256=sha256).open()


@pytest.mark.parametrize("ending", ["bin", "pt", "pth", "ckpt", "PKL"])
def test_pickles_are_refused(tiny: Path, ending: str) -> None:
    file = tiny.rename(tiny.with_suffix(f".{ending}"))
    with pytest.raises(UserError, match="dumo reads no pickle"):
        Taef2(weights=str(file), sha256=None).open()


def test_line_that_converts_a_pickle_does(tiny: Path) -> None:
    """As the message gives it, run where the file is."""
    torch.save(load_file(tiny), tiny.with_suffix(".pth"))
    tiny.unlink()
    with pytest.raises(UserError) as refused:
        Taef2(weights=str(tiny.with_suffix(".pth")), sha256=None).open()
    line = str(refused.value).splitlines()[1].strip().removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-W", "ignore", "-c", line], cwd=tiny.parent, check=True)
    assert Taef2(weights=str(tiny), sha256=None).open().sha256


def test_variables_in_paths_are_expanded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", str(tiny.parent))
    assert Taef2(weights="$HERE/tiny.safetensors", sha256=None).open().sha256
    monkeypatch.delenv("DUMO_DATA", raising=False)
    with pytest.raises(UserError, match=r"\$DUMO_DATA/.*not set"):
        Taef2().open()


def test_wrong_folders_are_refused(vae: Path, deep: Path) -> None:
    spec = SdVae(weights=str(vae), factor=2)
    with pytest.raises(UserError, match=r"has 4 channels and factor 2, codec sd-vae says 4, 8"):
        SdVae(weights=str(vae)).open()
    with pytest.raises(UserError, match=r"asks for 0{64}"):
        spec.model_copy(update={"sha256": "0" * 64}).open()
    with pytest.raises(UserError, match=r"does not fit|no AutoencoderDC"):
        DcAe(weights=str(vae), channels=4, factor=2).open()
    (vae / CONFIG).unlink()
    with pytest.raises(UserError, match="no AutoencoderKL that diffusers can load"):
        spec.open()
    (vae / WEIGHTS).rename(vae / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="dumo reads no pickle"):
        spec.open()
    (vae / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="there is no such file"):
        spec.open()


def test_weights_that_lack_a_layer_are_refused(vae: Path) -> None:
    """diffusers would draw it at random and go on."""
    tensors = load_file(vae / WEIGHTS)
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, vae / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=r"decoder.conv_out.weight is missing"):
        SdVae(weights=str(vae), factor=2).open()


def test_hub_is_asked_for_what_is_no_folder(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def brings(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert allow_patterns == [CONFIG, WEIGHTS]
        return str(vae)

    def fails(name: str, **rest: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", brings)
    assert SdVae(factor=2).open().sha256
    assert asked == ["stabilityai/sd-vae-ft-ema"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UserError, match=r"sd-vae-ft-ema is no folder, and not available from the hub"):
        SdVae().open()
    with pytest.raises(UserError, match="is no folder"):
        SdVae(weights="/no/such/folder").open()


def test_hub_is_asked_for_a_folder_of_a_pipeline(frame: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def brings(name: str, *, allow_patterns: list[str]) -> str:
        assert (name, allow_patterns) == ("Qwen/Qwen-Image", [f"vae/{CONFIG}", f"vae/{WEIGHTS}"])
        return str(frame.rename(frame.with_name("vae")).parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", brings)
    assert QwenVae().open().sha256


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"codec sd-vae needs diffusers: pip install 'dumo\[diffusers\]'"):
        SdVae().open()


@pytest.mark.data
@pytest.mark.parametrize("side", PSNR)
def test_taef2_reconstructs_as_measured(side: int) -> None:
    """The real weights on real images: PSNR within 0.3 dB, deviation within 3 % of what was measured."""
    table = parquet.read_table(Path(os.environ["DUMO_DATA"], "imagenet-sample/train-00000-of-00001.parquet"))
    codec, found, encoded = Taef2().open(), list[float](), list[Tensor]()
    for row in range(0, 1000, 125):
        picture = Image.open(io.BytesIO(table["image"][row]["bytes"].as_py())).convert("RGB")
        picture = picture if side == 256 else picture.resize((side, side), Image.Resampling.BICUBIC)
        levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        image = levels.view(1, side, side, 3).permute(0, 3, 1, 2) / 127.5 - 1
        encoded.append(codec.encode(image))
        found.append(-10 * float(((codec.decode(encoded[-1]) - image) / 2).square().mean().log10()))
    assert found == pytest.approx(PSNR[side], abs=0.3)
    assert float(torch.cat(encoded).std()) == pytest.approx(1.2 * DEVIATION[side], rel=0.03)
