"""A page to play with a trained run."""

from typing import Annotated

import typer

from dumo.cli.failure import told
from dumo.cli.option import Device, RunFolder, Set, Weights
from dumo.cli.terminal import err, out


def demo(
    run_folder: RunFolder,
    host: Annotated[
        str, typer.Option(help="Where it is served; 0.0.0.0: to all who reach this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 60.0,
    set_: Set = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Serve a page to play with a run: 1, 2, 4, 50 passes side by side, and more. It needs Gradio, the extra demo."""
    from dumo.report.sampler import Sampler
    from dumo.report.server import gradio_alone, listening, private, serve
    from dumo.run.folder import open_run
    from dumo.runtime import dist

    dist.alone("dumo demo")
    with listening(host, port) as opened, gradio_alone():
        from dumo.report.demo import page

        sampler = Sampler(open_run(run_folder, set_ or [], weights=weights, device=device), limit)
        sampler.warm()
        if not private(opened):
            err.print("warning: all who reach this machine can use the page", soft_wrap=True)
        serve(page(sampler, told), opened, lambda address: out.print(address, soft_wrap=True))
