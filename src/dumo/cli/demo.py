"""The command `demo`: serve a page to play with runs."""

import os
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from dumo.cli.option import Device, TrustCode, Weights
from dumo.cli.terminal import err, out


def demo(
    run_folders: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN...]", help="Folders of runs to show side by side. Default: digits-trained."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="N", help="Default: the first free port from 7860.")
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Sample from runs interactively in the browser.

    Requires Gradio, the extra demo. Only this machine can reach the page; from another one, open it by the ssh command
    that is printed.

    Examples:
    dumo demo cifar10-trained
    dumo demo runs/digits runs/digits-meanflow --port 8000
    """
    from dumo.report.demo_page import build_page, open_demo, serve, tunnel_text
    from dumo.runtime import dist

    dist.require_one_process("dumo demo")
    if weights and run_folders and len(run_folders) > 1:
        raise typer.BadParameter("--weights belong to a single run: give only one run")

    def print_address(url: str) -> None:
        out.print(url, soft_wrap=True)
        err.print(tunnel_text(url), soft_wrap=True)

    # Gradio keeps the pictures that it shows in a folder.
    with TemporaryDirectory(prefix="dumo-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        runs = open_demo(run_folders or ["digits-trained"], weights=weights, device=device)
        serve(build_page(runs), port, print_address)
