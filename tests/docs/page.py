"""What the pages have people type. Tests run the blocks that say `sh`. Those that say `bash`, which need a GPU, weights
or hours, and commands within a sentence are only parsed.
"""

import re
import shlex
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ALL = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in ALL if page.name != "log.md" and "adr" not in page.parts]  # which have people type
LOOP = re.compile(r"for (?P<name>\w+) in (?P<values>[^;]+); do")
INLINE = re.compile(r"`((?:dumo|torchrun) [^`]*)`")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def lines(page: Path, language: str) -> list[str]:
    """The lines of these blocks, continued ones joined, without comments."""
    text = "".join(blocks(page, language)).replace("\\\n", "")
    return [line for line in text.splitlines() if line.strip() and line[0] != "#"]


def unrolled(typed: list[str]) -> list[str]:
    """The lines as a shell runs them: what is between `for NAME in VALUES; do` and `done`, once for each value."""
    found: list[str] = []
    rest = iter(typed)
    for line in rest:
        loop = LOOP.fullmatch(line)
        if loop is None:
            found.append(line)
            continue
        body = list(takewhile(lambda inside: inside != "done", rest))
        for value in loop["values"].split():
            found += [inside.replace(f"${loop['name']}", value) for inside in body]
    return found


def dumos(typed: list[str]) -> list[list[str]]:
    """The words after `dumo` of each line or part of a line that has it."""
    pieces = [piece for line in typed if "dumo" in line and "..." not in line for piece in line.split(" && ")]
    words = [shlex.split(piece.partition(" >")[0], comments=True) for piece in pieces]
    words = [own[1:] if own[:1] == ["PYTHONPATH=."] else own for own in words]
    return [own[own.index("dumo") + 1 :] for own in words if "dumo" in own and own[0] in ("dumo", "torchrun")]


def inline(page: Path) -> list[str]:
    """Commands in sentences and tables."""
    return INLINE.findall(page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """What stands between single backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)
