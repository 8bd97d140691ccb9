"""How it goes and how good it is: logs as tables, as curves and on their way to trackers; evaluate and compare."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dumo.cli.option import AsJson, Device, Nfe, Seed, Set, SolverName, Weights, numbers
from dumo.cli.terminal import err, out, show_table
from dumo.runtime.progress import bar

if TYPE_CHECKING:
    from dumo.training.log import Row

LAST = 10  # rows of the table of a log
WHAT = {  # baselines
    "perfect": "a perfect sampler",
    "null": "a perfect sampler",
    "noise": "noise",
    "captions": "real images with their captions",
    "others": "real images with other captions",
}


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
    """Rows as a table has them: no part that is the loss itself; of skipped steps how many rows were to blame."""
    from dumo.training.log import weighted

    shown = [row.get("parts", {}) for row in rows if weighted(row.get("loss"), row.get("parts", {}))]
    parts = list(dict.fromkeys(part for row in shown for part in row))
    scores = list(dict.fromkeys(name for row in rows for name in row.get("val", {}) if not name.endswith("_sd")))
    skips, timed = any(row.get("skipped") for row in rows), any("speed" in row for row in rows)

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    return [
        {
            "step": f"{row['step']:,}",
            "loss": number(row.get("loss")),
            **{part: number(row.get("parts", {}).get(part)) for part in parts},
            "gradient norm": number(row.get("grad_norm")),
            "learning rate": number(row.get("lr")),
            **{f"val/{name}": number(row.get("val", {}).get(name)) for name in scores},
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
    from dumo.config.error import require_known
    from dumo.report.feed import feed, nap
    from dumo.report.tracker import TRACKERS

    require_known("tracker", to, TRACKERS)
    for run, rows in feed(runs, to, nap if follow else None).items():
        err.print(f"{run}: {rows:,} rows sent to {to}", soft_wrap=True)


def evaluate(
    run_folder: Annotated[str | None, typer.Argument(help="A run's folder, such as runs/digits.")] = None,
    nfe: Nfe = None,
    seed: Seed = None,
    solver: SolverName = None,
    set_: Set = None,
    weights: Weights = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Judge at several values: sample.m=0.2:0.8:0.1, sample.m=0.3,0.5, or ema, every average."),
    ] = None,
    geneval: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read back results.jsonl, GenEval's word on the run's images.")
    ] = None,
    dpg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read back the results that DPG-Bench wrote of them.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Judge images that others made, in place of a run: a folder (folders in it are classes), an .npz in "
            "ADM's layout, parquet or tar shards. All of one size: none is resized.",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --images: photos (default; from 20 images on), cifar10-features, digits; by Inception's "
            "features folder, cifar10-train50k, adm-imagenet256-50k, adm-imagenet512-50k.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="With --images: the real images to compare with, brought to the size of the others as in training; "
            "of adm-* ADM's file.",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--out", help="With --images: the report. Default: PLACE.evaluation.json, here.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print all scores. Without it: the distance that leads, recall and copies.")
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Judge a trained run by its protocol, next to what a perfect sampler would have: new real images.

    With --images: judge what another repository, a stock pipeline or a GAN made; dumo compare takes the report next to
    those of runs that the same protocol judged: dumo evaluate --images samples.npz --against photos.
    With --geneval or --dpg: report what that benchmark's own evaluator found, of images that dumo sample --format made.
    Under torchrun (torchrun --nproc-per-node 2 -m dumo evaluate RUN) the ranks share the work.
    """
    from dumo.report import evaluate, verdict
    from dumo.report import sweep as sweeps
    from dumo.run.weights import open_run
    from dumo.runtime import dist
    from dumo.runtime.progress import no_bar

    if images is not None:
        if any(one is not None for one in (run_folder, nfe, seed, solver, weights, sweep, geneval, dpg)):
            raise typer.BadParameter("images are made already: --images goes with --protocol, --against, --set, --out")
        judge(images, protocol, against, set_ or [], file, device, as_json=as_json, everything=everything)
        return
    if run_folder is None or protocol or against or file:
        raise typer.BadParameter("name a run's folder; or, with --protocol, --against and --out, images by --images")
    if found := {name: path for name, path in (("geneval", geneval), ("dpg", dpg)) if path}:
        if len(found) > 1 or any((nfe, seed, solver, set_, weights, sweep)):
            raise typer.BadParameter("results are of images that are made already: give --geneval or --dpg alone")
        [(name, path)] = found.items()
        show(verdict.report(verdict.folder(run_folder), name, path), as_json, everything=everything)
        return
    with dist.join():
        main, shown = dist.is_main(), bar if dist.is_main() else no_bar
        opened = open_run(run_folder, set_ or [], weights=weights, device=device)
        judged = evaluate.with_options(opened, nfe=numbers("--nfe", nfe), seed=seed, solver=solver)
        report = evaluate.evaluate(judged, bar=shown) if sweep is None else sweeps.sweep(judged, sweep, bar=shown)
    if not main:
        return
    show(report, as_json, everything=everything)


