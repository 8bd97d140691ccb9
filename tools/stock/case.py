"""A family's way from a folder of diffusers to images, by the command line alone, and the images of what comes out.

A complete tiny pipeline is made on the spot, and three captioned photographs. `dumo` encodes, examines, trains two
steps, samples and exports. Then the Python block of the exported card runs as it stands in a process that cannot import
dumo; noise and image are recorded there (recorder.py), and dumo makes the image of the same noise.
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

from dumo.export.card import PROMPT
from dumo.export.model import PIPELINE_BY_CLASS, PIPELINE_BY_MODEL, StockPipeline
from dumo.flow.generate import integrate
from dumo.flow.path import Diffusion
from dumo.nets.dualized import Dualized
from dumo.nets.family import FAMILIES, unpack_latents
from dumo.run.prompt import prompted
from dumo.run.weights import RunFolder, open_run
from e2e.shell import Done, call, sets
from forked import ENVIRONMENT
from pipelines import PIPELINES, SIDE, save
from transformers_tiny import TINY

CAPTIONS = ("a red bird on a branch", "two cats on a sofa, one of them asleep", "a dog")
LORA = ("net.lora={rank: 4}",)
FULL = ("net.lora=null",)
EDITED = ["data.images.captions.source=source", "data.images.flip=false", "objective.drop=0"]
CODES = ("net.texts={kind: codes}", "data.images.captions=null", "objective.drop=0")  # a random one for each class
# |a - b| / |b| of pixels. What is added otherwise than dumo adds it, adapters and guidance, is rounded otherwise: ours.
LIMITS = {"full": 2e-6, "guided": 5e-6, "merged": 5e-6, "lora": 5e-6}
FOUR = 1e-5  # of four passes, where rounding adds up
ROUNDED = {  # of four passes, by pipelines that round times otherwise than dumo
    "CogView4": 1e-3,  # to whole thousandths
    "Z-Image": 2e-5,  # (1000 - 1000 t) / 1000 for 1 - t: 1.2e-5 where guided, 3e-6 if dumo's net is given that, too
}
GUIDED = 2.0  # the scale of guidance, for which a pass reads the row of no text, too
QUICK = {"Chroma", "Z-Image"}  # without low-pass: the first has none, and the other's takes long to fit
SHORT = (
    "train.precision=fp32", "train.steps=2", "train.batch=4", "train.micro_batch=4", "train.share=1",
    "train.schedule.warmup=0", "evaluate.protocol.samples=20", "net.checkpoint=false", "objective.guide.zeta=0",
)  # fmt: skip
RECORDER = Path(__file__).with_name("recorder.py")


@cache
def recorder() -> "subprocess.Popen[str]":
    """A Python that runs cards' blocks until this process ends."""
    env = {**ENVIRONMENT, "PYTHONPATH": ""}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-P", RECORDER], env=env, stdin=pipe, stdout=pipe, text=True)
    atexit.register(process.communicate)
    return process


