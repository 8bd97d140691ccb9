"""Train and evaluate the cells of a plan, each in its own run folder and its own process.

`finish_all` is the entry point. It starts the processes, several at a time, and reads the results. In each process,
`finish` trains and evaluates one run:

    python -m dumo.lab.cell CELL.yaml FOLDER DEVICE

If a cell diverges, fails or is killed, its failure is reported and the remaining cells continue. Finished cells are
skipped and stopped cells resume. The folder's name ends in a hash of all settings that affect training, so a cell with
different settings gets a different folder. A cell may use another cell of its plan as its start or teacher: its spec
then contains that cell's name instead of a folder.
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
from dumo.lab.experiment import Cell
from dumo.nets.dualized import Dualized
from dumo.nets.pretrained import Pretrained
from dumo.nets.text_rows import Codes
from dumo.plan.prepare import prepare
from dumo.report import comparison
from dumo.report.evaluation import current_report, evaluate
from dumo.run import fill_caches
from dumo.run.resolve import find_commits, resolve, with_absolute_paths, with_commits, with_hashes
from dumo.run.trained import TrainedRun
from dumo.run.trainer import open_trainer
from dumo.run.weights import load_run
from dumo.runtime import signals
from dumo.runtime.progress import Bar
from dumo.training.state import Diverged
from dumo.types import Objective, UserError

# A row of a table or a report, by column.
Row = dict[str, Any]

# Sections of a run that may change after training.
_NOT_OF_TRAINING = {"about", "sample", "evaluate"}
_FOLDER_HASH_BYTES = 4
# Seconds between checks for signals while the main process waits for cells.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Result:
    """A trained and evaluated cell."""

    cell: Cell
    folder: Path
    report: dict[str, Any]
    # The dumo commit that trained the cell. None if dumo was installed without git.
    commit: str | None = None
    device: str = "auto"

    @cached_property
    def trained(self) -> TrainedRun:
        """The trained run with its weights."""
        return load_run(self.folder, device=self.device)


def finish_all(
    cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar
) -> tuple[list[Result], dict[str, str]]:
    """Train and evaluate all cells, `jobs` at a time; return the results, and error messages by name of failed cell.

    Raises UserError if cells with the same protocol, split and fold were evaluated differently.
    """
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    names = {cell.name for cell in cells}
    waiting = list(cells)
    while True:
        # Select the cells whose start and teacher are finished.
        ready = [cell for cell in waiting if sources(cell, names) <= results.keys()]
        if not ready:
            break
        waiting = [cell for cell in waiting if cell not in ready]

        # Replace the names of source cells by their folders, and fill the caches that several cells share.
        ready = [with_folders(cell, results, folder.parent) for cell in ready]
        _make_caches(ready, device=device, bar=bar)
        ready = [replace(cell, spec=resolve(cell.spec)) for cell in ready]

        # Run the unfinished cells, then read all results.
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
                    f"{cell_folder(cell, folder)} was resumed with settings that differ from the plan's: move it away "
                    "to train the cell again"
                )
            results[cell.name] = result
    for cell in waiting:
        failures[cell.name] = "it starts from a cell that failed"

    in_order = [results[cell.name] for cell in cells if cell.name in results]
    _require_measured_alike(in_order)
    return in_order, failures


def cell_folder(cell: Cell, cells_folder: Path) -> Path:
    """Return the run folder of a cell, named after the cell and a hash of all settings that affect its training."""
    training_spec = cell.spec.model_dump_json(exclude=_NOT_OF_TRAINING)
    training_hash = blake2b(training_spec.encode(), digest_size=_FOLDER_HASH_BYTES).hexdigest()
    return cells_folder / f"{cell.name}-{training_hash}"


def read_result(cell: Cell, cells_folder: Path, device: str) -> Result | None:
    """Return the result of a cell; None if it is unfinished, or was trained or evaluated with different settings."""
    folder = cell_folder(cell, cells_folder)
    if not (folder / EVALUATION_FILE).is_file():
        return None
    trained = load_run(folder, device=device)
    if trained.step != cell.spec.train.steps:
        return None
    # run.yaml also has the commits, absolute paths and hashes that the training added.
    planned = with_commits(cell.spec, find_commits(cell.spec, trained.spec))
    planned = with_hashes(resolve(with_absolute_paths(planned)), trained.spec)
    if _settings(trained.spec) != _settings(planned):
        return None
    report = current_report(trained)
    if report is None:
        return None
    commit = _commit_file(folder).read_text(encoding="utf-8").strip()
    return Result(cell, folder, report, commit or None, device)


def _settings(run: Run) -> str:
    """Serialize all settings of a run except its description and the values resolved from files."""
    return run.model_dump_json(exclude={"about", "resolved"})


def run_in_processes(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> dict[str, str]:
    """Finish each cell in its own process, `jobs` at a time; return error messages by name of failed cell.

    The processes share the cores. With device `auto` they are distributed over all GPUs. After a signal, raises Stopped
    once all processes have saved a checkpoint and exited.
    """
    if not cells:
        return {}
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    num_gpus = torch.cuda.device_count() if device == "auto" else 0
    processes: list[subprocess.Popen[bytes]] = []

    def run(number: int, cell: Cell) -> str | None:
        cell_device = f"cuda:{number % num_gpus}" if num_gpus > 1 else device
        run_folder = cell_folder(cell, folder)
        spec_file = run_folder.with_name(f"{run_folder.name}.yaml")
        log_file = run_folder.with_name(f"{run_folder.name}.log")
        file.write(spec_file, dump(cell.spec).encode())
        # -P keeps modules in the working folder from shadowing installed ones.
        command = [sys.executable, "-P", "-m", "dumo.lab.cell", str(spec_file), str(run_folder), cell_device]
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
    """Return the signal that ended a process, or the last line of its log."""
    if code < 0:
        text = f"its process was ended by {signal.Signals(-code).name}"
        return f"{text}, possibly because memory ran out" if code == -signal.SIGKILL else text
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last_line = lines[-1] if lines else ""
    return f"{last_line} ({log_file})"


def main(spec_file: str, folder: str, device: str) -> None:
    """Finish the cell of a spec file in this process. The caller has already obtained consent to the code it names."""
    with signals.listening(child=True), trust.trusting():
        try:
            finish(load(Path(spec_file)), Path(folder), device=device)
        except (Diverged, UserError, NotFiniteError, signals.Stopped) as error:
            sys.exit(str(error))


def finish(run: Run, folder: Path, *, device: str) -> None:
    """Train a run in a folder and evaluate it, skipping what is already finished."""
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
    """Return the path of the file with the commit that trained the run in `folder`."""
    return folder.with_name(f"{folder.name}.commit")


def commit() -> str | None:
    """Return dumo's commit, with the suffix "-dirty" if its code was changed; None if it was installed without git."""
    if shutil.which("git") is None:
        return None
    module = Path(__file__)
    git = ["git", "-C", str(module.parent)]
    is_tracked = subprocess.run([*git, "ls-files", "--error-unmatch", module.name], capture_output=True)
    if is_tracked.returncode:
        return None
    head = subprocess.run([*git, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True).stdout.strip()
    # Ignore results and documentation, since experiments write them.
    code = [":(top)src/dumo/*.py", ":(top)src/dumo/*.yaml"]
    is_changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode != 0
    return f"{head}-dirty" if is_changed else head


def _make_caches(cells: Sequence[Cell], *, device: str, bar: Bar) -> None:
    """Encode the caches of latents that the cells need and that do not exist yet."""
    for data in dict.fromkeys(cell.spec.data for cell in cells):
        if isinstance(data, Latents):
            fill_caches.ensure_cache(data, device=device, bar=bar)


def _require_measured_alike(results: Sequence[Result]) -> None:
    """Raise UserError if results in one table were evaluated in different ways."""
    cards: dict[tuple[str, str | None, int], dict[str, Any]] = {}
    for result in results:
        spec = result.cell.spec
        # Different protocols, splits and folds have different reference images.
        key = (spec.evaluate.protocol.kind, spec.evaluate.split, getattr(spec.data, "fold", 0))
        cards.setdefault(key, {})[result.cell.name] = result.report["card"]
    for cards_by_cell in cards.values():
        comparison.require_comparable(cards_by_cell)


# -------------------------------------------------------------------- cells that use other cells as start or teacher


def sources(cell: Cell, names: Collection[str]) -> set[str]:
    """Return the cells among `names` that a cell uses as its start or teacher."""
    start = getattr(cell.spec.start, "source", None)
    teacher = getattr(cell.spec.teacher, "source", None)
    return {*names} & {cell.weights, start, teacher}


def with_folders(cell: Cell, results_by_name: Mapping[str, Result], parent: Path) -> Cell:
    """Replace the names of finished cells in a cell's spec by their folders.

    The model of `Cell.weights` is saved in a folder below `parent`.
    """
    sections: dict[str, Any] = {}
    for name in ("start", "teacher"):
        section = getattr(cell.spec, name)
        source = results_by_name.get(getattr(section, "source", ""))
        if source is not None:
            sections[name] = section.model_copy(update={"source": str(source.folder)})
    if cell.weights:
        folder = _save_model(results_by_name[cell.weights], parent, cell.refit_lowpass)
        sections["pipeline"] = Pipeline(source=str(folder))
    return replace(cell, spec=cell.spec.model_copy(update=sections))


def _save_model(result: Result, parent: Path, lowpass_limit: float | None) -> Path:
    """Save the model of a cell with its v head for diffusers, unless it exists; return its folder, below `parent`.

    If `lowpass_limit` (in rad) is given, a low-pass filter is fitted to the model's time embedding.
    """
    # The name of the run's folder contains a hash of the training settings.
    name = result.folder.name
    if lowpass_limit is not None:
        name += f"-{lowpass_limit:g}"
    folder = parent / name
    if (folder / "config.json").exists():
        return folder
    net = result.trained.net
    if lowpass_limit is not None:
        run = result.trained.spec
        net = _refit_lowpass(run.objective, run.data, _save_model(result, parent, None), lowpass_limit)
    assert isinstance(net, Dualized)
    net.single_head_model("v").save_pretrained(folder)
    return folder


def _refit_lowpass(objective: Objective, data: Data, folder: Path, limit: float) -> Dualized:
    """Load a model, low-pass filter its time embedding at `limit` rad, and refit it (`dumo.nets.lowpass`)."""
    spec = Pretrained(texts=Codes(), lowpass=limit).within(Pipeline(source=str(folder)))
    net = spec.build(objective.needs, data.shape, data.classes)
    net.refit()
    return net


if __name__ == "__main__":
    main(*sys.argv[1:])
