"""Change files so that they still look whole, and print what dumo says of each (docs/guarantees.md).

    python tools/reliability/harm.py

The cases, and what must come of them, are those of tests/e2e/harm.py. Exit code 1 if anything is otherwise.
"""

import os
import re
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

LONG = 120  # letters of what is said
HEAD = "| what | what happened to it | the next command | ends | and says, of the first |\n|---|---|---|---|---|"


def how(case: Harm) -> str:
    """How the command ends."""
    return "undisturbed, to the bit" if case.harmless else "from the checkpoint before" if case.older else "refused"


def said(ended: Done) -> str:
    """The line that names it, without the folder that we are in."""
    found = [line for line in ended.err.splitlines() if line.startswith(("error: ", "warning: "))]
    text = re.sub(r"\|", r"\\|", found[0].replace(f"{Path.cwd()}/", "")) if found else ""
    return f"`{text[:LONG]}{'...' * (len(text) > LONG)}`" if text else ""


def table(met: Sequence[tuple[Harm, Done]]) -> str:
    """A row for each artifact and each way to end."""
    groups = dict[tuple[str, str], list[tuple[Harm, Done]]]()
    for case, ended in met:
        groups.setdefault((case.artifact, how(case)), []).append((case, ended))
    rows = [HEAD]
    for (artifact, ends), group in groups.items():
        damages = ", ".join(dict.fromkeys(case.damage for case, _ in group))
        commands = ", ".join(dict.fromkeys(f"`{case.words[0]}`" for case, _ in group))
        rows.append(f"| {artifact} | {damages} | {commands} | {ends} | {said(group[0][1])} |")
    return "\n".join(rows)


def main() -> None:
    """Each case in turn."""
    warnings.simplefilter("default")
    met, wrong = list[tuple[Harm, Done]](), 0
    with TemporaryDirectory() as folder:
        here, spare = Path(folder) / "here", Path(folder) / "spare"
        here.mkdir()
        os.chdir(here)
        harm.furnish()
        shutil.copytree(here, spare)
        for case in harm.cases():
            try:
                met.append((case, harm.meet(case)))
            except AssertionError as error:
                wrong += 1
                print(f"WRONG: {case.artifact}, {case.damage}, {' '.join(case.words)}: {error}", file=sys.stderr)
            harm.restore(here, spare)
        print(table(met))
    print(f"{len(met)} as they must be, {wrong} not", file=sys.stderr)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
