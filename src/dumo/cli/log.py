"""Watching runs: their logs as tables, as curves, and on their way to trackers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dumo.cli.option import AsJson
from dumo.cli.terminal import err, out, show_table

if TYPE_CHECKING:
    from dumo.training.log import Row

LAST = 10  # rows of a table


def log(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, such as runs/*.")],
    last: Annotated[int, typer.Option(min=1, help="How many rows of each run, the latest.")] = LAST,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the curves of all these runs in one picture.")] = False,
    file: Annotated[
        Path | None, typer.Option("--out", help="The picture. Default: log.png in the run's folder; of several, here.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="TRACKER", help="Send all rows to tensorboard, wandb or trackio, each once.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="With --to: go on as the runs do, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at runs as they train: the last rows of their logs; with --plot their curves; with --to in a tracker.

    Nothing is sent but by --to, and there only where that tool is set to send it: tensorboard and trackio keep it on
    this machine, and so does wandb with WANDB_MODE=offline.
    """
    if (plot and to) or (as_json and (plot or to)):
        raise typer.BadParameter("--plot, --to and --json: give one of them")
    if follow and not to:
        raise typer.BadParameter("--follow goes with --to")
    if file and not plot:
        raise typer.BadParameter("--out goes with --plot")
    if to:
        send(runs, to, follow=follow)
    elif plot:
        draw(runs, file)
    else:
        table(runs, last, as_json=as_json)


def table(runs: list[Path], last: int, *, as_json: bool) -> None:
    """The latest rows of each run, on stdout."""
    from dumo.run.speed import logged

    found = {str(run): logged(run)[-last:] for run in runs}
    if as_json:
        print(json.dumps({"runs": found}))
        return
    for name, rows in found.items():
        if rows:
            show_table(name, cells(rows))
        else:
            out.print(f"{name}: nothing is logged yet", soft_wrap=True)


def cells(rows: "list[Row]") -> list[dict[str, Any]]:
    """Rows as a table has them: one loss where it has one part, and of skipped steps how many rows were to blame."""
    parts = list(dict.fromkeys(part for row in rows for part in row.get("parts", {})))
    skips, timed = any(row.get("skipped") for row in rows), any("speed" in row for row in rows)

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    return [
        {
            "step": f"{row['step']:,}",
            "loss": number(row.get("loss")),
            **({part: number(row.get("parts", {}).get(part)) for part in parts} if len(parts) > 1 else {}),
            "gradient norm": number(row.get("grad_norm")),
            "learning rate": number(row.get("lr")),
            **({"images/s": number(row.get("speed", {}).get("images_per_second"))} if timed else {}),
            **({"skipped for": skipped(row)} if skips else {}),
        }
        for row in rows
    ]


def skipped(row: "Row") -> str:
    """How many of a skipped step's rows were not finite."""
    why = row.get("skipped")
    return f"{why['count']:,} rows" if isinstance(why, dict) and "count" in why else "yes" if why else ""


def draw(runs: list[Path], file: Path | None) -> None:
    """The curves of these runs as a PNG; its path is printed. Raises UserError where nothing is logged yet."""
    from dumo.io.picture import write_picture
    from dumo.report.figure import curves
    from dumo.run.speed import logged
    from dumo.types import UserError

    found = {str(run): logged(run) for run in runs}
    if empty := [name for name, rows in found.items() if not rows]:
        raise UserError(f"{empty[0]}: nothing is logged yet, so there is no curve")
    file = file or (runs[0] / "log.png" if len(runs) == 1 else Path("log.png"))
    write_picture(file, curves(found))
    out.print(str(file), soft_wrap=True)


def send(runs: list[Path], to: str, *, follow: bool) -> None:
    """All rows that the tracker was not sent yet; what was is said on stderr."""
    from dumo.report.tracker import TRACKERS, feed
    from dumo.run.config.error import require_known

    require_known("tracker", to, TRACKERS)
    for run, rows in feed(runs, to, follow=follow).items():
        err.print(f"{run}: {rows:,} rows sent to {to}", soft_wrap=True)
