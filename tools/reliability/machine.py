"""Put the command line on bad machines: it recovers or says why not, and harms nothing that is good.

    python tools/reliability/machine.py [--only NAME,NAME] [--json FILE]

The cases are those of `fault.py`: a disk that is full or read-only (a small tmpfs, which takes the right to mount), no
home, few file descriptors, no memory, processes that die or hang, files that vanish or break under a training, two
trainings in one folder, a clock that jumps. Each has a folder of its own, and goes in this order (`result.py`):

1. Under the fault, what is refused ends with exit code 1 or 2, a line that names the thing, and no traceback.
2. What lay there before still does, to the byte.
3. Once the fault is over, the same command comes to the end of an undisturbed one, to the bit.

The exit code is 1 if anything is otherwise.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from reliability.fault import FAULTS
from reliability.result import CaseResult, CaseSkipped
from reliability.workload import INPUTS, prepared_folder


def try_case(name: str, scratch: Path) -> CaseResult:
    """Try one case in a new folder below `scratch`, which has INPUTS. An error becomes a problem of its result."""
    folder = scratch / name.replace(" ", "-")
    result = CaseResult(name)
    began = time.monotonic()
    folder.mkdir()
    (folder / INPUTS).symlink_to(scratch / INPUTS)
    try:
        FAULTS[name](folder, result)
    except CaseSkipped as reason:
        result.skip_reason = str(reason)
    except Exception as error:  # the next case may go well
        result.problems.append(f"{type(error).__name__}: {error}")
    result.seconds = round(time.monotonic() - began, 1)
    return result


def markdown_table(results: Sequence[CaseResult]) -> str:
    """A table with a row for each case."""
    header = ["case", "exit codes", "what it says", "good files changed", "afterwards", "as it should", "seconds"]
    lines = [header, ["---"] * len(header)]
    lines += [_cells(result) for result in results]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(result: CaseResult) -> list[str]:
    """A case's row in the table: a text for each column."""
    exit_codes = [str(exit_code) for exit_code in dict.fromkeys(result.exit_codes)]
    first_message = result.messages[0] if result.messages else "-"
    changed = f"{result.num_changed} of {result.num_watched}" if result.num_watched else "-"
    if result.skip_reason:
        verdict = f"left out: {result.skip_reason}"
    elif result.problems:
        verdict = "; ".join(result.problems)
    else:
        verdict = "yes"
    return [
        result.name,
        ", ".join(exit_codes) or "-",
        first_message.replace("|", "\\|"),
        changed,
        result.recovery or "-",
        " ".join(verdict.split()),  # in one line
        f"{result.seconds:.0f}",
    ]


def main(
    only: Annotated[str | None, typer.Option(help="Names of cases, by commas. Default: all.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what came out here, too.")] = None,
) -> None:
    """Go through the cases; print a table."""
    names = only.split(",") if only else [*FAULTS]
    results: list[CaseResult] = []
    with prepared_folder() as scratch:
        for name in names:
            results.append(try_case(name, scratch))
            print(markdown_table(results).splitlines()[-1], flush=True)

    num_skipped = sum(bool(result.skip_reason) for result in results)
    print(f"\n{markdown_table(results)}\n\n{len(results) - num_skipped} cases, {num_skipped} left out")
    if json_file:
        rows = [result.to_json() for result in results]
        json_file.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    raise typer.Exit(any(result.problems for result in results))


if __name__ == "__main__":
    typer.run(main)
