"""Teach a few-step model a subject that it has never seen, and compare with three other ways; on latents of CIFAR-10.

    python tools/subject.py runs/subject [--json tools/subject.json] [--picture docs/subject.png]

It needs DUMO_DATA, as the recipe cifar10-latents.

A small SD3 learns nine classes by flow matching; a LoRA taught by it makes it few-step by DuMo. The subject is 30
images of the tenth class. Every way costs as much, counted, as --steps of `personal`, at a batch of 64 and rank 16:

    personal         new adapters on the frozen few-step run, which answers half of a batch: its images of nine classes
    no prior         the same on the 30 images alone
    flow matching    a LoRA on the few-step model by flow matching, as other trainers have it
    two LoRAs        the same LoRA trained on the base, then added to the few-step one

A way is tried at each of RATES on a seed of its own, where the sum of its scores decides; then it runs on SEEDS. A
stock transformer makes the images, by restarts at dumo's times. Scores are `mmd` of the shipped classifier's features,
no FID: `subject` to images of the class that nothing trained on, `prior` to test images of the nine.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dumo.config.load import load
from dumo.evaluation.distance import gaussian_mmd
from dumo.evaluation.photos import WIDTH
from dumo.evaluation.shipped import learned
from dumo.flow.solver import jumps
from dumo.io.picture import labelled_grid, sheet, to_rows, to_uint8
from dumo.lab.plan import Cost
from dumo.nets.rows import codes
from dumo.run.resolve import resolve

SUBJECT, SHOTS, EACH = 5, 30, 2000  # dogs; their images; training images of each other class
OTHERS = [c for c in range(10) if c != SUBJECT]
RATES, TRIED, SEEDS, PASSES = (0.0005, 0.002), 9, (0, 1, 2), (1, 2, 4)
MADE, PRIOR = 900, 900  # images of a score; images that stand for what the few-step run knows
NET = "net={kind: diffusers, texts: {kind: codes}%s}"
TABLE = Path(os.environ["DUMO_DATA"]) / "cifar10"


@dataclass(frozen=True)
class Way:
    """A recipe, what is set of it, and the images that it learns from."""

    recipe: str
    data: str
    words: tuple[str, ...]
    head: str = "u"
    added: bool = False  # to the few-step model, as a difference from the base


def ways(folder: Path) -> dict[str, Way]:
    """By name."""
    tuned = NET % ", lora: {rank: 16}, lowpass: null"
    plain = Way("cifar10-latents-flow-matching", "alone", (f"pipeline={folder / 'few/transformer'}", tuned), "v")
    base = Way(plain.recipe, "alone", (f"pipeline={folder / 'base/transformer'}", tuned), "v", added=True)
    personal = ("data.images.captions=null", "net.texts={kind: codes}", "net.lora.subject=16", "train.sheets=[]")
    return {
        "personal": Way("personal", "mine", personal),
        "no prior": Way("personal", "alone", (*personal, "data.prior=null", "teacher=null")),
        "flow matching": plain,
        "two LoRAs": base,
    }


def table(split: str) -> Any:  # noqa: ANN401, of pyarrow
    """CIFAR-10's images and labels."""
    return pq.read_table(next(TABLE.glob(f"{split}-*.parquet")))


def write(rows: Any, place: Path) -> None:  # noqa: ANN401, of pyarrow
    """Rows of CIFAR-10 as a data set; the names of all ten classes stay in its notes."""
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, place)


def of_class(rows: Any, c: int) -> Any:  # noqa: ANN401
    """Those of a class."""
    return rows.filter(pc.equal(rows["label"], c))


def dumo(*words: str, **env: str) -> None:
    """Run a command."""
    subprocess.run([sys.executable, "-P", "-m", "dumo", *words], check=True, env={**os.environ, **env})


def train(recipe: str, data: Path, run: Path, head: str, words: tuple[str, ...], **env: str) -> Path:
    """Train, unless that is done, and export the model as diffusers has it."""
    out = run.parent / f"{run.name}-out"
    if not out.exists():
        words = (*words, *images(data))
        given = [word for one in words for word in ("--set", one)]
        dumo("encode", recipe, *given, **env)
        dumo("train", recipe, "--out", str(run), *given, **env)
        dumo("export", str(run), str(out), "--head", head, "--parts", "none", **env)
    return out


