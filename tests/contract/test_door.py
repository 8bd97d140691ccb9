"""What Python may reach words its options by `dumo.runtime.door`, so no message tells a notebook to type --accept."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import dumo

ROOT = Path(dumo.__file__).parent
OPTION = re.compile(
    r"--(accept|alone|anyway|count|dtype|from|head|labels|minutes|nfe|out|parts|push|seed|set|source|to|trust-code|weights)\b"
)
COMMAND = re.compile(r"\b(dumo \w+|hf \w+|tensorboard) .*$", re.DOTALL)  # is typed as it stands, wherever one is
# What only commands call: there is nothing of it in Python.
COMMANDS_ALONE = (
    "cli",
    "lab",
    "config/code.py",  # words of commands on a run
    "encoders/part.py",  # words of `hf download`
    "plan/catalogue.py",
    "report/benchmark.py",
    "report/gallery.py",
    "report/images.py",
    "report/sample.py",
    "run/average.py",
    "run/encode.py",
    "runtime/door.py",
)


def messages(file: Path) -> Iterator[str]:
    """The texts in a file's code, without docstrings; of one that is put together what stands in it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docstrings = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(id(node.value))
    parts = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts.update(id(part) for part in node.values)
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | parts:
            yield node.value


def test_no_message_that_python_may_see_names_an_option_of_the_command_line() -> None:
    found: list[str] = []
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if name.startswith(COMMANDS_ALONE):
            continue
        found += [f"{name}: {text}" for text in messages(file) if OPTION.search(COMMAND.sub("", text))]
    assert not found
