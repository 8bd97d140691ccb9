"""`dumo bench data`: images per second that the data give, and that a training step takes: would the device wait?

The order of events, each an entrance:

1. `benchmark_of` says what is read, and for which training (`DataBenchmark`);
2. `measure` times the reading by several numbers of threads, and returns the report;
3. `verdict` puts the report into a sentence.

Batches are made as training makes them, ahead of a step that takes no time, of rows that were not read before. As many
batches are ready when the clock starts as when it stops, so they do not count. Only a few batches are in memory at a
time, however large the data set is.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dumo.config.change import override
from dumo.config.load import parse
from dumo.config.source import RunText, choose
from dumo.data import Data, Latents
from dumo.data.album import MAX_THREADS, Album
from dumo.data.caption import Captioned
from dumo.io.source import Bucketed, DataSource
from dumo.lab.plan import Cost
from dumo.plan import machine
from dumo.run.resolve import data_with_facts, load_resolved
from dumo.runtime import signals
from dumo.runtime.device import choose_device, known_peak_tflops, software_versions
from dumo.runtime.progress import Bar, Tick, no_bar
from dumo.runtime.stopwatch import Stopwatch
from dumo.training.prefetch import BATCHES_AHEAD, Prefetch
from dumo.types import Spec, UserError
from dumo.types.rows import to_device

WARM_UP_BATCHES = BATCHES_AHEAD + 1  # before the first that counts
_SHARE_OF_PEAK = 0.4  # of a GPU's peak, that a step is expected to reach: ours. Larger nets reach more: the safe side


class _DataOnly(Spec):
    """The part of a run that names the data."""

    data: Data


@dataclass(frozen=True)
class DataBenchmark:
    """What `dumo bench data` reads, and for which training."""

    data: Data
    batch: int  # images
    cost: Cost | None  # of the run that reads the data; None: there is no run


def benchmark_of(
    source: str,
    overrides: Sequence[str] = (),
    *,
    text: RunText | None = None,
    batch: int | None = None,
    side: int | None = None,
) -> DataBenchmark:
    """What to measure: the data of a recipe or run, or the images of a folder or file.

    `text` is that of the recipe or run, where it has been read. `batch` is the number of images; None: the recipe's, or
    256 for a folder. `side`: the pixels to which images of a folder are brought; None: 256. Raises UserError as loading
    does, and for a side with a recipe.
    """
    if choose(source).kind != "images":
        if side is not None:
            raise UserError("--side is for a folder of images: of a recipe, set data.side")
        run = load_resolved(text or source, overrides)
        return DataBenchmark(run.data, batch or run.train.batch, Cost(run))
    tree: dict[str, Any] = {"data": {"kind": "images", "root": source, "side": side or 256, "flip": True}}
    override(tree, overrides)
    return DataBenchmark(data_with_facts(parse(_DataOnly, tree).data), batch or 256, None)


def measure(
    benchmark: DataBenchmark,
    *,
    threads: Sequence[int] | None = None,
    batches: int = 20,
    step_seconds: float | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Measure images per second by the number of threads that decode; return the report.

    `threads` None: 1, 2, 4 ... as many as training uses. Each number of threads reads `batches` batches.
    `step_seconds` is the time of a training step; None: counted, where the run and the GPU's peak are known. Raises
    UserError as opening the data does.
    """
    torch_device = choose_device(device)
    source = benchmark.data.open()

    # how fast a training step needs images
    origin = "given"
    if not step_seconds:
        step_seconds, origin = _step_seconds(benchmark, torch_device)
    needed = benchmark.batch / step_seconds if step_seconds else None

    # how fast the data give them
    albums = _albums_of(source)
    decodes = any(album.decoded is None for album in albums)
    thread_counts: Sequence[int | None] = [None]  # where nothing is decoded, threads do not matter
    if decodes:
        thread_counts = threads or powers_of_two(MAX_THREADS)
    steps_per_count = WARM_UP_BATCHES + batches
    rows: list[dict[str, Any]] = []
    with bar("reading", len(thread_counts) * steps_per_count) as tick:
        for i, num_threads in enumerate(thread_counts):
            for album in albums:
                if num_threads:
                    album.use_threads(num_threads)
            steps = range(i * steps_per_count, (i + 1) * steps_per_count)
            rate = images_per_second(source, benchmark.batch, steps, torch_device, tick)
            must_wait = None if needed is None else rate < needed
            rows.append({"threads": num_threads, "images_per_second": rate, "waits": must_wait})
    return {
        "data": benchmark.data.model_dump(mode="json"),
        "kind": _kind_text(benchmark.data, albums),
        "images": source.size,
        "shape": list(benchmark.data.shape),
        "batch": benchmark.batch,
        "batches": batches,
        "step_seconds": step_seconds,
        "step_seconds_are": origin,
        "images_per_second_needed": needed,
        "machine": machine.hardware(torch_device).text,
        "cores": os.cpu_count(),
        "versions": software_versions(),
        "rows": rows,
    }


