"""What several commands share: types of options, `with_trust_code`, and parsers of option values.

Types come first (`Source`, `Set`, `Nfe` ...): an annotation by one gives a command that option, with its help.
`with_trust_code` adds --trust-code to a command. The parsers raise typer's BadParameter, or UserError.
"""

import re
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dumo.config import recipes
from dumo.io import trained

if TYPE_CHECKING:
    from dumo.config.conditions import Conditions


READS_A_RUN = {"source", "run_folder"}  # the parameters of a command that may name a run


def _complete_source(text: str) -> list[str]:
    """The recipes and runs of dumo's whose names begin with `text`. Where there is none, the shell completes files."""
    return [name for name in (*recipes.names(), *trained.names()) if name.startswith(text)]


def _complete_run(text: str) -> list[str]:
    """The runs of dumo's whose names begin with `text`. Where there is none, the shell completes files."""
    return [name for name in trained.names() if name.startswith(text)]


Source = Annotated[
    str,
    typer.Argument(
        help="A recipe's name (see dumo recipes), a YAML file, a run's folder, or a trained run of dumo's, such as "
        "digits-trained.",
        autocompletion=_complete_source,
    ),
]
SourceOrImages = Annotated[
    str,
    typer.Argument(
        help="A recipe's name (see dumo recipes), a YAML file, a run's folder, or a folder of images.",
        autocompletion=_complete_source,
    ),
]
Folder = Annotated[
    str,
    typer.Argument(
        help="A run's folder: runs/digits, or digits-trained or cifar10-trained, which dumo brings.",
        autocompletion=_complete_run,
    ),
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
    bool,
    typer.Option(
        "--verify",
        help="Hash every image first, and compare with what the run was trained on, or the cache made of.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the code that the file or folder of a run names (module:Class).")
]


def with_trust_code(command: Callable[..., None]) -> Callable[..., None]:
    """Add --trust-code to a command that reads a run (`dumo.config.trust`). Others are returned as they are."""
    command_signature = signature(command)
    if not READS_A_RUN & command_signature.parameters.keys():
        return command

    @wraps(command)
    def command_with_flag(*words: object, trust_code: bool = False, **options: object) -> None:
        from dumo.config.trust import trusting

        with trusting(trust_code):
            command(*words, **options)

    # typer reads the options from here
    flag = Parameter("trust_code", Parameter.KEYWORD_ONLY, default=False, annotation=TrustCode)
    new_signature = command_signature.replace(parameters=[*command_signature.parameters.values(), flag])
    command_with_flag.__signature__ = new_signature  # pyright: ignore[reportAttributeAccessIssue]
    command_with_flag.__annotations__ = {**command.__annotations__, flag.name: TrustCode}
    return command_with_flag


def parse_path(text: str) -> Path:
    """A file or folder, which need not be there.

    Raises BadParameter for an empty name, which `Path` would take for the current folder, and for a null byte.
    """
    if not text or "\0" in text:
        raise typer.BadParameter(f"{text!r} is no path: name a file or folder")
    return Path(text)


def parse_classes(text: str | None, conditions: "Conditions") -> list[int] | None:
    """'cats,2' as the numbers of these classes; None stays None. Raises UserError for a name that is no class."""
    if text is None:
        return None
    return [conditions.index(label) for label in text.split(",")]


def parse_integers(text: str | None, option: str) -> list[int] | None:
    """'1,2,4' as [1, 2, 4]; None stays None. Raises BadParameter, which names the option, for anything else."""
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of whole numbers such as 1,2,4", param_hint=option) from None


def parse_bytes(text: str, option: str) -> int:
    """'24GiB' as bytes. Raises BadParameter, which names the option, for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"'{text}' is no size such as 24GiB or 80GB", param_hint=option)
    number, letter, binary = match.groups()
    base = 1024 if binary else 1000
    power = "KMGT".index(letter.upper()) + 1
    return int(float(number) * base**power)
