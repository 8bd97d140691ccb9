"""Work of which the cost is compared, by name. One process does one work of one tree each time that it is asked.

    python tools/duel/work.py NAME FOLDER    # a line on stdin: work; a line on stdout: seconds of the clock, of the CPU

Only what both trees have may be called here: the front door and a few parts that have kept their place.
"""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tarfile import TarFile, TarInfo

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from dumo.cli import api
from dumo.config.load import load
from dumo.encoders.taesd import Taef2, Tiny
from dumo.evaluation.neighbours import precision_recall
from dumo.flow.draw import draw
from dumo.flow.slope import DualSlope
from dumo.run import encode as encoding
from dumo.run.encode import encode
from dumo.run.train import train
from dumo.run.weights import build
from dumo.runtime.random import random_batch
from dumo.training import checkpoint
from dumo.training.ema import Ema, MovingAverage
from dumo.training.state import begin
from dumo.types import frozen

CPU = torch.device("cpu")
Seconds = tuple[float, float]  # of the clock, of the CPU: for one unit
Work = Callable[[], Seconds]
SMALL = ["net.width=32", "net.depth=1", "net.patch=8", "net.attention=2", "train.log_every=1000000"]
QUIET = ["train.save_every=1000000", "train.probe_every=0", "train.compile=none", "train.precision=fp32"]
WARM = 3  # steps that are not counted


def timed(times: int, work: Callable[[], object]) -> Work:
    """A unit's mean over so many."""

    def measured() -> Seconds:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            work()
        return (time.perf_counter() - wall) / times, (time.process_time() - cpu) / times

    return measured


def training(folder: Path, steps: int, recipe: str, *settings: str) -> Work:
    """A step of `dumo train`, in a folder of its own each time."""
    run, number = load(recipe, [*settings, *QUIET, f"train.steps={steps}"]), 0
    ticks: list[Seconds] = []

    @contextmanager
    def bar(title: str, total: int, /) -> Generator[Callable[[int, str], None], None, None]:
        yield lambda done, note: ticks.append((time.perf_counter(), time.process_time()))

    def measured() -> Seconds:
        nonlocal number
        ticks.clear()
        train(run, folder / f"run-{number}", bar=bar)
        number += 1
        (wall, cpu), (late, late_cpu) = ticks[WARM], ticks[-1]
        n = len(ticks) - 1 - WARM
        return (late - wall) / n, (late_cpu - cpu) / n

    return measured


