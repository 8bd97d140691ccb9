"""Train and measure the cells of a plan, each as a run in a folder of its own.

`finish_all` is the entry point. It starts a process per cell, several at a time, and reads their results. In that
process `finish` trains and evaluates one run:

    python -m dumo.lab.cell CELL.yaml FOLDER DEVICE

A cell that diverges, fails or is killed is reported as a failure and does not stop the others. A finished cell is not
run again and a stopped one resumes. The folder's name ends in a hash of all settings that affect training, so a cell
with other settings is trained in another folder. A cell may start from another cell of its plan, or be taught by one;
its spec then has the name of that cell in place of a folder.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from dumo.config import trust
from dumo.config.load import dump, load
from dumo.config.place import EVALUATION_FILE
from dumo.config.source import RUN_FILE
from dumo.config.spec import Run
from dumo.data import Data, Latents
from dumo.encoders.pipeline_folder import Pipeline
from dumo.error import NotFiniteError
from dumo.io import file
from dumo.lab.plan import Cell
from dumo.nets.dualized import Dualized
from dumo.nets.pretrained import Pretrained
from dumo.nets.text_rows import Codes
from dumo.plan.prepare import prepare
from dumo.report import comparison
from dumo.report.evaluation import current_report, evaluate
from dumo.run import fill_caches
from dumo.run.resolve import resolve
from dumo.run.trained import TrainedRun
from dumo.run.trainer import open_trainer
from dumo.run.weights import load_run
from dumo.runtime import signals
from dumo.runtime.progress import Bar
from dumo.training.state import Diverged
from dumo.types import Objective, UserError

# A row of a table or a report, by column.
Row = dict[str, Any]

# The parts of a run that may change after training.
_NOT_OF_TRAINING = {"about", "sample", "evaluate"}
# The length of the hash in the name of a cell's folder.
_HASH_BYTES = 4
# How often the main process looks for signals while it waits for cells.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Result:
    """A trained and evaluated cell."""

    cell: Cell
    folder: Path
    report: dict[str, Any]
    # The commit of dumo that trained it; None if dumo was installed without git.
    commit: str | None = None
    device: str = "auto"

    @cached_property
    def trained(self) -> TrainedRun:
        """The trained run with its weights."""
        return load_run(self.folder, device=self.device)


def finish_all(
    cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar
) -> tuple[list[Result], dict[str, str]]:
    """Train and evaluate all cells, `jobs` at a time; return the results, and by cell name why the others failed.

    Raises UserError if cells of one protocol, split and fold were not evaluated alike.
    """
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    names = {cell.name for cell in cells}
    waiting = list(cells)
    while True:
        # Take the cells whose sources are finished.
        ready = [cell for cell in waiting if sources(cell, names) <= results.keys()]
        if not ready:
            break
        waiting = [cell for cell in waiting if cell not in ready]

        # Replace the names of sources by folders, and make the caches that several cells read.
        ready = [with_folders(cell, results, folder.parent) for cell in ready]
        _make_caches(ready, device=device, bar=bar)
        ready = [replace(cell, spec=resolve(cell.spec)) for cell in ready]

        # Run the cells that are not finished, then read all results.
        for cell in ready:
            result = read_result(cell, folder, device)
            if result is not None:
                results[cell.name] = result
        unfinished = [cell for cell in ready if cell.name not in results]
        failures |= run_in_processes(unfinished, folder, jobs=jobs, device=device, bar=bar)
        for cell in unfinished:
            if cell.name in failures:
                continue
            result = read_result(cell, folder, device)
            if result is None:
                raise UserError(
                    f"{cell_folder(cell, folder)} was continued with other settings than the plan's: move it away, and "
                    "the cell is trained again"
                )
            results[cell.name] = result
    for cell in waiting:
        failures[cell.name] = "it starts from a cell that failed"

    in_order = [results[cell.name] for cell in cells if cell.name in results]
    _require_measured_alike(in_order)
    return in_order, failures


def cell_folder(cell: Cell, cells_folder: Path) -> Path:
    """The folder of a cell's run, named after the cell and a hash of all that affects its training."""
    training_spec = cell.spec.model_dump_json(exclude=_NOT_OF_TRAINING)
    training_hash = blake2b(training_spec.encode(), digest_size=_HASH_BYTES).hexdigest()
    return cells_folder / f"{cell.name}-{training_hash}"


