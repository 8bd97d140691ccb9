"""The command `evaluate`: score a trained run, or images that others made."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dumo.cli.option import (
    AsJson,
    Device,
    Nfe,
    SamplingOverrides,
    Seed,
    SolverName,
    TrustCode,
    Weights,
    parse_integers,
)
from dumo.cli.terminal import out, show_table
from dumo.runtime.progress import bar


def evaluate(
    run_folder: Annotated[
        str | None,
        typer.Argument(help="A run's folder, such as runs/digits, or digits-trained. Omit it with --images."),
    ] = None,
    overrides: SamplingOverrides = None,
    nfe: Nfe = None,
    seed: Seed = None,
    solver: SolverName = None,
    weights: Weights = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Evaluate existing images instead of a run: a folder (subfolders are classes), an .npz in ADM's "
            "layout, or parquet or tar shards. Images are not resized.",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --images: photos (default), cifar10-features, digits; by Inception's features folder, "
            "cifar10-train50k, adm-imagenet256-50k, adm-imagenet512-50k; by evaluate.protocol.model=NAME, a model of "
            "the Hub or a folder, dinov2, cmmd.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="With --images: the real images to compare with: a folder, resized as in training; an .npz; ADM's "
            "file for adm-*.",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            dir_okay=False,
            metavar="FILE",
            help="With --images: the report. Default: PATH.evaluation.json in the current directory.",
        ),
    ] = None,
    all_scores: Annotated[
        bool, typer.Option("--all", help="Print all scores, not only the main distance, recall and copies.")
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Score a trained run or existing images.

    A run is evaluated with its protocol, evaluate.protocol. The score of a perfect sampler, which is that of new real
    images, is shown for comparison. --images evaluates samples of another repository, a standard pipeline or a GAN;
    dumo compare accepts the report together with runs of the same protocol.

    Under torchrun (torchrun --nproc-per-node 2 -m dumo evaluate RUN) the ranks share the work.

    Examples:
    dumo evaluate runs/digits --nfe 1,2
    dumo evaluate --images samples.npz --against photos
    """
    # With --images there is no run, and every word is an override.
    if images is not None and run_folder is not None and "=" in run_folder:
        overrides = [run_folder, *(overrides or [])]
        run_folder = None

    # Refuse options of the other use, which would otherwise be ignored.
    if images is not None and any((run_folder, nfe, seed is not None, solver, weights)):
        raise typer.BadParameter("--images evaluates existing images: remove RUN, --nfe, --seed, --solver, --weights")
    if images is None and (protocol or against or file):
        raise typer.BadParameter("--protocol, --against and --out need --images: for a run, set evaluate.protocol")

    from dumo.report import evaluate_images as image_report
    from dumo.report import evaluation, score
    from dumo.run.weights import load_run
    from dumo.runtime import dist

    with dist.join():
        is_main = dist.is_main()
        if images is not None:
            report = image_report.judge(
                images,
                protocol or image_report.DEFAULT_KIND,
                against=against,
                fields=overrides or [],
                out=file,
                device=device,
                bar=bar,
            )
        elif run_folder is not None:
            trained = load_run(run_folder, overrides or [], weights=weights, device=device)
            passes = parse_integers(nfe, "--nfe")
            report = evaluation.evaluate(trained, nfe=passes, seed=seed, solver=solver, bar=bar)
        else:
            raise typer.BadParameter("no run to evaluate: give a run's folder, or images with --images")
    if not is_main:
        return
    if as_json:
        print(json.dumps(report))
        return

    # Print the scores as a table, then the baselines, the verdict, and the report's file.
    rows = [*report["results"], *report["contrast"]]
    columns = None
    if not all_scores:
        columns = score.summary_names(score.score_names(rows[0], report.get("card") or {}))
        rows = [score.select_scores(row, columns) for row in rows]
    judged = report["images"] if "images" in report else f"{report['run']} at step {report['step']:,}"
    show_table(f"{judged}, protocol {report['protocol']}", rows)
    for line in score.terminal_lines(report, columns):
        out.print(line, soft_wrap=True)
    out.print(report["file"], soft_wrap=True)
