"""How the code reads, next to peers: `make check` prints it at its end.

    python tools/mirror.py [BASE]

Figures are of the files on disk. With BASE, a commit, they stand next to that commit's, and up to ten lines of src that
BASE did not have and that carry several thoughts are shown. Without BASE it is the commit at which this branch left
origin/main, where there is one. No figure fails. The exit code is 0; 2 if BASE is no commit.
"""

import ast
import io
import subprocess
import sys
import tarfile
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).parents[1]
SHOWN_LINES = 10
SHOWN_CHARACTERS = 100
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Names that do not say what the thing is, ours to unlearn: peers have none
EMPTY_NAMES = {
    "about", "asked", "both", "done", "few", "found", "given", "gone", "held", "here", "how", "kept", "known",
    "lacking", "lacks", "left", "made", "many", "mine", "more", "odd", "of", "one", "others", "ours", "own", "put",
    "said", "same", "so", "some", "taken", "theirs", "then", "there", "told", "wanted", "way", "ways", "what",
    "where", "whole", "whose", "why", "wrong",
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """How a package reads. A line of code is one that is neither empty nor a comment."""

    tokens: int  # comments left out, a docstring as one, as Python 3.11 cuts them
    tokens_per_line: float
    lines: int
    files: int
    function_p90: int  # lines; nine of ten functions have at most so much
    function_max: int
    packed: float  # assignments of a tuple to a tuple, per 1,000 lines of code
    conditions: float  # `a if b else c`, per 1,000 lines of code
    comprehensions: float  # per 1,000 lines of code
    empty_names: float  # percent of all assigned names
    tests_per_src: float  # lines


# Measured by this script in 2026-11: PEFT 0.21.2 and accelerate 1.15.0 as installed, torchtitan b5bcd76 without its
# experiments, diffrax 5ea5fcb; tests by the repositories, of PEFT at 5d602fd, of accelerate at 16cb6eb
PEERS = ("PEFT", "accelerate", "torchtitan", "diffrax")
ROWS = (  # label, field, format, the peers' figures
    ("tokens of src", "tokens", ",d", 277_988, 143_833, 224_460, 63_733),
    ("tokens a line", "tokens_per_line", ".1f", 4.2, 4.0, 4.0, 3.9),
    ("lines", "lines", ",d", 65_900, 36_293, 55_761, 16_468),
    ("files", "files", ",d", 249, 84, 175, 63),
    ("lines of nine functions in ten, at most", "function_p90", ",d", 49, 48, 64, 44),
    ("lines of the longest function", "function_max", ",d", 355, 881, 353, 758),
    ("packed assignments, per 1,000 lines", "packed", ".1f", 2.1, 0.8, 0.8, 0.2),
    ("conditional expressions, per 1,000 lines", "conditions", ".1f", 4.6, 7.2, 5.9, 1.8),
    ("comprehensions, per 1,000 lines", "comprehensions", ".1f", 7.7, 9.2, 7.1, 5.0),
    ("names that say nothing, percent", "empty_names", ".1f", 0.0, 0.0, 0.0, 0.1),
    ("lines of tests per line of src", "tests_per_src", ".2f", 0.80, 0.39, 0.40, 0.46),
)


@cache  # most files are those of BASE
def parse(text: str) -> ast.Module | None:
    """The syntax tree, or None where the text is no Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in strings
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # as ast.parse documents
        return None


def count_tokens(text: str) -> int:
    """Tokens that are neither layout nor comments; 0 where the tokenizer fails, which is stricter than the parser."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return 0
    return sum(token.type not in LAYOUT for token in tokens)


def count_code_lines(text: str) -> int:
    """Lines that are neither empty nor a comment."""
    stripped_lines = [line.strip() for line in text.splitlines()]
    return sum(line != "" and not line.startswith("#") for line in stripped_lines)


def count_lines(texts: Iterable[str]) -> int:
    """Lines of all files."""
    return sum(text.count("\n") for text in texts)


def is_packed(node: ast.AST) -> TypeGuard[ast.Assign]:
    """Whether a statement assigns several values to several names."""
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)