def read_result(cell: Cell, cells_folder: Path, device: str) -> Result | None:
    """The result of a cell; None if it is not finished, or was trained or evaluated with other settings."""
    folder = cell_folder(cell, cells_folder)
    if not (folder / EVALUATION_FILE).is_file():
        return None
    trained = load_run(folder, device=device)
    if trained.step != cell.spec.train.steps or _settings(trained.spec) != _settings(cell.spec):
        return None
    report = current_report(trained)
    if report is None:
        return None
    commit = _commit_file(folder).read_text(encoding="utf-8").strip()
    return Result(cell, folder, report, commit or None, device)


def _settings(run: Run) -> str:
    """All settings of a run but its description and what was found on disk, as text."""
    return run.model_dump_json(exclude={"about", "resolved"})


def run_in_processes(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> dict[str, str]:
    """Finish each cell in a process of its own, `jobs` at a time; return why some failed, by cell name.

    The processes share the cores. With device `auto` they are spread over all GPUs. Raises Stopped after a signal, once
    all processes have saved a checkpoint and ended.
    """
    if not cells:
        return {}
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    num_gpus = torch.cuda.device_count() if device == "auto" else 0
    processes: list[subprocess.Popen[bytes]] = []

    def run(number: int, cell: Cell) -> str | None:
        own_device = f"cuda:{number % num_gpus}" if num_gpus > 1 else device
        run_folder = cell_folder(cell, folder)
        spec_file = run_folder.with_name(f"{run_folder.name}.yaml")
        log_file = run_folder.with_name(f"{run_folder.name}.log")
        file.write(spec_file, dump(cell.spec).encode())
        # -P: a module in the working folder must not replace one of the same name.
        command = [sys.executable, "-P", "-m", "dumo.lab.cell", str(spec_file), str(run_folder), own_device]
        with log_file.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            processes.append(process)
            code = process.wait()
        return _failure_text(code, log_file) if code else None

    folder.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    executor = ThreadPoolExecutor(jobs)
    try:
        names: dict[Future[str | None], str] = {}
        for number, cell in enumerate(cells):
            names[executor.submit(run, number, cell)] = cell.name
        pending = set(names)
        with bar(f"{len(cells)} cells, {jobs} at a time", len(cells)) as tick:
            while pending:
                signals.check()
                done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    failure = future.result()
                    if failure is not None:
                        failures[names[future]] = failure
                    tick(len(cells) - len(pending), names[future])
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    return failures


def _failure_text(code: int, log_file: Path) -> str:
    """Why a process failed: its signal, or the last line of its log."""
    if code < 0:
        text = f"its process was ended by {signal.Signals(-code).name}"
        return f"{text}, as happens when memory runs out" if code == -signal.SIGKILL else text
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last_line = lines[-1] if lines else ""
    return f"{last_line} ({log_file})"


def main(spec_file: str, folder: str, device: str) -> None:
    """Finish the cell whose run is in a file, in this process. Code that the run names was agreed to by the caller."""
    with signals.listening(child=True), trust.trusting():
        try:
            finish(load(Path(spec_file)), Path(folder), device=device)
        except (Diverged, UserError, NotFiniteError, signals.Stopped) as error:
            sys.exit(str(error))


def finish(run: Run, folder: Path, *, device: str) -> None:
    """Train a run in a folder and evaluate it. What is done there already is not done again."""
    if not (folder / RUN_FILE).is_file():
        file.write(_commit_file(folder), (commit() or "").encode())
    prepared = prepare(run, out=folder)
    assert prepared.run
    with open_trainer(prepared.path, prepared.run, device=device) as trainer:
        trainer.train()
    trained = load_run(folder, device=device)
    if current_report(trained) is None:
        evaluate(trained)


def _commit_file(folder: Path) -> Path:
    """The file that holds the commit which trained the run in `folder`."""
    return folder.with_name(f"{folder.name}.commit")


def commit() -> str | None:
    """The commit of this dumo, ending in "-dirty" if its code was changed; None if it was installed without git."""
    if shutil.which("git") is None:
        return None
    module = Path(__file__)
    git = ["git", "-C", str(module.parent)]
    is_tracked = subprocess.run([*git, "ls-files", "--error-unmatch", module.name], capture_output=True)
    if is_tracked.returncode:
        return None
    head = subprocess.run([*git, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True).stdout.strip()
    # Results and pages do not count: measuring writes them.
    code = [":(top)src/dumo/*.py", ":(top)src/dumo/*.yaml"]
    is_changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode != 0
    return f"{head}-dirty" if is_changed else head


def _make_caches(cells: Sequence[Cell], *, device: str, bar: Bar) -> None:
    """Make the caches of latents that cells read and that do not exist yet."""
    for data in dict.fromkeys(cell.spec.data for cell in cells):
        if isinstance(data, Latents):
            fill_caches.ensure_cache(data, device=device, bar=bar)


def _require_measured_alike(results: Sequence[Result]) -> None:
    """Raise UserError if results that stand in one table were measured in different ways."""
    cards: dict[tuple[str, str | None, int], dict[str, Any]] = {}
    for result in results:
        spec = result.cell.spec
        # Cells of other protocols, splits or folds are evaluated against other images.
        key = (spec.evaluate.protocol.kind, spec.evaluate.split, getattr(spec.data, "fold", 0))
        cards.setdefault(key, {})[result.cell.name] = result.report["card"]
    for cards_by_cell in cards.values():
        comparison.require_comparable(cards_by_cell)


# ------------------------------------------------------------------------------- cells that start from other cells


def sources(cell: Cell, names: Collection[str]) -> set[str]:
    """The names among `names` of the cells that a cell starts from or is taught by."""
    start = getattr(cell.spec.start, "source", None)
    teacher = getattr(cell.spec.teacher, "source", None)
    return {*names} & {cell.weights, start, teacher}


def with_folders(cell: Cell, results_by_name: Mapping[str, Result], parent: Path) -> Cell:
    """The cell with folders in place of the names of cells that have results.

    A model that a cell starts from by `Cell.weights` is saved in a folder below `parent`.
    """
    parts: dict[str, Any] = {}
    for name in ("start", "teacher"):
        part = getattr(cell.spec, name)
        source = results_by_name.get(getattr(part, "source", ""))
        if source is not None:
            parts[name] = part.model_copy(update={"source": str(source.folder)})
    if cell.weights:
        folder = _save_model(results_by_name[cell.weights], parent, cell.cut)
        parts["pipeline"] = Pipeline(source=str(folder))
    return replace(cell, spec=cell.spec.model_copy(update=parts))


def _save_model(result: Result, parent: Path, cut: float | None) -> Path:
    """Save the model of a cell for diffusers, with the head of v, once; return its folder, below `parent`.

    `cut` is the limit, in rad, of a low-pass filter that is fitted to the model's time embedding; None fits none.
    """
    # The name of the run's folder has a hash of what trained it.
    name = result.folder.name
    if cut is not None:
        name += f"-{cut:g}"
    folder = parent / name
    if (folder / "config.json").exists():
        return folder
    net = result.trained.net
    if cut is not None:
        run = result.trained.spec
        net = _low_pass(run.objective, run.data, _save_model(result, parent, None), cut)
    assert isinstance(net, Dualized)
    net.single_head_model("v").save_pretrained(folder)
    return folder


def _low_pass(objective: Objective, data: Data, folder: Path, limit: float) -> Dualized:
    """The model of a folder, its time embedding filtered at `limit` rad and fitted again (`dumo.nets.lowpass`)."""
    spec = Pretrained(texts=Codes(), lowpass=limit).within(Pipeline(source=str(folder)))
    net = spec.build(objective.needs, data.shape, data.classes)
    net.refit()
    return net


if __name__ == "__main__":
    main(*sys.argv[1:])
