"""Codecs: what they promise of scale and shape, and how they refuse weights that are not the ones meant."""

import hashlib
import io
import json
import os
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from autoencoder import filled, taef2
from dumo import runtime
from dumo.encoders import Codec, DcAe, PipelineVae, SdVae, Taef2
from dumo.encoders import codec as codecs
from dumo.encoders.autoencoder import CONFIG
from dumo.encoders.part import DIFFUSERS_FILE as WEIGHTS
from dumo.encoders.pipeline_folder import Pipeline
from dumo.encoders.taesd import TinyAutoencoder
from dumo.runtime.random import keyed_normal, stream
from dumo.types import UserError
from tiers import tiered

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"

SPEC = TypeAdapter[Codec](Codec)
PSNR = {  # dB on rows 0, 125 ... 875 of imagenet-sample
    256: (32.2, 35.8, 32.7, 25.6, 26.0, 22.6, 20.7, 35.6),
    64: (28.8, 29.2, 29.0, 21.2, 26.0, 21.5, 25.5, 27.6),
}
DEVIATION = {256: 0.83, 64: 0.89}  # of taef2's latent, before the scale


def images(side: int, count: int = 2) -> Tensor:
    """Uniform noise in [-1, 1]."""
    return torch.rand(count, 3, side, side, generator=stream("images", side)) * 2 - 1


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Random weights in taef2's layout."""
    return taef2(tmp_path / "tiny.safetensors")