def is_assigned_name(node: ast.AST) -> TypeGuard[ast.Name]:
    """Whether it is a name where something is bound to it."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def contains(node: ast.AST, kinds: type[ast.AST] | tuple[type[ast.AST], ...]) -> bool:
    """Whether a node of these kinds lies inside, the node itself left out."""
    return any(isinstance(inner, kinds) for inner in ast.walk(node) if inner is not node)


def measure(src: Mapping[str, str], tests: Mapping[str, str]) -> Figures:
    """The figures of a package and its tests, texts by path. Files that are no Python are left out."""
    texts: list[str] = []
    nodes: list[ast.AST] = []
    for text in src.values():
        tree = parse(text)
        if tree is not None:
            texts.append(text)
            nodes += ast.walk(tree)
    function_lines = sorted(
        node.end_lineno - node.lineno + 1
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )
    names = [node.id for node in nodes if is_assigned_name(node)]
    tokens = sum(map(count_tokens, texts))
    lines = count_lines(texts)
    thousands = max(1, sum(map(count_code_lines, texts))) / 1000
    return Figures(
        tokens=tokens,
        tokens_per_line=tokens / max(1, lines),
        lines=lines,
        files=len(texts),
        function_p90=function_lines[len(function_lines) * 9 // 10] if function_lines else 0,
        function_max=max(function_lines, default=0),
        packed=sum(map(is_packed, nodes)) / thousands,
        conditions=sum(isinstance(node, ast.IfExp) for node in nodes) / thousands,
        comprehensions=sum(isinstance(node, COMPREHENSIONS) for node in nodes) / thousands,
        empty_names=100 * sum(name in EMPTY_NAMES for name in names) / max(1, len(names)),
        tests_per_src=count_lines(tests.values()) / max(1, lines),
    )


def table_lines(columns: Mapping[str, Figures]) -> Iterator[str]:
    """Lines of a table: a row for each figure, a column for each package, the peers last."""
    yield " " * 42 + "".join(f"{name:>12}" for name in (*columns, *PEERS))
    for label, field, form, *peers in ROWS:
        cells = [getattr(figures, field) for figures in columns.values()]
        yield f"{label:42}" + "".join(f"{cell:>12{form}}" for cell in cells + peers)


def crowded_lines(tree: ast.Module) -> dict[int, set[str]]:
    """The lines that carry several thoughts or a name that says nothing: their numbers, and which of that they do."""
    kinds_by_line: defaultdict[int, set[str]] = defaultdict(set)
    for node in ast.walk(tree):
        if is_packed(node):
            kinds_by_line[node.lineno].add("packed assignment")
        elif isinstance(node, ast.FormattedValue) and contains(node, ast.IfExp):
            kinds_by_line[node.lineno].add("condition in an f-string")
        elif isinstance(node, ast.IfExp) and contains(node, ast.IfExp):
            kinds_by_line[node.lineno].add("condition in a condition")
        elif isinstance(node, COMPREHENSIONS) and contains(node, COMPREHENSIONS):
            kinds_by_line[node.lineno].add("comprehension in a comprehension")
        elif is_assigned_name(node) and node.id in EMPTY_NAMES:
            kinds_by_line[node.lineno].add(f"the name {node.id}")
    return kinds_by_line


def crowded_additions(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Lines that stand nowhere in `before` and carry several thoughts, those with the most kinds first.

    So a line that moved, or was indented, is not an addition.
    """
    old_lines = {line.strip() for text in before.values() for line in text.splitlines()}
    additions: list[tuple[int, str, int, str]] = []
    for path, text in now.items():
        tree = parse(text)
        if tree is None:
            continue
        lines = text.split("\n")
        for number, kinds in crowded_lines(tree).items():
            line = lines[number - 1].strip()
            if line not in old_lines:
                note = f"{path}:{number} ({', '.join(sorted(kinds))}): {line[:SHOWN_CHARACTERS]}"
                additions.append((-len(kinds), path, number, note))
    return [note for *_, note in sorted(additions)]


def read_disk(root: Path, folder: str) -> dict[str, str]:
    """Texts of the Python files in a folder, by their paths from `root`."""
    paths = sorted(path for path in (root / folder).rglob("*.py") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace") for path in paths}


def git(root: Path, *arguments: str) -> bytes | None:
    """Output of git, or None where it fails, and where `root` is no checkout but, say, an unpacked archive."""
    if not (root / ".git").exists():  # git would look in the folders above
        return None
    try:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def read_commit(root: Path, commit: str, folder: str) -> dict[str, str]:
    """Texts of the Python files in a folder of a commit, by their paths; empty where it has no such folder."""
    archive = git(root, "archive", "--format=tar", commit, folder)
    if archive is None:
        return {}
    texts: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for member in members:
            content = members.extractfile(member)  # None of a folder
            if member.name.endswith(".py") and content:
                texts[member.name] = content.read().decode(errors="replace")
    return texts


def find_commit(root: Path, name: str | None) -> str | None:
    """The hash of a commit; without a name, of where this branch left origin/main. None where there is none."""
    if name is None:
        output = git(root, "merge-base", "HEAD", "origin/main")
    else:
        output = git(root, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    return output.decode().strip() if output else None


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Print the mirror. Returns 2 where BASE is no commit, else 0."""
    base = find_commit(root, arguments[0] if arguments else None)
    if arguments and base is None:
        print(f"BASE={arguments[0]} is no commit here: give a hash, a branch or a tag", file=sys.stderr)
        return 2
    src = read_disk(root, "src")
    now = measure(src, read_disk(root, "tests"))
    if base is None:
        print("How src reads, next to peers as of 2026-11.")
        print("\n".join(table_lines({"now": now})))
    else:
        old_src = read_commit(root, base, "src")
        before = measure(old_src, read_commit(root, base, "tests"))
        print(f"How src reads, before ({base[:8]}) and now, next to peers as of 2026-11.")
        print("\n".join(table_lines({"before": before, "now": now})))
        additions = crowded_additions(old_src, src)
        if additions:
            print(f"Of {len(additions)} added lines that carry several thoughts, or a name that says nothing:")
        for note in additions[:SHOWN_LINES]:
            print(f"  {note}")
    for path, text in src.items():
        if parse(text) is None:
            print(f"Not counted: {path} is no Python that {sys.version_info[0]}.{sys.version_info[1]} reads")
    if sys.version_info >= (3, 12):
        print(
            "From Python 3.12 on tokens do not compare with the peers', counted by 3.11: f-strings are cut into parts."
        )
    print("Numbers that fell are good news; for numbers that rose, the commit says why.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
