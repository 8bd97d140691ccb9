"""Arguments and options that several commands take."""

import re
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dumo.config import recipes

if TYPE_CHECKING:
    from dumo.config.conditions import Conditions


def complete(text: str) -> list[str]:
    """The recipes with names that begin so, for the shell to complete; of none it completes files."""
    return [name for name in recipes.names() if name.startswith(text)]


NAMED = "A recipe's name (see dumo recipes), a YAML file, "
Source = Annotated[str, typer.Argument(help=f"{NAMED}or a run's folder.", autocompletion=complete)]
SourceOrImages = Annotated[
    str, typer.Argument(help=f"{NAMED}a run's folder, or a folder of images.", autocompletion=complete)
]
Folder = Annotated[
    str, typer.Argument(help="A run's folder: runs/digits, or digits-trained or cifar10-trained, which dumo brings.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Set a field, e.g. --set train.steps=2000. May be given many times."),
]
Nfe = Annotated[str | None, typer.Option("--nfe", help="Passes through the net, e.g. 1,2,4. Default: the run's own.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the sampling noise. Default: the run's own.")]
SolverName = Annotated[
    str | None,
    typer.Option(
        "--solver",
        help="euler, heun (velocity), restart (endpoint), hop (flow map), hermite (both heads).",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Prompts: a .txt, one a line; a .jsonl with a prompt a line; a folder of .txt."),
]
Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu, cuda, cuda:1 ...")]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Other weights than the run's first average: a safetensors file.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Read all images first, and compare what is in them with what it was.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]

TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the code that the file or folder of a run names (module:Class).")
]


def trusted(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with --trust-code where it reads a run (`dumo.config.trust`)."""
    command_signature = signature(command)
    if not command_signature.parameters.keys() & {"source", "run_folder"}:
        return command

    @wraps(command)
    def run(*words: object, trust_code: bool = False, **options: object) -> None:
        from dumo.config.trust import trusting

        with trusting(trust_code):
            command(*words, **options)

    trust_code_option = Parameter("trust_code", Parameter.KEYWORD_ONLY, default=False, annotation=TrustCode)
    parameters = [*command_signature.parameters.values(), trust_code_option]
    run.__signature__ = command_signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue], typer reads it
    run.__annotations__ = {**command.__annotations__, trust_code_option.name: TrustCode}
    return run


def place(text: str) -> Path:
    """A folder, which need not be there. An empty name would be the one we are in."""
    if not text or "\0" in text:
        raise typer.BadParameter("it is no name: give a folder, or leave it out")
    return Path(text)


def class_numbers(text: str | None, conditions: "Conditions") -> list[int] | None:
    """'cats,2' as the numbers of these classes. Raises UserError for one that is none."""
    return None if text is None else [conditions.index(part) for part in text.split(",")]


def numbers(option: str, text: str | None) -> list[int] | None:
    """'1,2,4' as [1, 2, 4]."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of whole numbers such as 1,2,4", param_hint=option) from None


def size(text: str) -> int:
    """'24GiB' as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"'{text}' is no size such as 24GiB or 80GB", param_hint="--fit")
    number, letter, binary = match.groups()
    base = 1024 if binary else 1000
    power = "KMGT".index(letter.upper()) + 1
    return int(float(number) * base**power)
