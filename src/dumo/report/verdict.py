"""What a benchmark's own evaluator said of a run's images, read back into a report with their card.

GenEval's results.jsonl has a line per image. Its score is the mean of its tasks' shares of correct images
(evaluation/summary_scores.py). DPG-Bench writes a line per picture, `NAME, a, b, c, d, mean`, then the scores by
category; its score is the mean of the means, out of 100 (dpg_bench/compute_dpg_bench.py).

A result is of use where all images were judged, once: their evaluators do not look, this does.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from dumo.config.load import FILE
from dumo.evaluation.protocol import Scores
from dumo.io.file import check_writable
from dumo.io.read import brief, read_text
from dumo.report.benchmark import EACH, LAYOUTS, note, read_note
from dumo.report.card import ReportPart, first_fault
from dumo.report.evaluate import write
from dumo.runtime import typed
from dumo.types import UserError

LINE = re.compile(r"(?P<image>.+\.png)(?P<scores>(?:, \d[\d.eE+-]*)+)")  # of DPG-Bench
TITLE = "DPG-Bench score:"


@dataclass(frozen=True)
class Verdict:
    """What was said: of which files, as paths, and the scores."""

    files: list[str]
    scores: Scores


class GenEvalLine(ReportPart):
    """A line of GenEval's results."""

    filename: str
    tag: str
    correct: bool


def read_geneval(path: Path) -> Verdict:
    """`geneval`, the mean over tasks, and each task's share of correct images. Raises UserError for another file."""
    way = "give the results.jsonl that GenEval's evaluate_images.py writes"
    found: list[GenEvalLine] = []
    for number, line in enumerate(read_text(path, way).splitlines(), 1):
        try:
            found += [GenEvalLine.model_validate(json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as error:
            what = first_fault(error) if isinstance(error, ValidationError) else error
            raise UserError(f"{path} line {number} is no result of GenEval ({brief(what)}): {way}") from error
    require(not found and "has no results", path, way)
    tasks: dict[str, list[bool]] = {}
    for one in found:
        tasks.setdefault(one.tag, []).append(one.correct)
    shares = {tag: sum(right) / len(right) for tag, right in tasks.items()}
    return Verdict([one.filename for one in found], {"geneval": sum(shares.values()) / len(shares), **shares})


def read_dpg(path: Path) -> Verdict:
    """`dpg`, out of 100, and that of its five categories where they stand there. Raises UserError for another file."""
    way = "give the results file that DPG-Bench's compute_dpg_bench.py writes, run with --pic-num 4"
    lines = read_text(path, way).splitlines()
    rows = [found for line in lines if (found := LINE.fullmatch(line.strip()))]
    wrong, means, broad = "" if rows else "has no results", list[float](), Scores()
    try:
        for row in rows:
            *each, mean = (float(number) for number in row["scores"].split(", ")[1:])
            if len(each) != EACH:
                wrong = f"judges {len(each)} images of {Path(row['image']).name}, not {EACH}"
            means.append(mean)
        broad = categories(lines)
    except ValueError as error:
        wrong = f"has a score that is no number ({brief(error)})"
    require(wrong, path, way)
    return Verdict([row["image"] for row in rows], {"dpg": 100 * sum(means) / len(means), **broad})


def require(wrong: str | bool, path: Path, way: str) -> None:
    """Raise UserError if something is wrong with a file of results."""
    if wrong:
        raise UserError(f"{path} {wrong}: {way}")


def categories(lines: Sequence[str]) -> Scores:
    """The scores between 'L1 category scores:' and what comes next. Raises ValueError for no number."""
    _, *rest = [*lines[lines.index("L1 category scores:") :]] if "L1 category scores:" in lines else [""]
    found: Scores = {}
    for line in rest:
        if not line.startswith("\t"):
            break
        name, _, number = line.strip().partition(": ")
        found[name] = float(number)
    return found


READERS = {"geneval": read_geneval, "dpg": read_dpg}
DEPTH = {"geneval": 3, "dpg": 1}  # a file that is judged lies so deep in the folder of images


def report(run_folder: Path, name: str, results: Path) -> dict[str, Any]:
    """Write what the evaluator of benchmark `name` found into the run's folder, with the card of the images.

    The images are looked for where the results lie, where they say, and under the run's samples. Raises UserError where
    the file is none of that benchmark's, its images are not found, or not all of them were judged, once.
    """
    check_writable(run_folder)
    verdict = READERS[name](results)
    place = place_of(verdict, name, run_folder, results)
    made = read_note(place, f"make them again, dumo sample {typed(run_folder)} --format {name}")
    require_all(verdict, name, place, made["prompts"], results)
    card = made["card"]
    n, solver = card["nfe"][0], card["solver"]
    path = run_folder / made["report"]
    written = {
        "run": str(run_folder),
        "file": str(path),
        "step": made["step"],
        "weights": card["weights"],
        "protocol": card["protocol"],
        "samples": card["samples"],
        "seed": card["seed"],
        "solver": solver,
        "results": [{"nfe": n, "solver": solver["kind"], **verdict.scores}],
        "contrast": [],
        "baselines": {},
        "card": card,
        "versions": card["versions"],
        "state": None,
    }
    write(path, written)
    return written


def folder(source: str) -> Path:
    """A run's folder. Raises UserError where there is none."""
    path = Path(source)
    if not (path / FILE).is_file():
        raise UserError(f"{source} is no run's folder (it has no {FILE}): name the one that the images are of")
    return path


def place_of(verdict: Verdict, name: str, run_folder: Path, results: Path) -> Path:
    """The folder of the images that were judged."""
    parts = PurePosixPath(verdict.files[0]).parts[: -DEPTH[name]]
    named = Path(*parts) if parts else results.parent
    for place in (results.absolute().parent, named, run_folder / "samples" / named.name):
        if note(place).is_file():
            return place
    raise UserError(
        f"{results} is of images in {named}, and nothing there says what made them: put it into their folder, which "
        f"dumo sample {typed(run_folder)} --format {name} writes"
    )


def require_all(verdict: Verdict, name: str, place: Path, prompts: Mapping[str, str], results: Path) -> None:
    """Raise UserError unless each of the images was judged, once, and nothing else."""
    wanted = {file for prompt in prompts for file in LAYOUTS[name].judged(prompt)}
    found = Counter("/".join(PurePosixPath(file).parts[-DEPTH[name] :]) for file in verdict.files)
    odd = next((file for file, times in found.items() if times > 1 or file not in wanted), None)
    wrong = odd and f"judges {odd}, which is there twice, or is none of {place}"
    if lacking := sorted(wanted - found.keys()):
        wrong = f"lacks {len(lacking):,} of the {len(wanted):,} images of {place}, {lacking[0]} first"
    require(wrong or "", results, "judge all of that folder, each once")
