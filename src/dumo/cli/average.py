"""The command `average`: average the weights that a run kept, by another width."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from dumo.cli.option import Folder, TrustCode, parse_file
from dumo.cli.terminal import err, out
from dumo.cli.train import print_next
from dumo.runtime import shell_path
from dumo.runtime.door import program


def average(
    run_folder: Folder,
    std: Annotated[
        float, typer.Option(help="Its width, the standard deviation of its profile as a share of the run, e.g. 0.12.")
    ],
    file: Annotated[
        Path | None,
        typer.Option("--out", parser=parse_file, metavar="FILE", help="Default: averages/ in the run's folder."),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Average the weights that a run kept, by another width.

    For --weights of a command. A run keeps some where train.snapshots says so.

    They are averages by a power (EDM2), of train.ema; which one is best is known after training alone.

    Example:  dumo average runs/cifar10-overnight --std 0.08
    """
    from dumo.config.code import shell_command
    from dumo.config.load import load
    from dumo.run import shipped
    from dumo.run.average import average
    from dumo.run.judge import missing_to_judge
    from dumo.runtime import dist

    dist.require_one_process("dumo average")
    averaged = average(run_folder, std, file)
    err.print(
        f"the average of width {std:g} after step {averaged.step:,}, from {averaged.count} snapshots, "
        f"{averaged.error:.1%} off",
        highlight=False,
        soft_wrap=True,
    )
    out.print(str(averaged.file), soft_wrap=True)
    arguments = f"{shell_path(run_folder)} --weights {shell_path(averaged.file)}"
    dumo = quote(program())
    next_commands = [f"{dumo} sample {arguments}"]
    run = load(shipped.find(run_folder))
    missing = missing_to_judge(run, num_images=None)  # images are not opened for it
    if not missing:
        next_commands.append(f"{dumo} evaluate {arguments}")
    print_next([shell_command(run, command) for command in next_commands], missing)
