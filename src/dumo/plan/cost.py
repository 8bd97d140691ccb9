"""Estimate the memory, disk space, operations and hours of a training without weights, data or a GPU.

`count_cost` is the entry point of `dumo show SOURCE --cost`. It counts the memory per rank for the run and for each
change of `layouts`. These changes save memory and do not affect training, except for the rounding of a frozen base in
int8 or nf4.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from dumo.config.check_spec import check_ranks
from dumo.config.load import parse
from dumo.config.overrides import override
from dumo.config.spec import Run
from dumo.nets.text_spec import EmbeddedTexts, PipelineTexts
from dumo.plan import cluster
from dumo.run import memory
from dumo.run.flops import step_cost
from dumo.run.net import meta_net
from dumo.runtime import installed_version
from dumo.runtime.formatting import SECONDS_PER_HOUR
from dumo.runtime.limits import GIGABYTE
from dumo.runtime.progress import Bar, no_bar
from dumo.training.layout import share_of
from dumo.training.micro_batch import rows_kept_together, split_batch
from dumo.types import UserError

# The fraction of a GPU's peak FLOPS that training reaches (our estimate), used if nothing was measured.
USUAL_SHARE_OF_PEAK = 0.4
# Bits per weight of the quantized formats of a frozen base.
_CODINGS = {"int8": 8, "nf4": 4}


@dataclass(frozen=True)
class LayoutMemory:
    """The memory of each rank in one layout of a run, in bytes."""

    # the field that is set, or "as is"
    layout: str
    # rows of the largest forward pass
    rows: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    # includes weights gathered from other ranks
    activations: int
    # caption embeddings on the device, and text encoders that run in training
    texts: int
    total: int


@dataclass(frozen=True)
class Cost:
    """The cost of training a run. `dumo show SOURCE --cost --json` prints the fields."""

    ranks: int
    memory: list[LayoutMemory]
    checkpoint_bytes: int
    # floating-point operations of the whole training without validation, two per multiply-add
    flops: float
    # speed of each GPU in 10^12 operations per second
    tflops: float | None
    # None if `tflops` is None
    hours: float | None


def count_cost(run: Run, ranks: int = 1, tflops: float | None = None, bar: Bar = no_bar) -> Cost:
    """Count the cost of a run on `ranks` GPUs with `tflops` 10^12 operations per second each.

    For published models this can take minutes; `bar` counts the finished layouts. Raise UserError if the batch cannot
    be divided among the ranks.
    """
    check_ranks(run.train, run.objective, ranks)
    net = meta_net(run)
    step = step_cost(net, run.objective, run.path, run.data.shape, ref=run.train.ref)
    flops = step.flops * run.train.steps * run.train.batch
    all_layouts = list(layouts(run, ranks))
    rows_of_memory: list[LayoutMemory] = []
    with bar("layouts", len(all_layouts)) as tick:
        for name, run_in_layout in all_layouts:
            rows_of_memory.append(_count_memory(name, run_in_layout, ranks))
            tick(len(rows_of_memory), "")
    return Cost(
        ranks=ranks,
        memory=rows_of_memory,
        checkpoint_bytes=memory.checkpoint_bytes(net, memory.held_bytes(net, run.train)),
        flops=flops,
        tflops=tflops,
        hours=flops / (ranks * tflops * 1e12) / SECONDS_PER_HOUR if tflops else None,
    )


def layouts(run: Run, ranks: int) -> Iterator[tuple[str, Run]]:
    """Yield the unchanged run, then each memory-saving change with the changed run.

    The changes are a smaller micro-batch, activation checkpointing, a quantized base, and weights sharded over all
    ranks. Quantized bases are counted only if bitsandbytes is installed, because the count calls its operators.
    """
    yield "as is", run
    micro_batch = _least_micro_batch(run, ranks)
    if micro_batch < most_rows(run, ranks):
        yield from _changed(run, f"train.micro_batch={micro_batch}")
    if run.net.checkpoint is not True:
        yield from _changed(run, "net.checkpoint=true")
    lora = run.net.lora
    if lora and installed_version("bitsandbytes"):
        for coding, bits in _CODINGS.items():
            if bits < _CODINGS.get(lora.frozen, 16):
                yield from _changed(run, f"net.lora.frozen={coding}")
    if share_of(run.train.share, ranks) < ranks:
        yield from _changed(run, f"train.share={ranks}")


def _changed(run: Run, change: str) -> Iterator[tuple[str, Run]]:
    """Yield a change such as a.b=c and the changed run, or nothing if the changed run is invalid."""
    tree = run.model_dump(mode="json")
    override(tree, [change])
    try:
        changed_run = parse(Run, tree)
    except UserError:
        return
    yield change, changed_run


def _least_micro_batch(run: Run, ranks: int) -> int:
    """Return the smallest valid micro-batch, at most the current one: 1 unless the objective needs groups of rows."""
    rows = rows_kept_together(run.train, run.objective)
    while rows < most_rows(run, ranks):
        try:
            check_ranks(run.train.model_copy(update={"micro_batch": rows}), run.objective, ranks)
        except UserError:
            rows *= 2
        else:
            return rows
    return most_rows(run, ranks)


def most_rows(run: Run, ranks: int) -> int:
    """Return the size of the largest micro-batch on any rank. Raise UserError if the batch cannot be divided."""
    micro_batches_by_rank = split_batch(run.train, run.objective, ranks)
    return max(rows.stop - rows.start for micro_batches in micro_batches_by_rank for rows in micro_batches)


def _count_memory(name: str, run: Run, ranks: int) -> LayoutMemory:
    """Count the bytes of each rank.

    On one rank the sum is an upper bound, because gradients count as if they existed throughout the step.
    """
    train = run.train
    rows = most_rows(run, ranks)
    net = meta_net(run)
    held = memory.held_bytes(net, train).per_rank(share_of(train.share, ranks))
    if ranks == 1:
        activations = memory.activation_bytes(
            memory.net_in_training(net, train),
            run.objective,
            run.path,
            run.data.shape,
            rows=rows,
            ref=train.ref,
            precision=train.precision,
        )
    else:
        peak = cluster.peak_bytes(net, run.objective, run.path, run.data.shape, train, rows=rows, ranks=ranks)
        activations = peak - held.total
    texts = text_bytes(run)
    return LayoutMemory(
        layout=name,
        rows=rows,
        **asdict(held),
        activations=activations,
        texts=texts,
        total=held.total + activations + texts,
    )


def text_bytes(run: Run) -> int:
    """Return the bytes of text encoders and caption embeddings on each rank.

    Encoders count if they run in training and their size is known. If the captions are not known yet, the embeddings
    count with their upper limit; otherwise they are buffers of the network.
    """
    texts = run.net.texts
    captions = run.data.classes
    total = 0
    if isinstance(texts, PipelineTexts) and texts.is_online(captions):
        total += texts.encoder_bytes or 0
    if isinstance(texts, EmbeddedTexts) and not captions and texts.fits_device(captions):
        total += int(texts.memory * GIGABYTE)
    return total