def judge(
    images: str,
    protocol: str | None,
    against: str | None,
    fields: list[str],
    file: Path | None,
    device: str,
    *,
    as_json: bool,
    everything: bool,
) -> None:
    """Judge images that others made, and print what came out."""
    from dumo.report import images as others
    from dumo.runtime import dist
    from dumo.runtime.progress import no_bar

    with dist.join():
        main, shown = dist.is_main(), bar if dist.is_main() else no_bar
        kind = protocol or others.DEFAULT
        found = others.judge(images, kind, against=against, fields=fields, out=file, device=device, bar=shown)
    if main:
        show(found, as_json, everything=everything)


def show(report: dict[str, Any], as_json: bool, *, everything: bool = False) -> None:
    """Print an evaluation or a sweep: a table, the baselines, the verdict, and the file.

    Of an evaluation the scores of the summary, or `everything`.
    """
    from dumo.evaluation.protocol import CLASS_MMD
    from dumo.report import score

    if as_json:
        print(json.dumps(report))
        return
    if "sweep" in report:
        rows = [{**row, "best": "*" if row["best"] else ""} for row in report["rows"]]
        rows = [{key: row[key] for key in row if key != "card"} for row in rows]
        show_table(f"{report['run']}, {report['sweep']}; * is the best of its number of passes", rows)
    else:
        rows = [*report["results"], *report["contrast"]]
        card = report.get("card") or {}
        columns = score.figures(rows[0], card)
        if not everything:
            columns = score.summary(columns)
        what = report["images"] if "images" in report else f"{report['run']} at step {report['step']:,}"
        title = f"{what}, protocol {report['protocol']}"
        show_table(title, rows if everything else [score.shortened(row, columns) for row in rows])
        for name, value in score.by_name(report).items():
            known = value if everything else score.shortened(value, columns)
            if known:
                out.print(f"{WHAT.get(name, name)}: {spelt(known)}", soft_wrap=True)
        if score.too_few(report):
            out.print(f"{WHAT['perfect']}: too few images to tell")
        if biased := score.biased(rows[0], card):
            out.print(f"no judges of this run, which was trained on what they are by: {', '.join(biased)}")
        if CLASS_MMD in card:
            out.print(f"{CLASS_MMD}: over {card[CLASS_MMD]}", soft_wrap=True)
        if sentence := score.verdict(report):
            out.print(sentence, soft_wrap=True)
    out.print(report["file"], soft_wrap=True)


def spelt(baseline: dict[str, float]) -> str:
    """A baseline in words: each score, ± its spread."""
    means = {key: value for key, value in baseline.items() if key != "splits" and not key.endswith("_sd")}
    spread = {key: f" ± {baseline[f'{key}_sd']:.2g}" for key in means if f"{key}_sd" in baseline}
    return ", ".join(f"{key} {value:.3g}{spread.get(key, '')}" for key, value in means.items())


def compare(
    run_folders: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs that were evaluated, or single evaluations.")
    ],
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Print the table though they were measured otherwise, and say how.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Set the evaluations of several runs side by side, if they were measured alike."""
    from dumo.report import compare as comparison

    found = comparison.compare(run_folders, anyway=anyway)
    if as_json:
        print(json.dumps(found))
        return
    rows = [{key: "" if value is None else value for key, value in row.items()} for row in found["rows"]]
    rows = [row | ({"best": "*" if row["best"] else ""} if "best" in row else {}) for row in rows]
    show_table("* the best of its passes, and what is level with it" if "best" in rows[0] else "", rows)
    for line in {spelt(perfect): None for perfect in found["perfect"].values()}:
        out.print(f"{WHAT['perfect']}: {line}", soft_wrap=True)
    for field, values in found["differs"].items():
        found_in = "; ".join(f"{value} in {name}" for name, value in values.items())
        out.print(f"measured otherwise, {field}: {found_in}", soft_wrap=True)