def vae_of(folder: Path, **config: object) -> Path:
    """A narrow AutoencoderKL of SD's channels and factor, but for `config`, as diffusers saves it."""
    from diffusers import AutoencoderKL

    of = {"block_out_channels": (4,) * 4, "latent_channels": 4, "norm_num_groups": 2, "sample_size": 16} | config
    blocks = len(of["block_out_channels"])  # type: ignore[arg-type]
    types = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    filled(AutoencoderKL(**types, **of)).save_pretrained(folder)
    return folder


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """That of SD."""
    return vae_of(tmp_path / "vae")


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A narrow AutoencoderDC of the published 32 channels and factor 32, as diffusers saves it."""
    from diffusers import AutoencoderDC

    blocks = {"block_types": ("ResBlock",) * 6, "block_out_channels": (4, 4, 4, 4, 8, 32), "layers_per_block": (1,) * 6,
              "qkv_multiscales": ((),) * 6}  # fmt: skip
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    net = AutoencoderDC(latent_channels=32, attention_head_dim=4, scaling_factor=0.3189, **sides)
    filled(net).save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


def qwen_of(folder: Path) -> Path:
    """A small AutoencoderKLQwenImage of the published 16 channels and factor 8, as diffusers saves it."""
    from diffusers import AutoencoderKLQwenImage

    filled(AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1)).save_pretrained(folder)
    return folder


def test_published_shapes_and_scales() -> None:
    """SD-VAE: Rombach et al. 2022; the others: scaling_factor and shift_factor of each published config."""
    assert (SdVae().shape(256), SdVae().published.scale) == ((4, 32, 32), 0.18215)
    assert (DcAe().shape(512), DcAe().published.scale) == ((32, 16, 16), 0.3189)
    assert (DcAe(variant="mix").published.scale, DcAe(variant="sana").published.scale) == (0.4552, 0.41407)
    assert DcAe(variant="sana").weights == "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
    assert DcAe(variant="sana", weights="here").model_dump()["weights"] == "here"
    assert Taef2().shape(64) == (32, 8, 8)
    assert of(SD3).published[1:] == (16, 8, 1.5305, 0.0609)
    for name in ("black-forest-labs/FLUX.1-dev", "Tongyi-MAI/Z-Image"):
        assert of(name).published[1:] == (16, 8, 0.3611, 0.1159)
    assert of("Efficient-Large-Model/Sana_1600M_1024px_diffusers").shape(512) == DcAe(variant="sana").shape(512)
    assert of("Qwen/Qwen-Image").shape(512) == (16, 64, 64)


def of(source: Path | str) -> PipelineVae:
    """The autoencoder of a pipeline."""
    return PipelineVae().within(Pipeline(source=str(source)))


@pytest.mark.parametrize("wrong", [{"scale": 1.0}, {"variant": "another"}, {"variant": []}, {"weights": None}])
@pytest.mark.parametrize("kind", ["taef2", "sd-vae", "dc-ae", "pipeline"])
def test_what_is_not_published_is_refused(kind: str, wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SPEC.validate_python({"kind": kind} | wrong)


@pytest.mark.parametrize(
    "codec",
    [Taef2(), SdVae(), *map(of, (SD3, "Qwen/Qwen-Image"))],
    ids=lambda codec: codec.label,
)
def test_restore_is_the_inverse_of_normalise(codec: Codec) -> None:
    raw = torch.randn(2, codec.channels * (1 + codec.is_gaussian), 4, 4, generator=stream("raw"), dtype=torch.float64)
    torch.testing.assert_close(codec.restore(codec.normalise(raw)), raw, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_tiny_has_the_published_layout(tiny: Path) -> None:
    """The count of taef2's parameters, and where a pixel's change reaches: 8 x 8 pixels and their surroundings."""
    net = TinyAutoencoder(32)
    assert sum(p.numel() for p in net.parameters()) == 2_677_027
    assert {key.split(".")[0] for key in net.state_dict()} == {"encoder", "decoder"}
    assert [type(layer).__name__ for layer in net.decoder[:4]] == ["Clamp", "Conv2d", "ReLU", "TaesdBlock"]
    codec = Taef2(weights=str(tiny)).open()
    x = codec.encode(images(16).requires_grad_())
    assert x.shape == (2, 32, 2, 2)
    assert not x.requires_grad
    (x * torch.ones(1, requires_grad=True)).sum().backward()  # and what comes can be trained on
    assert codec.decode(x).shape == (2, 3, 16, 16)
    with torch.no_grad():
        raw = TinyAutoencoder(32).requires_grad_(False)
        raw.load_state_dict({name: p.float() for name, p in load_file(tiny).items()})
        torch.testing.assert_close(x, raw.encode(images(16)) * 1.2)
        torch.testing.assert_close(codec.decode(x), raw.decode(x / 1.2).clamp(-1, 1))
    assert codec.sha256 == hashlib.sha256(tiny.read_bytes()).hexdigest()


def test_a_few_images_pass_at_a_time(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their moments are those of all at once."""
    opened = SdVae(weights=str(vae)).open()
    x, whole, seen = images(16, 7), opened.encode(images(16, 7)), list[int]()
    real = type(opened.net).encode
    monkeypatch.setattr(type(opened.net), "encode", lambda self, x: seen.append(len(x)) or real(self, x))
    monkeypatch.setattr(codecs, "PIXELS_AT_ONCE", 3 * 16 * 16)
    torch.testing.assert_close(opened.encode(x), whole)
    assert seen == [3, 3, 1]
    assert [codecs.images_at_once(*size) for size in ((16, 16), (24, 16), (64, 64))] == [3, 2, 1]


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, 0.0), (1.5305, 0.0609)])
def test_sd_vae_gives_diffusers_moments(scale: float, shift: float, tmp_path: Path) -> None:
    """And SD 3's latent is shifted, as its pipeline does it."""
    from diffusers import AutoencoderKL

    config = {"latent_channels": 16, "scaling_factor": scale, "shift_factor": shift} if shift else {}
    net = AutoencoderKL.from_pretrained(vae_of(folder := tmp_path / "vae", **config)).eval()
    spec = of(tmp_path) if shift else SdVae(weights=str(folder))
    codec, n = spec.open(), spec.channels
    moments = codec.encode(images(16))
    assert moments.shape == (2, 2 * n, 2, 2)
    assert moments.is_contiguous()  # as files of tensors want it, whatever layout convolutions take
    with torch.no_grad():
        law = net.encode(images(16)).latent_dist
        torch.testing.assert_close(moments[:, :n], (law.mean - shift) * scale)
        torch.testing.assert_close(moments[:, n:], law.std * scale)
        x = codec.codec.sample(moments, "draw", rows=[7, 3])
        z = keyed_normal("draw", rows=[7, 3], shape=x.shape[1:])
        torch.testing.assert_close(x, moments[:, :n] + moments[:, n:] * z)
        torch.testing.assert_close(codec.decode(x), net.decode(x / scale + shift).sample.clamp(-1, 1))
    assert spec.digest() == codec.sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def test_dc_ae_gives_diffusers_latent(deep: Path) -> None:
    from diffusers import AutoencoderDC

    net = AutoencoderDC.from_pretrained(deep).eval()
    codec = DcAe(weights=str(deep)).open()
    x = codec.encode(images(64))
    assert x.shape == (2, *codec.shape(64))
    with torch.no_grad():
        raw = net.encode(images(64)).latent
        torch.testing.assert_close(x, raw * 0.3189)
        assert torch.equal(codec.codec.sample(x, "draw", rows=range(2)), x)
        torch.testing.assert_close(codec.decode(x), net.decode(raw).sample.clamp(-1, 1))