def photos(folder: Path, count: int, side: int, kind: str) -> Path:
    """Pictures on disk."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05}.{kind}")
    return folder


def digits(folder: Path) -> Work:
    """A step of digits."""
    return training(folder, 43, "digits")


def meanflow(folder: Path) -> Work:
    """A step of digits-meanflow."""
    return training(folder, 43, "digits-meanflow")


def pieces(folder: Path) -> Work:
    """A step of digits, 64 rows in eight passes."""
    return training(folder, 23, "digits", "train.batch=64", "train.micro_batch=8")


def latents(folder: Path) -> Work:
    """A step of a small net on latents, 256 rows a step out of 64 shards."""
    save_file(Tiny(32).state_dict(), weights := folder / "taef2.safetensors")  # random ones
    cache = [f"data.codec.weights={weights}", f"data.root={folder / 'cache'}"]
    cache += ["data.codec.sha256=null"] if "sha256" in Taef2.model_fields else []  # of older trees
    cache += ["data.memory=0", "data.images.classes=0", "data.images.split=null"]
    cache += [f"data.images.root={photos(folder / 'images', 512, 32, 'png')}"]
    work_of = getattr(encoding, "work_of", None) or getattr(encoding, "asked")  # noqa: B009, its name in older trees
    found = work_of("cifar10-latents", cache, out=None, codec=None, side=None)
    encode(getattr(found, "data", found), device="cpu", shard_rows=8)  # trees before captions gave the data alone
    return training(folder, 23, "cifar10-latents", *cache, *SMALL, "train.batch=256")


def images(folder: Path) -> Work:
    """A step of a small net on JPEGs of 256 pixels, made 64 pixels wide, 64 rows a step."""
    root = [f"data.root={photos(folder / 'images', 512, 256, 'jpg')}", "data.memory=0"]
    return training(folder, 13, "my-images", *root, *SMALL, "train.batch=64")


def table(folder: Path) -> Work:
    """The same out of a parquet file of one row group."""
    from pyarrow import Table, parquet

    rows = [path.read_bytes() for path in sorted(photos(folder / "images", 512, 256, "jpg").iterdir())]
    parquet.write_table(
        Table.from_pydict({"image": [{"bytes": row, "path": None} for row in rows]}), folder / "all.parquet"
    )
    root = [f"data.root={folder / 'all.parquet'}", "data.memory=0"]
    return training(folder, 13, "my-images", *root, *SMALL, "train.batch=64")


def members(folder: Path) -> Work:
    """20,000 images in tar files opened."""
    pixels, number = BytesIO(), 0
    Image.new("RGB", (8, 8)).save(pixels, "png")
    root = folder / "tars"
    root.mkdir()
    for shard in range(4):
        with TarFile(root / f"{shard:04}.tar", "w") as tar:
            for number in range(5000):
                info = TarInfo(f"{number:06}.png")
                info.size = len(pixels.getvalue())
                tar.addfile(info, BytesIO(pixels.getvalue()))
    data = load("my-images", [f"data.root={root}", "data.side=8", "data.memory=0"]).data
    return timed(1, data.open)


def sampling(folder: Path) -> Work:
    """1,024 samples of 3 x 32 x 32 numbers in one pass of a small net, in four batches."""
    root = f"data.root={photos(folder / 'images', 64, 32, 'png')}"
    train(load("my-images", [root, "data.side=32", *SMALL, *QUIET, "train.steps=1"]), folder / "run")
    run = api.load(folder / "run")
    return timed(1, lambda: run.sample(n=1024, nfe=1))


def saving(folder: Path) -> Work:
    """A checkpoint of 25 M parameters, their moments and one average."""
    run = load("digits", ["net.width=512", "net.depth=6", "net.attention=8"])
    state = begin(build(run, CPU), run.train)
    for group in state.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    state.optimizer.step()

    def one() -> None:
        state.step += 1
        checkpoint.save(folder / "checkpoints", state, 1)

    return timed(1, one)


def averages(_: Path) -> Work:
    """An update of one average of the net of digits."""
    net = build(load("digits", []), CPU)
    average = MovingAverage(Ema(decay=0.999), net)
    return timed(50, lambda: average.update(net, 100))


def slope(*, rides: bool) -> Work:
    """The exact slope of a small net of six blocks."""
    run = load("digits", ["net.width=8", "net.attention=2", "net.depth=6"])
    net = build(run, CPU)
    (x, c), t = random_batch("duel", 2, run.data.shape, 10), torch.rand(2)
    v, ref = torch.randn_like(x), frozen(net)

    def one() -> None:
        _, along = DualSlope()(net, ref, x, c, t=t, toward=v if rides else None)
        along(v)

    return timed(10, one)


def ride(_: Path) -> Work:
    """Dual numbers beside the arithmetic: six tiny blocks, the direction known."""
    return slope(rides=True)


def tape(_: Path) -> Work:
    """The same, the direction known after the pass."""
    return slope(rides=False)


def guided(_: Path) -> Work:
    """A compiled loss of DuMo with guidance, and its gradient."""
    small = ["net.depth=2", "net.width=64"]
    run = load("digits", ["objective.guide.zeta=0.5", "objective.drop=0.1", "train.batch=64", *small])
    net, (x, c) = build(run, CPU), random_batch("duel", 64, run.data.shape, 10)
    loss, batch = torch.compile(run.objective.loss), draw(run.objective, run.path, x, c, 10, seed=0, step=0)

    def one() -> None:
        net.zero_grad()
        loss(net, frozen(net), batch).loss.mean().backward()

    return timed(5, one)


def neighbours(_: Path) -> Work:
    """Precision and recall of 1,000 rows of 2,048 features."""
    real, fake = torch.randn(2, 1000, 2048, generator=torch.Generator().manual_seed(0)).double()
    return timed(1, lambda: precision_recall(real, fake))


WORKS: dict[str, Callable[[Path], Work]] = {
    "digits": digits,
    "digits-meanflow": meanflow,
    "pieces": pieces,
    "latents": latents,
    "images": images,
    "table": table,
    "members": members,
    "sampling": sampling,
    "saving": saving,
    "averages": averages,
    "ride": ride,
    "tape": tape,
    "guided": guided,
    "neighbours": neighbours,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    work = WORKS[sys.argv[1]](Path(sys.argv[2]))
    for _ in sys.stdin:
        print(*work(), flush=True)
