"""How dumo was entered, by the command line or from Python, and what options are called there.

A message that names an option asks this file for its words: `option` for one, `settings` for fields of a run,
`train_call` for going on with a run. The command line enters `command_line`; everybody else is Python. Who trains a run
enters `naming_code`. `program` is what starts dumo in a shell, and `program_words` say how it was started.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dumo.runtime import shell_path

_PYTHON_NAMES = {"from": "step"}  # the one argument of Python that is not called as the option is
at_command_line = False  # whether `command_line` is entered
_trains_own_code = False  # whether the run that is trained names code of the user's: see `naming_code`


@contextmanager
def command_line() -> Generator[None, None, None]:
    """Inside, messages name options as one types them in a shell."""
    global at_command_line
    before = at_command_line
    at_command_line = True
    try:
        yield
    finally:
        at_command_line = before


@contextmanager
def naming_code(yes: bool) -> Generator[None, None, None]:
    """Inside, a run is trained that names code which runs only after consent, if `yes`: `train_call` gives it."""
    global _trains_own_code
    before = _trains_own_code
    _trains_own_code = yes
    try:
        yield
    finally:
        _trains_own_code = before


def is_on_several_nodes() -> bool:
    """Whether torchrun started this process on several nodes, whose commands are not known."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") != "1"


def program() -> str:
    """What starts dumo in a shell: its name, or this script's path where a shell finds no dumo by it, or another."""
    script = Path(sys.argv[0])
    if script.name != "dumo" or not script.is_file():  # Python, or `python -m dumo`
        return "dumo"
    on_path = shutil.which("dumo")
    return "dumo" if on_path and script.samefile(on_path) else sys.argv[0]


def program_words() -> list[str]:
    """How this program was started, in words for a shell: dumo, or torchrun with the ranks of this machine.

    On several nodes, what follows the options of torchrun.
    """
    if "WORLD_SIZE" not in os.environ:
        return [program()]
    if is_on_several_nodes():
        return ["-m", "dumo"]
    return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", "dumo"]


def option(name: str, value: str | float | None = None) -> str:
    """An option with its value, or alone: `--out x` or `out="x"`, `--out` or `out=`; of a flag `--accept`, with True.

    `name` is that of the command line, without dashes: "trust-code".
    """
    if isinstance(value, float):
        number = f"{value:g}"
        return f"--{name} {number}" if at_command_line else f"{name}={number}"
    if at_command_line:
        has_value = value is not None and not isinstance(value, bool)
        return f"--{name} {value}" if has_value else f"--{name}"
    argument = _PYTHON_NAMES.get(name, name).replace("-", "_")
    if value is None:
        return f"{argument}="
    return f'{argument}="{value}"' if isinstance(value, str) else f"{argument}={value}"


def settings(*texts: str) -> str:
    """Fields of a run, each `a.b=c` with YAML after the sign: `--set a.b=c`, or `changes={"a.b": c}`."""
    if at_command_line:
        return shell_settings(*texts)
    return f"changes={_python_fields(texts)}"


def shell_settings(*texts: str) -> str:
    """Fields of a run as `settings` takes them, for a command that is typed in a shell whichever door was taken."""
    return " ".join(f"--set {shlex.quote(text)}" for text in texts)


def train_call(
    folder: Path,
    texts: Sequence[str] = (),
    *,
    step: int | None = None,
    minutes: float | None = None,
    accept: bool = False,
    out: str | None = None,
) -> str:
    """How to go on with the run in a folder: with these fields (`a.b=c`), from the checkpoint of a step, for minutes.

    With `out`, how to begin a new run of its settings in that folder.
    Modules and arrays that Python gave are left to the reader.
    """
    if at_command_line:
        words = [shlex.join(program_words()), "train", shell_path(folder)]
        if out is not None:
            words.append(option("out", out))
        if _trains_own_code:
            words.append(option("trust-code", True))
        if accept:
            words.append(option("accept", True))
        if step is not None:
            words.append(option("from", step))
        if minutes is not None:
            words.append(option("minutes", f"{minutes:g}"))
        if texts:
            words.append(settings(*texts))
        command = " ".join(words)
        return f"on every node, after the options of torchrun:  {command}" if is_on_several_nodes() else command
    arguments = [f'"{folder}"']
    if texts:
        arguments.append(_python_fields(texts))
    if out is not None:
        arguments.append(option("out", out))
    if step is not None:
        arguments.append(f"step={step}")
    if minutes is not None:
        arguments.append(f"minutes={minutes:g}")
    if accept:
        arguments.append(option("accept", True))
    if _trains_own_code:
        arguments.append(option("trust-code", True))
    return f"dumo.train({', '.join(arguments)})"


def goes_on_line(folder: Path, minutes: float) -> str:
    """What to say where minutes were given to propose a run, and the folder holds one already, which goes on."""
    return f"{folder} goes on as it began. For more time:  {train_call(folder, minutes=minutes)}"


def _python_fields(texts: Sequence[str]) -> str:
    """Texts `a.b=c` as a dict of Python."""
    items: list[str] = []
    for text in texts:
        field, _, value = text.partition("=")
        items.append(f'"{field}": {_python_value(value)}')
    return "{" + ", ".join(items) + "}"


def _python_value(text: str) -> str:
    """A value of YAML as Python writes it; `...`, which stands for any, stays."""
    if text == "...":
        return text
    for number in (int, float):  # which read 1e-3, too; YAML does not
        try:
            return repr(number(text))
        except ValueError:
            continue
    import yaml

    value = yaml.safe_load(text)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