def photographs(folder: Path) -> Path:
    """Three, of noise, with a caption each."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    for i, text in enumerate(CAPTIONS):
        pixels = torch.randint(256, (SIDE + 8, SIDE, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


def edits(folder: Path) -> None:
    """Each photograph as an edit of another image, and one to edit."""
    g = torch.Generator().manual_seed(1)
    for name in ("source", *("before/" + str(i) for i in range(len(CAPTIONS)))):
        pixels = torch.randint(256, (SIDE, SIDE, 3), generator=g, dtype=torch.uint8)
        (place := folder / f"{name}.png").parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(place)
    rows = (f'{i}.png,"{text}",../before/{i}.png' for i, text in enumerate(CAPTIONS))
    (folder / "photos" / "metadata.csv").write_text("\n".join(["file_name,text,source", *rows]), encoding="utf-8")


def must(done: Done) -> Done:
    """A command that ended well."""
    assert done.code == 0, done
    return done


@dataclass(frozen=True)
class Case:
    """A family's run in `folder`, tuned from the pipeline of its name in `home`."""

    name: str
    folder: Path
    home_elsewhere: Path | None = None

    @classmethod
    def of(cls, name: str, folder: Path, *fields: str, verbs: Sequence[str] = ("encode", "train")) -> "Case":
        """A run, `fields` set in addition to what every one here has."""
        case = cls(name, folder)
        save(name, case.source)
        photographs(folder / "photos")
        if case.stock.takes_image:
            edits(folder)
        for verb in verbs:
            if verb == "train":
                case.train(*fields)
            else:
                must(call(verb, "sd3-lora", *case.typed(*fields)))
        return case

    def train(self, *fields: str) -> None:
        """Train the run."""
        must(call("train", "sd3-lora", "--out", self.run, *self.typed(*fields)))

    def typed(self, *fields: str) -> list[str]:
        """What is typed of the run, `fields` set in addition to what every one here has."""
        if CODES[0] not in fields:
            fields = (*fields, f"net.texts.root={self.home / 'texts'}", "net.texts.dtype=float32")
        return sets(*self.fields, *SHORT, *fields)

    @property
    def home(self) -> Path:
        """Where the pipeline, photographs and tables lie."""
        return self.home_elsewhere or self.folder

    @property
    def source(self) -> Path:
        """The pipeline that is tuned."""
        return self.home / self.name

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    @property
    def fields(self) -> list[str]:
        """What a person sets, and what is particular about a family."""
        found = [
            f"pipeline={self.source}", f"data.root={self.home / 'latents'}", f"data.images.side={SIDE}",
            f"data.images.root={self.home / 'photos'}",
        ]  # fmt: skip
        found += ["net.guidance=3.5"] * PIPELINES[self.name].tiny.startswith(("flux-guided", "flux2"))
        found += EDITED * self.stock.takes_image
        found += ["path.kind=diffusion"] * FAMILIES[TINY[PIPELINES[self.name].tiny].kind].diffusion
        return found + ["net.lowpass=null"] * (self.name in QUICK)

    @property
    def image(self) -> Path | None:
        """What prompts edit, if anything."""
        return self.home / "source.png" if self.stock.takes_image else None

    @property
    def guidable(self) -> bool:
        """Whether its pipeline guides as dumo does; a run of edits has no condition of none to guide away from."""
        return self.stock.guide_argument is not None and not self.stock.rescales_guidance and not self.stock.takes_image

    def guide(self, scale: float) -> None:
        """Sample with this scale of guidance from now on."""
        must(call("train", self.run, *sets(f"sample.guide.scale={scale}")))

    def export(self, out: str, *words: object) -> Path:
        """What `dumo export` makes of the run."""
        must(call("export", self.run, self.folder / out, *words))
        return self.folder / out

    @cached_property
    def opened(self) -> RunFolder:
        """The run."""
        return open_run(str(self.run), device="cpu")

    def dumo(
        self, noises: Sequence[Tensor], scale: float = 1.0, c: Tensor | None = None, passes: int | None = None
    ) -> Tensor:
        """The image that dumo makes of a prompt, or of c, and of this noise; None: a pass for each."""
        sampler = self.opened.sampler
        guide = sampler.spec.guide.model_copy(update={"scale": scale})
        reads, c = sampler.guided(guide), prompted(sampler, [PROMPT], self.image) if c is None else c
        drawn = [self.latent(noise) for noise in noises]
        x = integrate(reads, sampler.flow.path, sampler.spec.solver, c, passes or len(drawn), lambda k: drawn[k])[1]
        return sampler.decode(x)

    def latent(self, noise: Tensor) -> Tensor:
        """Noise of a pipeline, which may be packed into tokens, as dumo's, (1, c, h, w)."""
        channels, high, wide = self.opened.sampler.data.shape
        net = self.opened.net
        assert isinstance(net, Dualized)
        if noise.ndim == 3:
            return unpack_latents(noise, (high // net.patch, wide // net.patch), net.patch)
        return noise.reshape(1, channels, high, wide)

    def block(self, out: Path) -> list[tuple[Tensor, list[Tensor]]]:
        """What the Python block of a card makes, verbatim: an image in [-1, 1] and its noise, call by call."""
        text = (out / "README.md").read_text(encoding="utf-8")
        block, made, printed = (self.folder / name for name in ("block.py", "made.safetensors", "printed.txt"))
        found = re.search(r"```py\n(.*?)```", text, re.S)
        assert found, text
        block.write_text(found[1], encoding="utf-8")
        if self.image and not (beside := self.folder / self.image.name).exists():
            shutil.copy(self.image, beside)  # what a card of a model that edits opens
        process = recorder()
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps([*map(str, (block, made, self.folder, printed))]) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n", f"{found[1]}\n{printed.read_text(encoding='utf-8')[-3000:]}"
        there, images = load_file(made), list[tuple[Tensor, list[Tensor]]]()
        for n in range(sum(key.endswith("image") for key in there)):
            noises = sorted((int(key.split(".")[1]), x) for key, x in there.items() if re.fullmatch(rf"{n}\.\d+", key))
            images.append((there[f"{n}.image"].reshape(-1, 3, SIDE, SIDE), [x for _, x in noises]))
        return images

    def off(
        self, out: Path, scale: float = 1.0, c: Tensor | None = None, nfe: Sequence[int] = (1, 2, 4)
    ) -> list[float]:
        """How far the card's images, of these passes, are from dumo's, |a - b| / |b| of their pixels, call by call."""
        differences = list[float]()
        for passes, (image, noises) in zip(nfe, self.block(out), strict=True):
            mine = self.dumo(noises[:passes], scale, c, passes)
            differences.append(float((image.clamp(-1, 1) - mine).norm() / mine.norm()))
        return differences

    def misses(self, kind: str, out: Path, scale: float = 1.0, c: Tensor | None = None) -> list[float]:
        """`off` of one, two and four passes, each in proportion to its limit."""
        few = LIMITS[kind]
        limits = few, few, ROUNDED.get(self.name, FOUR)
        return [a / limit for a, limit in zip(self.off(out, scale, c), limits, strict=True)]

    def pipeline(self, out: Path | None = None) -> Any:  # noqa: ANN401, of diffusers
        """The stock pipeline of a folder that was exported, or of what was tuned, in this process."""
        import diffusers

        pipe = diffusers.DiffusionPipeline.from_pretrained(out or self.source, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def stock(self) -> StockPipeline:
        """How its pipeline is called."""
        row = PIPELINES[self.name]
        return PIPELINE_BY_CLASS.get(row.pipeline) or PIPELINE_BY_MODEL[TINY[row.tiny].kind]

    def call(self, passes: int | None = None) -> dict[str, Any]:
        """The arguments of so many passes; None: what a person who says nothing gives."""
        more = {word.split("=")[0]: ast.literal_eval(word.split("=")[1]) for word in self.stock.extra_arguments}
        found = {"prompt": PROMPT, "height": SIDE, "width": SIDE, **more}
        found |= {"image": Image.open(self.image), "max_area": SIDE**2} if self.image else {}
        if passes:
            sampler = self.opened.sampler
            times = sampler.spec.solver.times(passes)
            times = sampler.flow.path.indices(times) if isinstance(sampler.flow.path, Diffusion) else times
            found |= self.stock.arguments(times, embedded=getattr(self.opened.run.net, "guidance", None))
        return found

    def made(self, pipe: Any, passes: int | None, *, seed: int = 7, **more: Any) -> Tensor:  # noqa: ANN401
        """The latent that a pipeline makes of the first noise and of torch's own with this seed."""
        first = torch.Generator().manual_seed(0)
        torch.manual_seed(seed)
        return pipe(**self.call(passes) | more, generator=first, output_type="latent", return_dict=False)[0]

    def seeded(self, pipe: Any) -> bool:  # noqa: ANN401
        """Whether the pipeline's generator draws the noise between passes, whatever torch's own would."""
        return torch.equal(self.made(pipe, 2, seed=1), self.made(pipe, 2, seed=2))