def images_per_second(source: DataSource, batch: int, steps: range, device: torch.device, tick: Tick) -> float:
    """Images per second over these steps, of which the first `WARM_UP_BATCHES` are not timed."""
    watch = Stopwatch(device)
    began = 0.0
    last = steps.stop + BATCHES_AHEAD
    with Prefetch(lambda step: source.batch(step, batch, 0), last=last, depth=BATCHES_AHEAD) as batch_at:
        for step in steps:
            signals.check()
            for part in batch_at(step):
                to_device(part, device)
            if step == steps[WARM_UP_BATCHES - 1]:
                began = watch.now()
            tick(step + 1, "")
        return batch * (len(steps) - WARM_UP_BATCHES) / (watch.now() - began)


def _step_seconds(benchmark: DataBenchmark, device: torch.device) -> tuple[float | None, str | None]:
    """Seconds of the run's step at a usual share of the GPU's peak, and their origin; None without run or peak."""
    peak = known_peak_tflops(device)
    cost = benchmark.cost
    if cost is None or peak is None:
        return None, None
    seconds = benchmark.batch * cost.units * cost.flops / (_SHARE_OF_PEAK * 1e12 * peak)
    return seconds, f"counted, at {_SHARE_OF_PEAK:.0%} of the peak"


def powers_of_two(limit: int) -> list[int]:
    """The powers of two below `limit`, and `limit` itself: 1, 2, 4, 6."""
    powers = [2**k for k in range(limit.bit_length())]
    return [*(power for power in powers if power < limit), limit]


def _albums_of(source: DataSource) -> list[Album]:
    """The albums that a source reads, which may have captions or be in buckets; []: it reads none."""
    match source:
        case Album():
            return [source]
        case Captioned():
            return _albums_of(source.source)
        case Bucketed():
            albums: list[Album] = []
            for part in source.parts:
                albums += _albums_of(part)
            return albums
        case _:
            return []


def _kind_text(data: Data, albums: Sequence[Album]) -> str:
    """How a batch is made, in words. `albums` are those of the source."""
    if albums:
        store = type(albums[0].store).__name__.lower()
        if albums[0].decoded is None:
            return f"{store}, decoded at every visit"
        return f"{store}, decoded once, in memory"
    if isinstance(data, Latents):
        return "latents, drawn from at every visit"
    return "numbers in memory"


def verdict(report: dict[str, Any]) -> str:
    """A sentence on a report of `measure`: whether the device would wait for its data, and what to do."""
    best = max(report["rows"], key=lambda row: row["images_per_second"])
    rate = best["images_per_second"]
    needed = report["images_per_second_needed"]
    if needed is None:
        return (
            "say what a step takes (--step-seconds; dumo dry --rows measures it), to know whether a device would wait"
        )
    rates = f"a step takes {needed:,.0f} images/s ({report['step_seconds_are']}), and here are {rate:,.0f}"
    if rate >= needed:
        return f"the device does not wait: {rates}"
    fix = "put them on a faster disk"
    if "decoded at" in report["kind"]:
        fix = "encode them once (dumo encode), or raise data.memory"
    return f"the device waits {1 - rate / needed:.0%} of the time: {rates}: {fix}, or take more cores"
