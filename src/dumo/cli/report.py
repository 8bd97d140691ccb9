"""The command `report`: write one page on a run, or draw the logs of several."""

from pathlib import Path
from typing import Annotated

import typer

from dumo.cli.option import Device, Prompts, TrustCode
from dumo.cli.terminal import out
from dumo.runtime.progress import bar


def report(
    run_folders: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, such as runs/digits, or digits-trained.")
    ],
    prompts: Prompts = None,
    file: Annotated[
        Path | None,
        typer.Option("--out", dir_okay=False, metavar="FILE", help="The figure for several runs. Default: log.png."),
    ] = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Write a report page for one run, or plot the logs of several.

    The page, report.html in the run's folder, shows samples, trajectories, nearest training images, training curves
    and scores. A run with captions is sampled with --prompts, or with captions of its data.

    Examples:
    dumo report runs/digits
    dumo report runs/digits runs/digits-meanflow --out log.png
    """
    if len(run_folders) > 1:
        from dumo.io.picture import write_picture
        from dumo.report.figure import draw_logs
        from dumo.run import read_only
        from dumo.run.speed import log_with_speeds

        file = file or Path("log.png")
        write_picture(file, draw_logs({run: log_with_speeds(read_only.find(run)) for run in run_folders}))
        out.print(str(file), soft_wrap=True)
        return
    if file:
        raise typer.BadParameter(
            "--out is for the figure of several runs, and the report of one run is in its folder: remove --out"
        )
    [run_folder] = run_folders

    from dumo.encoders.caption_ids import read_prompts
    from dumo.report import page
    from dumo.run.weights import load_run
    from dumo.runtime import dist

    dist.require_one_process("dumo report")
    texts = [row.text for row in read_prompts(prompts)] if prompts else []
    path = page.write(load_run(run_folder, device=device), bar, texts)
    out.print(str(path), soft_wrap=True)
