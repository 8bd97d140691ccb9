"""A family's way from a folder of diffusers to images, by the command line, and how far these are from dumo's.

1. `Case.of` makes a complete tiny pipeline and three captioned photographs, and runs `dumo encode` and `train`.
2. `Case.export` runs `dumo export`.
3. `Case.image_errors` runs the Python block of the exported card verbatim, in a process that cannot import dumo, where
   `recorder.py` records noise and images. Then dumo makes images of the same noise, to compare.
"""

import ast
import atexit
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dumo.export.model_card import PROMPT
from dumo.export.stock import PIPELINE_BY_CLASS, PIPELINE_BY_MODEL, StockPipeline
from dumo.flow.path import Diffusion
from dumo.flow.sampling import integrate
from dumo.nets.dualized import Dualized
from dumo.nets.family import FAMILIES, unpack_latents
from dumo.run.trained import TrainedRun
from dumo.run.weights import load_run
from e2e.shell import Done, call
from forked import ENVIRONMENT
from pipelines import PIPELINES, SIDE, save
from transformers_tiny import TINY

CAPTIONS = ("a red bird on a branch", "two cats on a sofa, one of them asleep", "a dog")
RECIPE = "sd3-lora"
# fields of run.yaml that cases set
LORA = ("net.lora={rank: 4}",)
FULL = ("net.lora=null",)
EDITED = ["data.images.captions.source=source", "data.images.flip=false", "objective.drop=0"]
CODES = ("net.texts={kind: codes}", "data.images.captions=null", "objective.drop=0")  # a random one for each class
SHORT = (
    "train.precision=fp32",
    "train.steps=2",
    "train.batch=4",
    "train.micro_batch=4",
    "train.share=1",
    "train.schedule.warmup=0",
    "evaluate.protocol.samples=20",
    "net.checkpoint=false",
    "objective.guide.zeta=0",
)
# |a - b| / |b| of pixels. What is added otherwise than dumo adds it, adapters and guidance, is rounded otherwise: ours.
LIMITS = {"full": 2e-6, "guided": 5e-6, "merged": 5e-6, "lora": 5e-6}
STORED: dict[str, tuple[str, str | None]] = {  # how a pipeline is stored: in which dtype, and in files of which variant
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "fp16 files": ("float16", "fp16"),
}
FOUR_PASSES_LIMIT = 1e-5  # where rounding adds up
HALF_LIMIT = 8  # of images in bf16 or fp16, in units of torch.finfo(dtype).eps: ours
UNFILTERED_HALF_LIMIT = 32  # of four passes of Chroma, whose waves of 1000 rad read times as they are rounded
FOUR_PASSES_LIMITS = {  # of pipelines that round times otherwise than dumo
    "CogView4": 1e-3,  # to whole thousandths
    "Z-Image": 2e-5,  # (1000 - 1000 t) / 1000 for 1 - t: 1.2e-5 where guided, 3e-6 if dumo's net is given that, too
}
GUIDED = 2.0  # the scale of guidance, for which a pass reads the row of no text, too
WITHOUT_LOWPASS = {"Chroma", "Z-Image"}  # the first has none, and the other's takes long to fit
RECORDER = Path(__file__).with_name("recorder.py")


@cache
def _start_recorder(libraries: str = "") -> "subprocess.Popen[str]":
    """Start the Python that runs cards' blocks, once; it runs until this process ends.

    libraries: a folder of packages that it imports in place of the installed ones; empty: none.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", RECORDER],
        env={**ENVIRONMENT, "PYTHONPATH": libraries},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)
    return process


def _write_noise_image(file: Path, height: int, width: int, g: torch.Generator) -> None:
    """Write an image of random pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (height, width, 3), generator=g, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(file)


def write_photographs(folder: Path) -> None:
    """Write an image for each of CAPTIONS, with its caption next to it."""
    g = torch.Generator().manual_seed(0)
    for i, caption in enumerate(CAPTIONS):
        _write_noise_image(folder / f"{i}.png", SIDE + 8, SIDE, g)
        (folder / f"{i}.txt").write_text(caption, encoding="utf-8")


def _write_edits(folder: Path) -> None:
    """Write what each photograph is an edit of, a table that says so, and source.png, which prompts edit."""
    g = torch.Generator().manual_seed(1)
    lines = ["file_name,text,source"]
    _write_noise_image(folder / "source.png", SIDE, SIDE, g)
    for i, caption in enumerate(CAPTIONS):
        _write_noise_image(folder / "before" / f"{i}.png", SIDE, SIDE, g)
        lines.append(f'{i}.png,"{caption}",../before/{i}.png')
    (folder / "photos" / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")


def must(done: Done) -> Done:
    """A command, which must have ended well."""
    assert done.code == 0, done
    return done


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())