def images(data: Path) -> tuple[str, ...]:
    """What says where a run's images lie."""
    return (
        f"data.images.root={data}", f"data.root={data}-latents", "data.images.split=null", "data.images.flip=false",
        "evaluate.split=null", "train.batch=64", "train.milestones=[]",
    )  # fmt: skip


@cache
def units(way: Way, folder: Path) -> float:
    """Forward units of a step."""
    words = (*way.words, *images(folder / way.data))
    return Cost(resolve(load(way.recipe, [*words]))).units


@torch.no_grad()
def made(weights: dict[str, Tensor], config: Path, c: Tensor, nfe: int, seed: int) -> Tensor:
    """Images (n, 3, 32, 32) of the classes c by a stock transformer: to the data, noised again, to the data."""
    net: Any = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(config)).eval()
    net.load_state_dict(weights)
    texts, g = codes(10, 32, 32), torch.Generator().manual_seed(seed)
    assert texts.pooled is not None
    x, codec = torch.zeros(len(c), 32, 4, 4), load("cifar10-latents", []).data.codec.open()
    for t in jumps(nfe):
        x = (1 - t) * x + t * torch.randn(x.shape, generator=g)
        v = [
            net(part, texts.tokens[k], texts.pooled[k], torch.full((len(k),), 1000 * t), return_dict=False)[0]
            for part, k in zip(x.split(450), c.split(450), strict=True)
        ]
        x = x - t * torch.cat(v)
    return torch.cat([codec.decode(part) for part in x.split(150)])


