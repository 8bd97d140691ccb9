"""Encode captions into a table, shard by shard, on any number of ranks; it can be killed and started again.

The contents of a shard depend on its number alone (`dumo.io.series`): its texts are encoded in the same batches, from
its own first row.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dumo.encoders.text import Embeddings, Encoder, EncoderModel
from dumo.encoders.texttable import CAPTIONS, FILE, Contents, read_captions, read_contents
from dumo.encoders.tokens import Cutter, Tokenizer
from dumo.io import digest, series
from dumo.io.table import Done, Tick
from dumo.runtime import signals
from dumo.types import UserError


def encode(
    captions: Sequence[str],
    encoder: Encoder | Tokenizer,
    out: Path,
    *,
    shard_rows: int = 1024,
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    tick: Tick = lambda done, note: None,
) -> Done:
    """Make this rank's shards that are missing or damaged. Another batch may change the last bits.

    Warns where texts are cut. Raises UserError where there are no captions, `out` holds another table or something
    else, an embedding is too large for the dtype, or the disk is full, and as opening the encoder does; OSError where
    nothing can be written; Stopped after a signal. Finished shards are kept.
    """
    if not captions:
        raise UserError("there are no captions to encode: give data.captions, and images that have some")
    read = encoder.open() if isinstance(encoder, Tokenizer) else encoder.open(device)
    contents = contents_of(captions, encoder, read, shard_rows)
    texts = [*captions, ""]

    def shard(number: int, behind: Callable[[int], None]) -> tuple[int, dict[str, Tensor]]:
        rows, parts = contents.span(number), list[dict[str, Tensor]]()
        for i in rows[::batch]:
            signals.check()
            some = texts[i : min(i + batch, rows.stop)]
            parts.append(without_padding(embeddings(read, some)))
            behind(i + len(some) - rows.start)
        return len(rows), stored({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, contents)

    file = out / FILE
    made, damaged = series.make(file, contents, lambda: read_contents(out), shard, rank=rank, world=world, tick=tick)
    damaged = (*damaged, *keep(out, captions, contents, rank))
    whole = series.standing(out, contents.count, lambda: read_contents(out))
    if len(whole) == contents.count:
        series.finish(file, (read_contents(out) or contents).model_copy(update={"shards": whole}), contents.count, rank)
    return Done(made, damaged, contents.count - len(whole))


def contents_of(
    captions: Sequence[str], encoder: Encoder | Tokenizer, read: EncoderModel | Cutter, shard_rows: int
) -> Contents:
    """The contents of texts.yaml before any shard is made."""
    one = embeddings(read, [""])
    return Contents(
        encoder=encoder,
        model="tokens" if isinstance(encoder, Tokenizer) else encoder.model_type(),
        sha256=read.sha256,
        width=0 if isinstance(read, Cutter) else one.tokens.shape[2],
        pooled=0 if one.pooled is None else one.pooled.shape[1],
        captions=len(captions),
        digest=digest.short(*captions),
        shard_rows=shard_rows,
    )


def embeddings(read: EncoderModel | Cutter, texts: Sequence[str]) -> Embeddings:
    """The embeddings of texts, padded; ids where there is no encoder."""
    if isinstance(read, EncoderModel):
        return read(texts)
    ids, mask = read(texts, whole=False)
    return Embeddings(ids[..., None], mask, None)


def without_padding(found: Embeddings) -> dict[str, Tensor]:
    """Tokens one after the other, and their number in each text."""
    parts = {"tokens": found.tokens[found.mask], "lengths": found.mask.sum(1)}
    return parts if found.pooled is None else parts | {"pooled": found.pooled}


def stored(tensors: dict[str, Tensor], contents: Contents) -> dict[str, Tensor]:
    """A shard's tensors in the stored types. Raises UserError where they are not finite there."""
    kept = {name: x if name == "lengths" else x.to(contents.dtype) for name, x in tensors.items()}
    if not contents.width:
        return kept | {"tokens": kept["tokens"][:, 0]}
    if not all(bool(x.isfinite().all()) for x in kept.values()):
        kind = str(contents.dtype).removeprefix("torch.")
        raise UserError(f"the encoder gives no numbers, or too large ones for {kind}: set its dtype=bfloat16")
    return kept


def keep(out: Path, captions: Sequence[str], contents: Contents, rank: int) -> list[str]:
    """Write the captions, unless they are there; return the damage that was found and repaired, if any."""
    file, damaged = out / CAPTIONS, list[str]()
    if file.exists():
        try:
            read_captions(out, contents.digest)
            return []
        except UserError:
            damaged = [f"{CAPTIONS} has changed"]
    lines = "".join(f"{json.dumps(text, ensure_ascii=False)}\n" for text in captions)
    series.write(file, lines.encode(), rank)
    return damaged
