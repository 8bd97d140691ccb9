"""Change files so that they still look whole, and print what dumo says of each (docs/guarantees.md).

    python tools/reliability/harm.py

The cases, and what must come of them, are those of tests/e2e/harm.py. In this order: `furnish` fills a folder with data
and runs, which is copied; `meet` does a case's harm and runs the command that meets it; `restore` puts the copy back.
At the end there is a table for the page. The exit code is 1 if anything is otherwise than it must be.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from e2e import harm
from e2e.harm import Harm
from e2e.shell import Done

MAX_MESSAGE_CHARS = 120  # of a message in the table: ours
HEADER = "| what | what happened to it | the next command | ends | and says, of the first |\n|---|---|---|---|---|"

CaseEnd = tuple[Harm, Done]  # a case, and how its command ended


def expected_end(case: Harm) -> str:
    """How a case's command must end, in words."""
    if case.harmless:
        return "undisturbed, to the bit"
    if case.older:
        return "from the checkpoint before"
    return "refused"


def message_cell(done: Done) -> str:
    """The first error or warning that a command printed, as a cell of the table; empty where it printed none."""
    for line in done.err.splitlines():
        if not line.startswith(("error: ", "warning: ")):
            continue
        message = line.replace(f"{Path.cwd()}/", "").replace("|", r"\|")
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[:MAX_MESSAGE_CHARS]}..."
        return f"`{message}`"
    return ""


def markdown_table(case_ends: Sequence[CaseEnd]) -> str:
    """A table with a row for each artifact and each way to end."""
    groups: dict[tuple[str, str], list[CaseEnd]] = {}
    for case, done in case_ends:
        groups.setdefault((case.artifact, expected_end(case)), []).append((case, done))
    rows = [HEADER]
    for (artifact, end), group in groups.items():
        damages = ", ".join(dict.fromkeys(case.damage for case, _ in group))
        commands = ", ".join(dict.fromkeys(f"`{case.words[0]}`" for case, _ in group))
        _, first_done = group[0]
        rows.append(f"| {artifact} | {damages} | {commands} | {end} | {message_cell(first_done)} |")
    return "\n".join(rows)


def main() -> None:
    """Go through the cases; print a table."""
    warnings.simplefilter("default")
    case_ends: list[CaseEnd] = []
    num_wrong = 0
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "here"
        spare_folder = Path(scratch) / "spare"
        folder.mkdir()
        os.chdir(folder)
        harm.furnish()
        shutil.copytree(folder, spare_folder)
        for case in harm.cases():
            try:
                case_ends.append((case, harm.meet(case)))
            except AssertionError as error:
                num_wrong += 1
                print(f"WRONG: {case.artifact}, {case.damage}, {' '.join(case.words)}: {error}", file=sys.stderr)
            harm.restore(folder, spare_folder)
        print(markdown_table(case_ends))
    print(f"{len(case_ends)} as they must be, {num_wrong} not", file=sys.stderr)
    sys.exit(num_wrong > 0)


if __name__ == "__main__":
    main()
