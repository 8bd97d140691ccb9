"""Make the table of texts that a run's net reads: where captions, an encoder and a folder meet.

As with latents, it never matters who made which shard or how often that was interrupted (`dumo.io.table`). Token
ids, of which an encoder is trained along, cost nothing: training makes them itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from dumo.data import Moons
from dumo.encoders.texttable import encode as encode_texts
from dumo.encoders.texttable import read_contents
from dumo.io.file import locked
from dumo.io.table import Done
from dumo.nets.table import Tabled
from dumo.nets.text import Learned
from dumo.run.config.spec import Run
from dumo.runtime import dist
from dumo.runtime.progress import Bar, no_bar
from dumo.types import UserError

SHARD_ROWS = 1024  # ours


@dataclass(frozen=True)
class Made:
    """What this rank did for a table."""

    spec: Tabled
    done: Done


def asked(run: Run) -> Tabled | None:
    """What says which table the net reads; None: it reads none."""
    texts: object = getattr(run.net, "texts", None)
    return texts if isinstance(texts, Tabled) else None


def captions(run: Run) -> Sequence[str]:
    """The captions of the data, by number. Raises UserError where there are none, and as the data tell them."""
    if run.captions is None or isinstance(run.data, Moons):
        raise UserError(f"data '{run.data.kind}' give no captions to encode: set data.captions, or net.texts=null")
    return run.data.caption_texts()


def encode(
    run: Run,
    spec: Tabled,
    *,
    batch: int = 32,
    shard_rows: int = SHARD_ROWS,
    part: tuple[int, int] = (0, 1),
    device: str = "auto",
    bar: Bar = no_bar,
) -> Made:
    """Make shards k, k + n, k + 2 n ... of the table, `part` being (k, n). Raises as `texttable.encode`."""
    texts, (rank, world) = captions(run), part
    mine = range(rank, ceil((len(texts) + 1) / shard_rows), world)
    total = sum(min(shard_rows, len(texts) + 1 - k * shard_rows) for k in mine)
    with bar("encoding captions", total) as tick:
        done = encode_texts(
            *(texts, spec.by, spec.folder),
            shard_rows=shard_rows, batch=batch, rank=rank, world=world, device=dist.device(device), tick=tick,
        )  # fmt: skip
    return Made(spec, done)


def told(made: Made) -> Iterator[str]:
    """What was done, in lines: what was damaged, and what is there."""
    done, folder = made.done, made.spec.folder
    yield from (f"was damaged and is made again: {what}" for what in done.damaged)
    contents = read_contents(folder)
    if contents is None or not contents.shards:
        yield f"{folder}: {done.made} shards made, {done.missing} are still to be made by others"
        return
    width = f"tokens of {contents.width} numbers" if contents.width else "numbers of tokens"
    pooled = f", and {contents.pooled} of the whole text" if contents.pooled else ""
    yield (
        f"{folder}: {contents.captions:,} captions and the empty one by {contents.model}, up to "
        f"{contents.encoder.length} {width}{pooled}, {done.made} shards made now"
    )


def ready(run: Run, *, make: bool = True) -> Run:
    """The run, which knows its table. `make`: token ids are made, if they are not there.

    Raises UserError where the folder holds those of other captions.
    """
    spec = asked(run)
    if spec is None:
        return run
    if make and isinstance(spec, Learned):
        lock = spec.folder.with_name(f".{spec.folder.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):  # runs that start together make it once
            encode(run, spec)
    texts = type(spec).model_validate(spec.model_dump())  # which looks again
    return run.model_copy(update={"net": run.net.model_copy(update={"texts": texts})})