def pixels(rows: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Images in [-1, 1], and classes."""
    opened = [Image.open(BytesIO(row["bytes"])) for row in rows["image"].to_pylist()]
    x = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in opened])
    return x.view(-1, 32, 32, 3).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(rows["label"].to_pylist())


@cache
def judged() -> dict[str, tuple[Tensor, Tensor]]:
    """What samples are compared with: held images of the subject, and test images of the other classes."""
    dogs, test = of_class(table("train"), SUBJECT)[SHOTS:], table("test")
    subject = pa.concat_tables([dogs, of_class(test, SUBJECT)])
    return {"subject": pixels(subject), "prior": pixels(pa.concat_tables([of_class(test, c) for c in OTHERS]))}


def scores(weights: dict[str, Tensor], config: Path, seed: int) -> dict[str, dict[int, float]]:
    """`mmd` by side and passes."""
    found: dict[str, dict[int, float]] = {}
    for side, (real, labels) in judged().items():
        c = torch.tensor([SUBJECT] if side == "subject" else OTHERS).repeat(MADE)[:MADE]
        for nfe in PASSES:
            fake = learned(made(weights, config, c, nfe, seed))
            given = () if side == "subject" else (c, labels)
            found.setdefault(side, {})[nfe] = gaussian_mmd(fake, learned(real), WIDTH, *given).value
    return found


def state(out: Path) -> dict[str, Tensor]:
    """The weights of an exported model."""
    return load_file(out / "transformer/diffusion_pytorch_model.safetensors")


def weights(way: Way, out: Path, folder: Path) -> dict[str, Tensor]:
    """The weights of what a way exported, added to the few-step model where it is a LoRA of the base."""
    own = state(out)
    if not way.added:
        return own
    few, base = state(folder / "few"), state(folder / "base")
    return {key: x + own[key] - base[key] for key, x in few.items()}


def draw(rates: dict[str, float], folder: Path) -> Image.Image:
    """What the first seed of each way makes of the subject and of other classes, in one pass and in two."""
    found, config = ways(folder), folder / "few/transformer"
    nets = {"few-step model": state(folder / "few")}
    for name, rate in rates.items():
        cell = cell_of(name, rate, SEEDS[0], folder)
        nets[name] = weights(found[name], cell.with_name(f"{cell.name}-out"), folder)
    sides = {"subject": torch.tensor([SUBJECT] * 8), "prior": torch.tensor(OTHERS[:8])}
    shown = {"real images": [real(side, c, k) for side, c in sides.items() for k in (0, 8)]}
    for name, net in nets.items():
        shown[name] = [made(net, config, c, nfe, 0) for c in sides.values() for nfe in PASSES[:2]]
    columns = [f"{side}, {nfe} NFE" for side in sides for nfe in PASSES[:2]]
    return labelled_grid({name: [sheet(to_rows(x), 4) for x in row] for name, row in shown.items()}, columns)


def real(side: str, c: Tensor, k: int) -> Tensor:
    """An image of each of the classes c, from number k on of its class."""
    x, labels = judged()[side]
    return torch.stack([x[labels == one][k + i] for i, one in enumerate(c.tolist())])


def begin(folder: Path) -> None:
    """The base, the few-step run, and the images of either side."""
    whole = table("train")
    write(pa.concat_tables([of_class(whole, c)[:EACH] for c in OTHERS]), folder / "nine/train.parquet")
    drawn = (NET % ", weights: drawn, lowpass: null", "pipeline=sd3-small", "train.steps=3000")
    base = train("cifar10-latents-flow-matching", folder / "nine", folder / "base-run", "v", drawn)
    link(folder / "base", base)
    few = (NET % ", lora: {rank: 16}", f"pipeline={folder / 'base/transformer'}", "teacher={kind: base}")
    link(folder / "few", train("cifar10-latents", folder / "nine", folder / "few-run", "u", (*few, "train.steps=950")))
    write(of_class(whole, SUBJECT)[:SHOTS], folder / "alone/photos.parquet")
    write(of_class(whole, SUBJECT)[:SHOTS], folder / "mine/photos/photos.parquet")
    if not (folder / "mine/prior").exists():
        c = torch.tensor(OTHERS).repeat(PRIOR)[:PRIOR]
        x = to_uint8(made(state(folder / "few"), folder / "few/transformer", c, 2, 77))
        write(packed(x, c, whole.schema), folder / "mine/prior/prior.parquet")


def link(name: Path, to: Path) -> None:
    """A name for a folder."""
    if not name.exists():
        name.symlink_to(to.resolve())


def packed(x: Tensor, c: Tensor, schema: Any) -> Any:  # noqa: ANN401, of pyarrow
    """Images as a table like CIFAR-10's."""
    rows = []
    for image, label in zip(x.permute(0, 2, 3, 1).numpy(), c.tolist(), strict=True):
        file = BytesIO()
        Image.fromarray(image).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": label})
    return pa.Table.from_pylist(rows, schema)


def cell_of(name: str, rate: float, seed: int, folder: Path) -> Path:
    """Where a way is trained at a rate, on a seed."""
    return folder / "cells" / f"{name.replace(' ', '-')}-{rate:g}-{seed}"


def finish(name: str, way: Way, rate: float, seed: int, folder: Path, total: float) -> dict[str, Any]:
    """Train and score; what is there is taken as it is."""
    place = cell_of(name, rate, seed, folder)
    if not (kept := place.parent / f"{place.name}.json").exists():
        taken = round(total / units(way, folder))  # steps that cost as much
        words = (*way.words, f"train.steps={taken}", f"train.optimizer.lr={rate}", f"train.seed={seed}")
        out = train(way.recipe, folder / way.data, place, way.head, words)
        report = {"way": name, "rate": rate, "seed": seed, "steps": taken}
        report["mmd"] = scores(weights(way, out, folder), out / "transformer", seed)
        kept.write_text(json.dumps(report) + "\n", encoding="utf-8")
    return json.loads(kept.read_text())


def main() -> None:
    """All ways at all rates, then the best of each on all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    folder = given.folder.resolve()
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    begin(folder)
    os.environ["FEW_STEPS"] = str(folder / "few-run")
    found = ways(folder)
    total = given.steps * units(found["personal"], folder)
    rows = [{"way": "the few-step model", "mmd": scores(state(folder / "few"), folder / "few/transformer", 0)}]
    tried, best = [], []
    for name, way in found.items():
        trials = [finish(name, way, rate, TRIED, folder, total) for rate in RATES]
        tried += trials
        least = min(trials, key=lambda one: sum(sum(side.values()) for side in one["mmd"].values()))
        runs = [finish(name, way, least["rate"], seed, folder, total) for seed in SEEDS]
        best += runs
        rows.append({"way": name, "rate": least["rate"], "steps": runs[0]["steps"], "mmd": over_seeds(runs)})
        print(json.dumps(rows[-1]), flush=True)
    if given.picture:
        draw({row["way"]: row["rate"] for row in rows[1:]}, folder).save(given.picture)
    if given.json:
        given.json.write_text(json.dumps({"table": rows, "tried": tried, "runs": best}, indent=1) + "\n")


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Mean and deviation by side and passes."""
    return {
        side: {nfe: [f([run["mmd"][side][nfe] for run in runs]) for f in (fmean, stdev)] for nfe in by_nfe}
        for side, by_nfe in runs[0]["mmd"].items()
    }


if __name__ == "__main__":
    main()