def test_qwen_vae_gives_the_latent_of_the_stock_pipeline(tmp_path: Path) -> None:
    """As `QwenImagePipeline` decodes and its twin for images encodes, with the mean and deviation of the config."""
    from diffusers import AutoencoderKLQwenImage

    net = AutoencoderKLQwenImage.from_pretrained(qwen_of(tmp_path / "vae")).eval()
    codec = of(tmp_path).open()
    mean, std = (torch.tensor(net.config[f"latents_{name}"]).view(1, 16, 1, 1, 1) for name in ("mean", "std"))
    moments = codec.encode(images(16))
    assert moments.shape == (2, 32, 2, 2)
    assert moments.is_contiguous()
    with torch.no_grad():
        law = net.encode(images(16).unsqueeze(2)).latent_dist
        torch.testing.assert_close(moments[:, :16], ((law.mean - mean) * (1.0 / std))[:, :, 0])
        torch.testing.assert_close(moments[:, 16:], (law.std / std)[:, :, 0])
        x = codec.codec.sample(moments, "draw", rows=range(2))
        theirs = net.decode(x.unsqueeze(2) / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
        torch.testing.assert_close(codec.decode(x), theirs)
    torch.testing.assert_close(codec.decode(x)[:1], codec.decode(x[:1]))  # a row is a video, and no frame of one


def test_a_mean_and_a_scaling_factor_are_both_read(tmp_path: Path) -> None:
    """As `StableDiffusionXLPipeline` does with Playground's: z * std / scaling_factor + mean."""
    statistics = {"latents_mean": [1.0, 0.0, -1.0, 2.0], "latents_std": [8.0, 4.0, 2.0, 1.0]}
    vae_of(tmp_path / "vae", scaling_factor=0.5, **statistics)
    codec = of(tmp_path).open()
    z = torch.randn(1, 4, 2, 2)
    mean, std = (torch.tensor(statistics[f"latents_{name}"]).view(4, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        theirs = codec.net.net.decode(z * std / 0.5 + mean).sample.clamp(-1, 1)  # pyright: ignore
    torch.testing.assert_close(codec.decode(z), theirs)


def test_a_config_from_before_it_had_a_scale_has_that_of_diffusers(tmp_path: Path) -> None:
    """So have exports. Of a class that has no usual one it is refused."""
    from diffusers import AutoencoderKL

    config = vae_of(tmp_path / "vae") / CONFIG
    fields = json.loads(config.read_text())
    del fields["scaling_factor"]
    config.write_text(json.dumps(fields))
    assert of(tmp_path).published.scale == AutoencoderKL.from_config(fields).config.scaling_factor == 0.18215
    config.write_text('{"_class_name": "AutoencoderDC", "latent_channels": 32, "encoder_block_out_channels": [4, 4]}')
    with pytest.raises(UserError, match=r"vae/config.json has no shift and scale .* of a AutoencoderDC: restore"):
        _ = of(tmp_path).published


def test_an_autoencoder_that_cuts_patches_first_has_the_factor_of_its_config(tmp_path: Path) -> None:
    """Wan 2.2's 5 B. A factor that is not that of the weights is refused before anything is kept."""
    from diffusers import AutoencoderKLWan

    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    filled(AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, **statistics, **patches)).save_pretrained(
        tmp_path / "vae"
    )
    assert of(tmp_path).shape(32) == (4, 2, 2)
    assert of(tmp_path).open().encode(images(32)).shape == (2, 8, 2, 2)
    config = tmp_path / "vae" / CONFIG
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"scale_factor_spatial": 8}))
    with pytest.raises(UserError, match=r"to shape \(8, 2, 2\), .* implies \(8, 4, 4\): restore"):
        of(tmp_path).open().encode(images(32))


def test_weights_of_the_noted_hash_are_opened(tiny: Path, vae: Path) -> None:
    """Each kind."""
    for codec in (Taef2(weights=str(tiny)), SdVae(weights=str(vae))):
        known = codec.digest()
        assert codec.model_copy(update={"sha256": known}).open().sha256 == known


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "installed_version", lambda name: None)
    with pytest.raises(UserError, match=r"codec sd-vae sd needs diffusers, .*pip install .*'diffusers<"):
        SdVae().open()


@pytest.mark.data
@pytest.mark.parametrize("side", tiered(PSNR, ci=[64]))
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
