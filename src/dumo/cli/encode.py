"""The command `encode`: encode images to latents, and captions to a table, once."""

from collections.abc import Sequence
from contextlib import nullcontext
from shlex import join
from typing import TYPE_CHECKING, Annotated

import typer

from dumo.cli.option import Device, Set, TrustCode, Verify
from dumo.cli.terminal import err, memory_hint, out, resume_hint
from dumo.runtime.door import program
from dumo.runtime.limits import ROWS
from dumo.runtime.progress import bar, print_line

if TYPE_CHECKING:
    from dumo.data import Data
    from dumo.run.encode import EncodeResult


def encode(
    source: Annotated[
        str,
        typer.Argument(help="A recipe of latents or captions, or a folder or file of images."),
    ],
    folder: Annotated[
        str | None, typer.Argument(metavar="[OUT]", help="The cache's folder. Default: the recipe's data.root.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="taef2, sd-vae, dc-ae or pipeline. Default: the recipe's.")] = None,
    side: Annotated[int | None, typer.Option(min=1, help="Pixels along a side. Default: the recipe's.")] = None,
    count: Annotated[
        int | None, typer.Option(min=1, max=ROWS, help="Encode the first images alone. Default: all.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="moments, drawn from at every visit, or samples, half as large. Default: the cache's, or moments."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32. Default: the cache's, or float16.")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Images to a shard: what a stop may lose. Default: the cache's, or 1024.")
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            max=ROWS,
            help="Images, or captions, that are encoded at a time; of images no more pixels than 16 x 256 x 256.",
        ),
    ] = 32,
    part: Annotated[
        str | None, typer.Option(metavar="K/N", help="Make part K of N, from 0. Default: as torchrun says.")
    ] = None,
    verify: Verify = False,
    set_: Set = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Encode images to latents, and captions to a table, once.

    Of images it makes the cache that a recipe trains on, and of captions the table that its net reads.

    Started again, it goes on where it stopped. Both flips are kept where the data are flipped. A shard that is damaged
    is named and made again; one of other images than are here is refused. Under torchrun the ranks share the work.

    Example:  dumo encode cifar10-latents
    """
    from dumo.config.source import choose
    from dumo.data import is_latents
    from dumo.run import encode as encoding
    from dumo.runtime import dist

    work = encoding.encoding_work(source, set_ or [], out=folder, codec=codec, side=side, count=count)
    ranks = dist.join() if part is None else nullcontext()  # it ends when all are done
    results: list[EncodeResult] = []
    with memory_hint(_smaller_batch_hint(batch, work.data)), resume_hint(), ranks:
        rank, world = encoding.parse_part(part)
        if is_latents(work.data):
            latents = encoding.encode(
                work.data,
                batch=batch,
                rank=rank,
                world=world,
                store=store,
                dtype=dtype,
                shard_rows=shard_rows,
                verify=verify,
                device=device,
                bar=bar,
            )
            results.append(latents)
        no_table = encoding.reason_without_text_table(work.data, work.texts) if work.texts else ""
        if no_table:
            print_line(no_table)
        elif work.texts:
            texts = encoding.encode_texts(
                work.data,
                work.texts,
                batch=batch,
                rank=rank,
                world=world,
                shard_rows=shard_rows,
                device=device,
                bar=bar,
            )
            results.append(texts)

    # what was made, and what to type next
    for result in results:
        for line in result.lines():
            out.print(line, soft_wrap=True)
    is_complete = all(result.read_index() for result in results)
    if is_complete and choose(source).kind == "recipe":
        options = encoding.options_as_settings(folder, codec, side, count)
        _print_train_command(source, [*options, *(set_ or [])])


def _smaller_batch_hint(batch: int, data: "Data") -> str:
    """A hint, for an error: what to set so that encoding takes less memory."""
    from dumo.data import is_latents
    from dumo.encoders.codec import images_at_once

    if not is_latents(data):
        return f"set --batch lower (now {batch})"
    at_once = images_at_once(data.images.side, data.images.side)
    return f"set --batch lower (now {batch}, and of images at most {at_once} at a time)"


def _print_train_command(recipe: str, changes: Sequence[str]) -> None:
    """Print how to train a recipe with these changes, each a.b=c, as what to type next."""
    command = [program(), "train", recipe]
    for change in changes:
        command += ["--set", change]
    err.print(f"next:  {join(command)}", soft_wrap=True)
