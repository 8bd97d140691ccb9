"""What training a run costs, counted without weights, data or a GPU: memory by layout, disk, operations, hours.

`count_cost` is the entry point of `dumo show SOURCE --cost`. It counts the memory of each rank for the run as it is,
and for each change of `layouts`. These take less memory and leave what the run learns as it is, but for the rounding of
a frozen base in int8 or nf4.
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

# Of a GPU's peak, what training reaches: our estimate, where nothing was measured.
USUAL_SHARE_OF_PEAK = 0.4
# Codings of a frozen base with fewer bits than bfloat16, by the number of bits.
_CODINGS = {"int8": 8, "nf4": 4}


@dataclass(frozen=True)
class LayoutMemory:
    """The bytes of each rank's memory in one layout of a run."""

    layout: str  # the field that is set, or "as is"
    rows: int  # of the largest pass
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int  # with weights that are gathered from other ranks
    texts: int  # captions' embeddings on the device, and encoders that run in training
    total: int


@dataclass(frozen=True)
class Cost:
    """What training a run costs. `dumo show SOURCE --cost --json` prints the fields."""

    ranks: int
    memory: list[LayoutMemory]
    checkpoint_bytes: int
    flops: float  # of the whole training, two to a multiply-add, without validation
    tflops: float | None  # of each GPU, in 10^12 operations per second
    hours: float | None  # None if `tflops` is


def count_cost(run: Run, ranks: int = 1, tflops: float | None = None, bar: Bar = no_bar) -> Cost:
    """Count what a run costs on `ranks` ranks, whose GPUs make `tflops` 10^12 operations per second each.

    For published models this can take minutes; `bar` shows the layouts that are done. Raises UserError if
    the run cannot be divided among this many ranks.
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
    """Yield the run as it is, and with each change that is possible and takes less memory, by the text of the change.

    These are a smaller micro-batch, recomputed blocks, a frozen base in fewer bits, and weights shared by all ranks.
    Fewer bits need bitsandbytes, whose operators the count calls: without it they are left out.
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
    """Yield a change, a.b=c, and the run with it; nothing if it does not fit the run."""
    tree = run.model_dump(mode="json")
    override(tree, [change])
    try:
        changed_run = parse(Run, tree)
    except UserError:
        return
    yield change, changed_run


def _least_micro_batch(run: Run, ranks: int) -> int:
    """The fewest rows of a micro-batch, at most as many as now: one, unless the objective needs several together."""
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
    """The rows of the largest micro-batch on any of `ranks` ranks. Raises UserError if the batch cannot be divided."""
    micro_batches_by_rank = split_batch(run.train, run.objective, ranks)
    return max(rows.stop - rows.start for micro_batches in micro_batches_by_rank for rows in micro_batches)


def _count_memory(name: str, run: Run, ranks: int) -> LayoutMemory:
    """Count the bytes of each rank. For one rank the sum is an upper bound: gradients count as if they always exist."""
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
    """Bytes that texts take on each rank besides the network.

    These are encoders that run in training, if their size is known; and, if the captions are not known yet, their
    embeddings on the device, at most. Else the network has the embeddings.
    """
    texts = run.net.texts
    captions = run.data.classes
    total = 0
    if isinstance(texts, PipelineTexts) and texts.is_online(captions):
        total += texts.encoder_bytes or 0
    if isinstance(texts, EmbeddedTexts) and not captions and texts.fits_device(captions):
        total += int(texts.memory * GIGABYTE)
    return total
