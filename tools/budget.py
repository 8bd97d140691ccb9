"""How big the house is, next to what budgets.toml allows: `make check` fails where a figure is over its budget.

python tools/budget.py [--lower]    # --lower: write lower figures into budgets.toml, so that none grows again
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGETS, SRC = ROOT / "budgets.toml", ROOT / "src/dumo"
LAB = ("lab", "reproduce", "bench")  # rooms of experiments
HELD = {"Run", "Tree", "RunFolder"}  # what a room should not take whole
NAMES = {"told", "asked", "named", "opened"}  # participles that name no thing
WORDS = ("told", "beside", "so many", "in the place of", "whence")
DIGITS = """
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from tempfile import TemporaryDirectory
from dumo import cli
from dumo.io.yaml import parse

def call(*words):
    sys.argv = ["dumo", *words]
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()):
        assert not cli.exit_code()
    return out.getvalue()

def leaves(tree):
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return sum(map(leaves, inner)) if inner else 1

with TemporaryDirectory() as folder:
    small = ("net.width=32", "net.depth=1", "net.attention=2", "train.batch=16", "train.steps=1")
    call("train", "digits", "--out", f"{folder}/run", *(w for s in small for w in ("--set", s)))
print(sum(name.split(".")[0] == "dumo" for name in sys.modules))
print(leaves(parse(call("show", "digits", "--yaml"))))
"""


def texts(folder: Path, pattern: str = "*.py") -> dict[Path, str]:
    """Every file's text."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob(pattern))}


def lines(found: dict[Path, str]) -> int:
    """Of all files together."""
    return sum(text.count("\n") for text in found.values())


def called(node: ast.expr | None) -> str:
    """The last name of what is called, or of what stands there uncalled."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def functions(nodes: list[ast.AST]) -> Iterator[ast.FunctionDef]:
    """All functions and methods."""
    return (node for node in nodes if isinstance(node, ast.FunctionDef))


def held(function: ast.FunctionDef) -> bool:
    """Whether a parameter is a whole run."""
    own = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotated = (ast.walk(arg.annotation) for arg in own if arg.annotation)
    return any(isinstance(node, ast.Name) and node.id in HELD for nodes in annotated for node in nodes)


def figures() -> dict[str, int]:
    """Every figure by its name in budgets.toml."""
    src, prose = texts(SRC), "\n".join(texts(SRC).values())
    lab = {path: text for path, text in src.items() if path.relative_to(SRC).parts[0] in LAB}
    nodes = [node for text in src.values() for node in ast.walk(ast.parse(text))]
    raised = [called(node.exc) for node in nodes if isinstance(node, ast.Raise)]
    decorators = [called(one) for function in functions(nodes) for one in function.decorator_list]
    pages = [*texts(ROOT / "docs", "*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    rooms = {path.relative_to(SRC).parts[0] for path in src}
    modules, leaves = subprocess.run(
        [sys.executable, "-c", DIGITS], env={**os.environ, "PYTHONPATH": str(SRC.parent), "OMP_NUM_THREADS": "1"},
        check=True, text=True, stdout=subprocess.PIPE,
    ).stdout.split()  # fmt: skip
    count: Callable[[str], int] = lambda words: len(re.findall(rf"\b{words}\b".replace(" ", r"\s+"), prose))  # noqa: E731
    return {
        "lines of src": lines(src),
        "files of src": len(src),
        "lines of the lab": lines(lab),
        "files of the lab": len(lab),
        "lines of tests": lines(texts(ROOT / "tests")),
        "lines of tools": lines(texts(ROOT / "tools")),
        "lines of the longest file of src": max(text.count("\n") for text in src.values()),
        "rooms, folders and files at the top of src": len(rooms),
        "words of docs": sum(len(page.read_text(encoding="utf-8").split()) for page in pages),
        "raises of UserError and ValueError": sum(name in ("UserError", "ValueError") for name in raised),
        "validators": sum(name in ("model_validator", "field_validator") for name in decorators),
        "exclude_if": prose.count("exclude_if="),
        "signatures that take a whole run": sum(map(held, functions(nodes))),
        "functions named by a participle": sum(one.name in NAMES for one in functions(nodes)),
        **{f"'{words}' in src": count(words) for words in WORDS},
        "leaves of digits as shown": int(leaves),
        "modules that a run of digits imports": int(modules),
    }


def main(*options: str) -> int:
    """Print the table; 1 where a figure is over its budget, or has none."""
    budgets, now = tomllib.loads(BUDGETS.read_text(encoding="utf-8")), figures()
    for name in budgets | now:
        figure, budget = now.get(name), budgets.get(name)
        verdict = ""
        if figure is None or budget is None:
            verdict = "no such figure" if figure is None else "NO BUDGET"
        elif figure != budget:
            verdict = f"OVER by {figure - budget}" if figure > budget else f"lower the budget to {figure}"
        print(f"{name:45} {figure!s:>7} {budget!s:>7}  {verdict}".rstrip())
    if "--lower" in options:
        text = BUDGETS.read_text(encoding="utf-8")
        for name, figure in now.items():
            if figure < budgets.get(name, figure):
                text = text.replace(f'"{name}" = {budgets[name]}', f'"{name}" = {figure}')
        BUDGETS.write_text(text, encoding="utf-8")
    return int(budgets.keys() != now.keys() or any(now[name] > budgets[name] for name in now))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
