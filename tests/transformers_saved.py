"""Tiny transformers as their users have them: a folder that diffusers saved, and a file of what encoders made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import transformers_tiny as tiny
from dumo.encoders.pipeline_folder import Pipeline
from dumo.nets import Pretrained
from dumo.nets.dualized import Dualized
from dumo.nets.family import FAMILIES
from dumo.nets.text_rows import Codes, Rows
from dumo.types import Needs, Spec
from rows_given import given_rows

Saved = Callable[[str], Pretrained]
VU = Needs(heads=("v", "u"))
SHAPE, CLASSES = (4, 8, 8), 2  # of a sample; two captions, and that of none
NOISE = ("sd1", "sd2-v", "sdxl", "pixart", "pixart-alpha")  # of a diffusion
IMAGES = [
    name
    for name, row in tiny.TINY.items()
    if name not in NOISE and (len(row.shape) == 4 or name.startswith(("flux", "chroma", "qwen")))
]
SCHEDULER = {  # of Stable Diffusion 1.5
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "trained_betas": None,
}  # fmt: skip
SCHEDULERS = {
    "sd2-v": SCHEDULER | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "pixart": SCHEDULER | {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
}
SCHEDULERS["pixart-alpha"] = SCHEDULERS["pixart"]
MASKED = (
    "chroma-masked", "sana-masked", "sana-sprint", "qwen", "z-image-lengths", "lumina2", "prx-masked", "pixart",
    "pixart-alpha",
)  # fmt: skip
GUIDANCE = {"flux-guided": 3.5, "flux2": 3.5, "sana-sprint": 4.5}
NO_LOWPASS = ("chroma", "chroma-masked", "z-image", "z-image-lengths")  # the latter for its time alone


class File(Spec):
    """Rows of a file."""

    source: str

    def build(self, classes: int) -> Rows:
        """All of them."""
        there = load_file(self.source)
        return given_rows(there["tokens"], there.get("mask"), there.get("pooled"))


def of(folder: Path | str, **fields: Any) -> Pretrained:  # noqa: ANN401
    """A spec of the model in a folder, of a run with that pipeline; its classes are codes."""
    return Pretrained(**{"texts": Codes()} | fields).within(Pipeline(source=str(folder)))


def saved(place: Path, name: str) -> Pretrained:
    """A spec of a tiny model in a folder, with texts, but for a low-pass."""
    model: Any = tiny.TINY[name].model()
    model.save_pretrained(place / name)
    save_file(texts(name), place / f"{name}.safetensors")
    if name in NOISE:
        (place / name / "scheduler").mkdir(exist_ok=True)
        config = json.dumps(SCHEDULERS.get(name, SCHEDULER))
        (place / name / "scheduler" / "scheduler_config.json").write_text(config, encoding="utf-8")
    spec = of(place / name, guidance=GUIDANCE.get(name), lowpass=None)
    return spec.model_copy(update={"texts": File(source=str(place / f"{name}.safetensors"))})


def built(spec: Pretrained, needs: Needs = VU, **fields: object) -> Dualized:
    """Its weights and adapters are functions of the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spec.model_copy(update=fields).build(needs, SHAPE, CLASSES)


def texts(name: str) -> dict[str, Tensor]:
    """Three rows, the last for none, of which the first has fewer tokens where they are masked."""
    g = torch.Generator().manual_seed(3)
    rows = {"tokens": torch.randn(CLASSES + 1, tiny.L, 16, generator=g)}
    if name in MASKED:
        rows["mask"] = torch.cat([tiny.mask(), tiny.mask()[1:]])
    if FAMILIES[tiny.TINY[name].kind].pooled_text_width or name == "sdxl":
        rows["pooled"] = torch.randn(CLASSES + 1, 12, generator=g)
    return rows


def batch(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, c, t."""
    g = torch.Generator().manual_seed(4)
    return torch.randn(rows, *SHAPE, generator=g), torch.arange(rows) % CLASSES, torch.linspace(0.3, 0.9, rows)


def asked(name: str, model: Any, x: Tensor, c: Tensor, t: Tensor) -> Tensor:  # noqa: ANN401, a model of diffusers
    """The velocity noise - data, as the model's pipeline would ask for it."""
    row, rows = tiny.TINY[name], texts(name)
    packed = len(row.shape) == 3
    drawn = {3: rows["tokens"][c], 2: rows.get("pooled", rows["tokens"][:, 0])[c]}
    given = row.given(pack(x) if packed else x, t, lambda *shape: drawn[len(shape)])
    given |= placed(name, given, x.shape[2] // 2, x.shape[3] // 2)
    match name:  # what a pipeline says otherwise than `tiny` does
        case "flux2" | "flux2-klein":
            given["txt_ids"][..., 3] = torch.arange(tiny.L)
        case "sana-sprint":
            given["timestep"] = 1000 * model.config["timestep_scale"] * t
        case "cogview4":  # pixels
            given["original_size"] = given["target_size"] = 8.0 * torch.tensor([x.shape[2:]] * len(c))
        case "z-image" | "z-image-lengths":
            given["cap_feats"] = [rows["tokens"][i][rows["mask"][i] if "mask" in rows else slice(None)] for i in c]
        case _:
            pass
    out = model(**given, return_dict=False)[0]
    if isinstance(out, list):
        out = torch.stack(out).squeeze(2)
    out = unpack(out, x.shape[2] // 2) if packed else out
    return -out if name.startswith(("z-image", "lumina2")) else out


def pack(x: Tensor) -> Tensor:
    """As Flux's pipeline: (b, c, h, w) -> (b, h w / 4, 4 c)."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(y: Tensor, rows: int) -> Tensor:
    """As Flux's pipeline: the inverse."""
    b, n, c = y.shape
    return y.view(b, rows, n // rows, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * rows, -1)


def placed(name: str, given: dict[str, Any], rows: int, columns: int) -> dict[str, Any]:
    """What a pipeline says of where patches lie, by its own code."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    found: dict[str, Any] = {}
    if "img_ids" in given and name.startswith("flux2"):
        found["img_ids"] = Flux2Pipeline._prepare_latent_ids(torch.empty(tiny.B, 1, rows, columns))
    elif "img_ids" in given:
        found["img_ids"] = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
    if "img_shapes" in given:
        found["img_shapes"] = [[(1, rows, columns)]] * tiny.B
    return found
