"""What became of one case of `fault.py`: how the commands under the fault ended, and all that should be otherwise.

A case calls the methods of its `CaseResult` in this order: `check_refusal` or `check_exit` for each command while the
fault lasts, inside of `check_unchanged` where good files must stay; then `check_recovery`, and last
`compare_with_undisturbed`. None of them raises for what it finds wrong: they add a sentence to `problems`, and
`machine.py` prints these. A case that this machine cannot try raises `CaseSkipped`.
"""

import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dumo
from dumo.io import digest
from reliability import process
from reliability.workload import INPUTS, training_fingerprint

EXIT_SECONDS = 200.0  # until a command under a fault must have ended: ours
LOCK_SUFFIX = ".lock"  # in the names of locks, which may change in good folders
OWN_LINES = ("error", "rank", "stopped", "warning")  # how the lines begin that dumo itself prints about a failure


class CaseSkipped(Exception):  # noqa: N818, it is no error
    """A case cannot be tried on this machine; the message says why."""


@dataclass
class CaseResult:
    """What became of a case."""

    name: str
    exit_codes: list[int] = field(default_factory=list[int])  # of the commands under the fault
    messages: list[str] = field(default_factory=list[str])  # the last line of dumo's own that each of them printed
    num_watched: int = 0  # good files that had to stay as they are
    num_changed: int = 0  # and did not
    recovery: str = ""  # how it ended once the fault was over: "works", "bit-equal", "differs" or an exit code
    problems: list[str] = field(default_factory=list[str])
    skip_reason: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As a row of machine.json."""
        return {
            "name": self.name,
            "codes": self.exit_codes,
            "said": self.messages,
            "watched": self.num_watched,
            "changed": self.num_changed,
            "afterwards": self.recovery,
            "wrong": self.problems,
            "left_out": self.skip_reason,
            "seconds": self.seconds,
        }

    # -------------------------------------------------------------------------------------------- while the fault lasts

    def check_exit(
        self,
        command: "subprocess.Popen[bytes]",
        folder: Path,
        *exit_codes: int,
        subject: str = "",
    ) -> None:
        """Wait for a command that runs in `folder`: it must end with one of these exit codes.

        If it fails, it must print a line of dumo's own that has `subject` in it, and no traceback through dumo.
        """
        assert isinstance(command.args, list), "as `process.start` makes them"
        words = [str(word) for word in command.args]
        after_dumo = words.index("dumo") + 1
        title = " ".join(words[after_dumo : after_dumo + 2])
        try:
            exit_code = process.wait_for_exit(command, EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.problems.append(f"{title}: hangs")
            return

        log = process.read_log(folder)
        own_lines = [line for line in log.splitlines() if line.startswith(OWN_LINES)]
        self.exit_codes.append(exit_code)
        if own_lines:
            self.messages.append(own_lines[-1].replace(f"{folder}/", ""))

        if exit_code not in exit_codes:
            self.problems.append(f"{title}: exit code {exit_code}")
        if f'File "{Path(dumo.__file__).parent}' in log:
            last_line = log.strip().splitlines()[-1]
            self.problems.append(f"{title}: a traceback ({last_line[:200]})")
        elif exit_code and not own_lines:
            self.problems.append(f"{title}: says nothing of its own")
        if exit_code and subject not in " ".join(own_lines):
            self.problems.append(f"{title}: does not name {subject}")

    def check_refusal(self, words: Sequence[str], folder: Path, *, subject: str, shell_setup: str = "") -> None:
        """Run `dumo WORDS` in `folder`: it must end with exit code 1 or 2, as `check_exit` says."""
        command = process.start(words, folder, shell_setup=shell_setup)
        self.check_exit(command, folder, 1, 2, subject=subject)

    @contextmanager
    def check_unchanged(self, *folders: Path) -> Generator[None, None, None]:
        """Compare the files of these folders before and after: each must be as it was. New ones may come."""
        hashes = _file_hashes(folders)
        yield
        hashes_after = _file_hashes(folders)
        changed = [name for name, hash_before in hashes.items() if hashes_after.get(name) != hash_before]
        self.num_watched += len(hashes)
        self.num_changed += len(changed)
        if changed:
            self.problems.append(f"changed: {changed[0]}")

    # ------------------------------------------------------------------------------------------- once the fault is over

    def check_recovery(self, words: Sequence[str], folder: Path, ranks: int = 1) -> None:
        """Run `dumo WORDS` in `folder`: it must succeed."""
        exit_code = process.run(words, folder, ranks)
        if exit_code:
            lines = process.read_log(folder).strip().splitlines()
            last_line = lines[-1] if lines else ""
            self.problems.append(f"afterwards {' '.join(words[:2])} ends with {exit_code}: {last_line[:200]}")
            self.recovery = f"exit code {exit_code}"
        elif not self.recovery:
            self.recovery = "works"

    def compare_with_undisturbed(self, folder: Path, words: Sequence[str], ranks: int = 1) -> None:
        """Train by `dumo WORDS` without a fault: the training in `folder`/run must have come to an equal end.

        Nothing is compared if the case did not recover.
        """
        if self.recovery not in ("", "works"):
            return
        undisturbed_folder = folder / "whole"
        undisturbed_folder.mkdir()
        for name in (INPUTS, "images", "cache"):
            if (folder / name).exists():
                (undisturbed_folder / name).symlink_to(folder / name)
        self.check_recovery(words, undisturbed_folder, ranks)

        undisturbed = training_fingerprint(undisturbed_folder)
        disturbed = training_fingerprint(folder)
        differences = [name for name in undisturbed if disturbed.get(name) != undisturbed[name]]
        if differences:
            self.recovery = "differs"
            self.problems.append(f"{len(differences)} of {len(undisturbed)} differ, the first {differences[0]}")
        else:
            self.recovery = "bit-equal"


def _file_hashes(folders: Sequence[Path]) -> dict[str, str]:
    """The hash of every file below these folders by its path, locks left out."""
    hashes: dict[str, str] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and LOCK_SUFFIX not in path.name:
                hashes[str(path)] = digest.of_file(path)
    return hashes
