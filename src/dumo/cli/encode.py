"""The command `encode`: fill the caches of latents and of encoded captions before training."""

from shlex import join
from typing import TYPE_CHECKING, Annotated

import typer

from dumo.cli.option import Device, Overrides, TrustCode
from dumo.cli.terminal import err, out, resume_hint
from dumo.runtime.limits import ROWS
from dumo.runtime.progress import bar, print_line

if TYPE_CHECKING:
    from dumo.run.fill_caches import EncodeResult, TextResult


def encode(
    source: Annotated[str, typer.Argument(help="A recipe with latents or captions, or a folder or file of images.")],
    overrides: Overrides = None,
    folder: Annotated[
        str | None,
        typer.Option("--out", metavar="FOLDER", help="The cache of latents. Default: the recipe's data.root."),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="taef2, sd-vae, dc-ae or pipeline. Default: the recipe's."),
    ] = None,
    side: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Pixels along a side. Default: the recipe's.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, max=ROWS, metavar="N", help="Encode the first images only. Default: all.")
    ] = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Encode the images and captions of a recipe ahead of training.

    Training encodes missing images itself. Under torchrun this command uses several GPUs or machines; copy
    runs/latents and runs/texts to where the recipe is trained.

    Run it again to resume. Mirrored images are encoded as well if the data are flipped. A damaged shard is reported and
    encoded again; a shard of other images is refused.

    Examples:
    dumo encode my-images-256 data.images.root=photos
    dumo encode photos --out latents --codec taef2 --side 256
    """
    from dumo.config.source import choose
    from dumo.data import Latents
    from dumo.run import fill_caches as encoding
    from dumo.runtime import dist

    # Encode the images, then the captions. The ranks wait for each other at the end.
    work = encoding.encoding_work(source, overrides or [], out=folder, codec=codec, side=side, count=count)
    results: list[EncodeResult | TextResult] = []
    with resume_hint(), dist.join():
        rank, world = dist.torchrun_rank_and_world()
        if isinstance(work.data, Latents):
            results.append(encoding.encode(work.data, rank=rank, world=world, device=device, bar=bar))
        if work.run:
            text_result = encoding.encode_texts(work.run, deep=True, rank=rank, world=world, device=device, bar=bar)
            if text_result:
                results.append(text_result)
            else:
                print_line(encoding.reason_without_cached_texts(work.run))

    # Print what was made, and what to type next.
    for result in results:
        for line in result.lines():
            out.print(line, soft_wrap=True)
    is_complete = all(result.is_finished for result in results)
    if is_complete and choose(source).kind == "recipe":
        fields = [*encoding.options_as_overrides(folder, codec, side, count), *(overrides or [])]
        err.print(f"next:  {join(['dumo', 'train', source, *fields])}", soft_wrap=True)