@dataclass(frozen=True)
class Case:
    """A run in `folder`, tuned from the tiny pipeline `name`, which lies with photographs and tables in `home`."""

    name: str  # of PIPELINES
    folder: Path
    shared_home: Path | None = None  # where other runs share the pipeline, photographs and tables; None: `folder`
    stored: str = "float32"  # a key of STORED
    libraries: str = ""  # a folder of packages with which cards run in place of the installed ones; empty: none

    @classmethod
    def of(
        cls,
        name: str,
        folder: Path,
        *fields: str,
        verbs: Sequence[str] = ("encode", "train"),
        stored: str = "float32",
    ) -> "Case":
        """Make pipeline and photographs, and run the commands `verbs`; `fields` are set next to those of all cases.

        stored: how the pipeline is stored, a key of STORED.
        """
        case = cls(name, folder, stored=stored)
        dtype, variant = STORED[stored]
        save(name, case.source, dtype=dtype, variant=variant)
        write_photographs(folder / "photos")
        if case.stock.takes_image:
            _write_edits(folder)
        for verb in verbs:
            if verb == "train":
                case.train(*fields)
            else:
                must(call(verb, RECIPE, *case.options(*fields)))
        return case

    def train(self, *fields: str) -> None:
        """Train the run, with `fields` set, next to those of every case."""
        must(call("train", RECIPE, "--out", self.run, *self.options(*fields)))

    def options(self, *fields: str) -> list[str]:
        """The overrides of the run, with `fields` next to those of every case."""
        if CODES[0] not in fields:
            fields = (*fields, f"net.texts.root={self.home / 'texts'}", "net.texts.dtype=float32")
        return [*self.fields, *SHORT, *fields]

    @property
    def home(self) -> Path:
        """The folder of pipeline, photographs and tables."""
        return self.shared_home or self.folder

    @property
    def source(self) -> Path:
        """The folder of the pipeline that is tuned."""
        return self.home / self.name

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    @property
    def fields(self) -> list[str]:
        """The fields that a person sets, and those that this family asks for."""
        tiny = PIPELINES[self.name].tiny
        fields = [
            f"pipeline={self.source}",
            f"data.root={self.home / 'latents'}",
            f"data.images.side={SIDE}",
            f"data.images.root={self.home / 'photos'}",
        ]
        if tiny in ("flux-guided", "flux2"):
            fields.append("net.guidance=3.5")
        if self.stock.takes_image:
            fields += EDITED
        if FAMILIES[TINY[tiny].kind].is_diffusion:
            fields.append("path.kind=diffusion")
        if self.name in WITHOUT_LOWPASS:
            fields.append("net.lowpass=null")
        return fields

    @property
    def image(self) -> Path | None:
        """The image that prompts edit; None: they edit none."""
        return self.home / "source.png" if self.stock.takes_image else None

    @property
    def stock(self) -> StockPipeline:
        """How diffusers' pipeline of this family is called."""
        row = PIPELINES[self.name]
        return PIPELINE_BY_CLASS.get(row.pipeline) or PIPELINE_BY_MODEL[TINY[row.tiny].kind]

    @property
    def can_guide(self) -> bool:
        """Whether its pipeline guides as dumo does; a run of edits has no empty condition to guide away from."""
        return self.stock.guide_argument is not None and not self.stock.rescales_cfg and not self.stock.takes_image

    def guide(self, scale: float) -> None:
        """Let the run be sampled with this scale of guidance from now on."""
        must(call("train", self.run, f"sample.guide.scale={scale}"))

    def export(self, out: str, *options: object) -> Path:
        """Export the run to a folder `out` next to it; return the folder."""
        must(call("export", self.run, "--out", self.folder / out, *options))
        return self.folder / out

    @cached_property
    def opened(self) -> TrainedRun:
        """The run, opened on the CPU."""
        return load_run(str(self.run), device="cpu")

    # ------------------------------------------------------------------------------------------ the card's images

    def image_errors(
        self, out: Path, scale: float = 1.0, c: Tensor | None = None, nfe: Sequence[int] = (1, 2, 4)
    ) -> list[float]:
        """The relative errors of the images that the card in `out` makes, from dumo's: one for each number of passes.

        scale: of guidance.
        c: conditions (1,); None: of the card's prompt.
        nfe: the numbers of passes of the card's calls, in their order.
        """
        errors: list[float] = []
        for passes, (image, noises) in zip(nfe, self._run_card(out), strict=True):
            expected = self.dumo_image(noises[:passes], scale, c, passes)
            errors.append(relative_error(image.clamp(-1, 1), expected))
        return errors

    def errors_over_limits(self, kind: str, out: Path, scale: float = 1.0, c: Tensor | None = None) -> list[float]:
        """The errors of one, two and four passes over the limits of `kind`, of LIMITS: above 1 they are wrong."""
        limit = LIMITS[kind]
        four_passes_limit = FOUR_PASSES_LIMITS.get(self.name, FOUR_PASSES_LIMIT)
        if self.stored != "float32":
            dtype, _ = STORED[self.stored]
            eps = torch.finfo(getattr(torch, dtype)).eps
            limit = HALF_LIMIT * eps
            four_passes_limit = limit
            if self.name == "Chroma":
                four_passes_limit = UNFILTERED_HALF_LIMIT * eps
        limits = (limit, limit, four_passes_limit)
        return [error / limit for error, limit in zip(self.image_errors(out, scale, c), limits, strict=True)]

    def dumo_image(
        self, noises: Sequence[Tensor], scale: float = 1.0, c: Tensor | None = None, passes: int | None = None
    ) -> Tensor:
        """The image (1, 3, h, w) that dumo makes, of a pipeline's noise: one tensor for each pass that draws.

        c: conditions (1,); None: of the card's prompt. passes: None: as many as noises.
        """
        trained = self.opened
        readings = trained.flow.readings(guide=trained.spec.sample.guide.model_copy(update={"scale": scale}))
        if c is None:
            c = trained.conditions(prompts=[PROMPT], source=self.image)
        z = [self._unpack_noise(noise) for noise in noises]
        _, x = integrate(readings, trained.spec.path, trained.spec.sample.solver, c, passes or len(z), z.__getitem__)
        return trained.decode(x)

    def _unpack_noise(self, noise: Tensor) -> Tensor:
        """A pipeline's noise, which may be packed into tokens, as dumo's, (1, c, h, w)."""
        channels, height, width = self.opened.spec.data.shape
        net = self.opened.net
        assert isinstance(net, Dualized)
        if noise.ndim == 3:
            return unpack_latents(noise, (height // net.patch, width // net.patch), net.patch)
        return noise.reshape(1, channels, height, width)

    def _run_card(self, out: Path) -> list[tuple[Tensor, list[Tensor]]]:
        """Run the Python block of the card in `out`; return each call's image, (1, 3, h, w) in [-1, 1], and noises."""
        card = (out / "README.md").read_text(encoding="utf-8")
        block = re.search(r"```py\n(.*?)```", card, re.S)
        assert block, card
        block_file = self.folder / "block.py"
        record_file = self.folder / "made.safetensors"
        printed_file = self.folder / "printed.txt"
        block_file.write_text(block[1], encoding="utf-8")
        if self.image:  # a card of a model that edits opens it by its name
            image_copy = self.folder / self.image.name
            if not image_copy.exists():
                shutil.copy(self.image, image_copy)

        process = _start_recorder(self.libraries)
        assert process.stdin
        assert process.stdout
        task = [str(block_file), str(record_file), str(self.folder), str(printed_file)]
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        exit_code = process.stdout.readline()
        assert exit_code == "0\n", f"{block[1]}\n{printed_file.read_text(encoding='utf-8')[-3000:]}"

        record = load_file(record_file)
        calls: list[tuple[Tensor, list[Tensor]]] = []
        for n in range(sum(name.endswith("image") for name in record)):
            num_noises = sum(name.startswith(f"{n}.") for name in record) - 1
            noises = [record[f"{n}.{k}"] for k in range(num_noises)]
            calls.append((record[f"{n}.image"].reshape(-1, 3, SIDE, SIDE), noises))
        return calls

    # ------------------------------------------------------------------------------- diffusers' pipeline, in here

    def pipeline(self, out: Path | None = None) -> Any:  # noqa: ANN401, of diffusers
        """The stock pipeline of an exported folder; None: of the folder that was tuned."""
        import diffusers

        pipe = diffusers.DiffusionPipeline.from_pretrained(out or self.source, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def pipeline_arguments(self, passes: int | None = None) -> dict[str, Any]:
        """The arguments of a call in this number of passes; None: of a person who says nothing of passes."""
        arguments: dict[str, Any] = {"prompt": PROMPT, "height": SIDE, "width": SIDE}
        for word in self.stock.extra_arguments:
            name, _, value = word.partition("=")
            arguments[name] = ast.literal_eval(value)
        if self.image:
            arguments |= {"image": Image.open(self.image), "max_area": SIDE**2}
        if passes:
            trained = self.opened
            times = trained.spec.sample.solver.times(passes)
            if isinstance(trained.spec.path, Diffusion):
                times = trained.spec.path.nearest_indices(times)
            arguments |= self.stock.arguments(times, embedded=getattr(self.opened.spec.net, "guidance", None))
        return arguments

    def pipeline_latent(self, pipe: Any, passes: int | None, *, seed: int = 7, **overrides: Any) -> Tensor:  # noqa: ANN401
        """The latent that a pipeline makes: its first noise is always the same, torch's generator begins at `seed`."""
        first = torch.Generator().manual_seed(0)
        torch.manual_seed(seed)
        arguments = self.pipeline_arguments(passes) | overrides
        return pipe(**arguments, generator=first, output_type="latent", return_dict=False)[0]

    def seeds_scheduler(self, pipe: Any) -> bool:  # noqa: ANN401
        """Whether the pipeline's generator draws the noise between passes, whatever torch's own would."""
        return torch.equal(self.pipeline_latent(pipe, 2, seed=1), self.pipeline_latent(pipe, 2, seed=2))
