"""The command `evaluate`: score a trained run, or images that others made.

Tables go to stdout, as does --json. Slow imports are in the functions that need them.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dumo.cli.option import (
    AsJson,
    Device,
    Nfe,
    Seed,
    Set,
    SolverName,
    TrustCode,
    Weights,
    parse_file,
    parse_integers,
)
from dumo.cli.terminal import out, show_table
from dumo.runtime.door import shell_settings
from dumo.runtime.progress import bar


def evaluate(
    run_folder: Annotated[
        str | None,
        typer.Argument(help="A run's folder, such as runs/digits, or digits-trained."),
    ] = None,
    nfe: Nfe = None,
    seed: Seed = None,
    solver: SolverName = None,
    set_: Set = None,
    weights: Weights = None,
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
            "features folder, cifar10-train50k, adm-imagenet256-50k, adm-imagenet512-50k; by a model of yours, --set "
            "evaluate.protocol.model=DIR, dinov2, cmmd.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="With --images: the real images to compare with: a folder, brought to the size of the others as in "
            "training, if that is square; an .npz of that size; of adm-* ADM's file.",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=parse_file,
            metavar="FILE",
            help="With --images: the report. Default, here: PLACE.evaluation.json; by another protocol than photos "
            "PLACE.NAME.evaluation.json.",
        ),
    ] = None,
    all_scores: Annotated[
        bool, typer.Option("--all", help="Print all scores. Without it: the distance that leads, recall and copies.")
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Score a trained run, or images that others made.

    A run is judged by its protocol, next to what a perfect sampler would have: new real images.

    With --images: judge what another repository, a stock pipeline or a GAN made; dumo compare takes the report next to
    those of runs that the same protocol judged: dumo evaluate --images samples.npz --against photos.
    Under torchrun (torchrun --nproc-per-node 2 -m dumo evaluate RUN) the ranks share the work.

    Example:  dumo evaluate runs/digits
    """
    if images is not None:
        run_options = (run_folder, nfe, seed, solver, weights)
        if any(option is not None for option in run_options):
            raise typer.BadParameter("images are made already: --images goes with --protocol, --against, --set, --out")
        _judge_images(
            images,
            protocol=protocol,
            against=against,
            fields=set_ or [],
            file=file,
            device=device,
            as_json=as_json,
            all_scores=all_scores,
        )
        return
    if run_folder is None:
        raise typer.BadParameter("name a run's folder; or, with --protocol, --against and --out, images by --images")
    if protocol:
        setting = shell_settings(f"evaluate.protocol.kind={protocol}")
        raise typer.BadParameter(f"--protocol is for --images; of a run: {setting}")
    if against or file:
        raise typer.BadParameter("--against and --out are for --images: a run is compared with its own data")

    from dumo.report import evaluate
    from dumo.run.weights import open_run
    from dumo.runtime import dist
    from dumo.runtime.progress import no_bar

    with dist.join():
        is_main = dist.is_main()
        opened = open_run(run_folder, set_ or [], weights=weights, device=device)
        report = evaluate.evaluate(
            opened,
            nfe=parse_integers(nfe, "--nfe"),
            seed=seed,
            solver=solver,
            bar=bar if is_main else no_bar,
        )
    if is_main:
        _show_report(report, as_json=as_json, all_scores=all_scores)


def _judge_images(
    images: str,
    *,
    protocol: str | None,
    against: str | None,
    fields: list[str],
    file: Path | None,
    device: str,
    as_json: bool,
    all_scores: bool,
) -> None:
    """Judge images that others made, and print the scores. The arguments are the options of `evaluate`."""
    from dumo.report import images as image_report
    from dumo.runtime import dist
    from dumo.runtime.progress import no_bar

    with dist.join():
        is_main = dist.is_main()
        report = image_report.judge(
            images,
            protocol or image_report.DEFAULT_KIND,
            against=against,
            fields=fields,
            out=file,
            device=device,
            bar=bar if is_main else no_bar,
        )
    if is_main:
        _show_report(report, as_json=as_json, all_scores=all_scores)


def _show_report(report: dict[str, Any], *, as_json: bool, all_scores: bool) -> None:
    """Print an evaluation: a table of scores, the baselines, the verdict, and the report's file.

    Without `all_scores` the table has the scores of the summary alone.
    """
    from dumo.report import score

    if as_json:
        print(json.dumps(report))
        return
    rows = [*report["results"], *report["contrast"]]
    columns = None
    if not all_scores:
        names = score.score_names(rows[0], report.get("card") or {})
        columns = score.summary_names(names)
        rows = [score.select_scores(row, columns) for row in rows]
    judged = report["images"] if "images" in report else f"{report['run']} at step {report['step']:,}"
    show_table(f"{judged}, protocol {report['protocol']}", rows)
    for line in score.terminal_lines(report, columns):
        out.print(line, soft_wrap=True)
    out.print(report["file"], soft_wrap=True)
