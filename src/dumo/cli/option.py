"""Options that several commands share, and parsers of their values.

A type (`Source`, `Set`, `Nfe` ...) gives a command that argument or option, with its help. A parser turns text into a
value, and raises typer's BadParameter or UserError.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dumo.config import recipe_files
from dumo.config.label import split_labels
from dumo.io import run_places

if TYPE_CHECKING:
    from dumo.config.conditions import Conditions


def _complete_source(text: str) -> list[str]:
    """Return the recipes and shipped runs whose names begin with `text`. If there is none, the shell lists files."""
    return [name for name in (*recipe_files.names(), *run_places.names()) if name.startswith(text)]


def _complete_run(text: str) -> list[str]:
    """Return the shipped runs whose names begin with `text`. If there is none, the shell lists files."""
    return [name for name in run_places.names() if name.startswith(text)]


def _trust_code(context: typer.Context, trust_code: bool) -> bool:
    """Trust the code that runs name until the command ends, so that no command has to pass its consent on."""
    from dumo.config.trust import trusting

    context.with_resource(trusting(trust_code))
    return trust_code


Source = Annotated[
    str,
    typer.Argument(
        help="A recipe's name (dumo recipes), a YAML file, a run's folder, or digits-trained or cifar10-trained.",
        autocompletion=_complete_source,
    ),
]
SourceOrImages = Annotated[
    str,
    typer.Argument(
        help="A recipe's name (dumo recipes), a YAML file, a run's folder, or images: a folder, parquet, tar, a name "
        "on the Hugging Face Hub.",
        autocompletion=_complete_source,
    ),
]
Folder = Annotated[
    str,
    typer.Argument(
        help="A run's folder, such as runs/digits; digits-trained and cifar10-trained ship with dumo.",
        autocompletion=_complete_run,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=VALUE",
        help="Fields to set, such as net.width=96 (dumo show SOURCE --all lists them). Short: steps, lr, batch, seed, "
        "minutes; a kind alone: objective=meanflow.",
    ),
]
SamplingOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE", help="Fields of sample or evaluate to set, such as sample.solver.m=0.3."),
]
Nfe = Annotated[
    str | None,
    typer.Option("--nfe", help="Numbers of function evaluations, e.g. 1,2,4."),
]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", help="Seed of the sampling noise.")]
SolverName = Annotated[
    str | None,
    typer.Option(
        "--solver",
        help="euler, heun, restart, hop or hermite.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A .txt or .jsonl file, one prompt per line, or a folder of .txt."),
]
Device = Annotated[
    str, typer.Option(show_default=False, help="cpu, cuda, cuda:1 ... Default: the GPU, if there is one.")
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="FILE", help="A safetensors file. Default: the first EMA, last checkpoint."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        callback=_trust_code,
        help="Run the code that a run names (module:Class).",
    ),
]


def parse_classes(text: str | None, conditions: "Conditions") -> list[int] | None:
    """Return the numbers of classes such as 'cats,2', or None for None. Raises UserError for an unknown class."""
    if text is None:
        return None
    return [conditions.index(label) for label in split_labels(text, conditions.names)]


def parse_integers(text: str | None, option: str) -> list[int] | None:
    """Return '1,2,4' as [1, 2, 4], or None for None. Raises BadParameter, which names the option, for other text."""
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of integers such as 1,2,4", param_hint=option) from None
