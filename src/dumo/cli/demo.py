"""`dumo demo`: serve a page to play with runs.

`demo` is the command. It opens the port and imports Gradio, because these fail at once, then
opens the runs (`dumo.report.live`), and serves the page (`dumo.report.demo`) until a signal.
"""

from typing import Annotated

import typer

from dumo.cli.option import Device, Folder, Set, TrustCode, Weights
from dumo.cli.terminal import err, explain, out


def demo(
    run_folder: Folder = "digits-trained",
    other: Annotated[
        str | None,
        typer.Argument(metavar="[OTHER]", help="Another run's folder, to show next to it."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,  # Gradio's own
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 60.0,
    set_: Set = None,
    weights: Weights = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Play with a run in the browser, or with two.

    It needs Gradio, the extra demo.

    This machine alone can reach it; elsewhere, open it by the ssh command that is printed. Without a run it takes
    digits-trained, which comes with dumo.

    Example:  dumo demo cifar10-trained
    """
    folders = [run_folder] if other is None else [run_folder, other]

    from dumo.report.address import open_listener, tunnel_text
    from dumo.report.demo import build_page, offline_gradio, serve
    from dumo.report.live import open_runs
    from dumo.runtime import dist

    dist.require_one_process("dumo demo")

    with open_listener(port) as listener, offline_gradio():
        runs = open_runs(folders, set_ or [], weights=weights, device=device, limit=limit)

        def print_address(url: str) -> None:
            out.print(url, soft_wrap=True)
            err.print(tunnel_text(listener), soft_wrap=True)

        serve(build_page(runs, explain), listener, print_address)
