"""What became of a case, and disks to make trouble with."""

import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import dumo
from dumo.io import digest
from e2e.shell import ENVIRONMENT
from reliability import process
from reliability.place import trained

Files = dict[str, str]


class Left(Exception):  # noqa: N818, it is no error
    """A case that cannot be tried here, and why."""


@dataclass
class Found:
    """What became of a case."""

    name: str
    codes: list[int] = field(default_factory=list[int])  # exit codes under the trouble
    said: list[str] = field(default_factory=list[str])  # the line that each said
    watched: int = 0  # good files
    changed: int = 0  # that were changed or are gone
    afterwards: str = ""  # when the trouble was over
    wrong: list[str] = field(default_factory=list[str])  # what should have been otherwise
    left_out: str = ""
    seconds: float = 0.0

    def tried(self, process_: "subprocess.Popen[bytes]", cwd: Path, *codes: int, names: str = "") -> None:
        """Wait for what was started under the trouble: it must end with one of these codes, in plain words."""
        words = [str(word) for word in process_.args] if isinstance(process_.args, list) else []
        what = " ".join(words[words.index("dumo") + 1 :][:2])
        try:
            code = process.ended(process_, 200)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{what}: hangs")
            return
        text = process.said(cwd)
        self.codes.append(code)
        plain = [line for line in text.splitlines() if line.startswith(("error", "rank", "stopped", "warning"))]
        self.said += [line.replace(f"{cwd}/", "") for line in plain[-1:]]
        if code not in codes:
            self.wrong.append(f"{what}: exit code {code}")
        if f'File "{Path(dumo.__file__).parent}' in text:
            self.wrong.append(f"{what}: a traceback ({text.strip().splitlines()[-1][:200]})")
        elif code and not plain:
            self.wrong.append(f"{what}: says nothing of its own")
        if code and names not in " ".join(plain):
            self.wrong.append(f"{what}: does not name {names}")

    def refused(self, words: Sequence[str], cwd: Path, *, names: str = "", before: str = "", **how: object) -> None:
        """Run a command that must fail, in plain words that name the thing."""
        environment: Mapping[str, str] = how.get("environment", ENVIRONMENT)  # type: ignore[assignment]
        self.tried(process.start(words, cwd, before=before, environment=environment), cwd, 1, 2, names=names)

    def recovers(self, words: Sequence[str], cwd: Path, ranks: int = 1) -> None:
        """The trouble is over: the command must work."""
        if code := process.finish(words, cwd, ranks):
            last = (process.said(cwd).strip().splitlines() or [""])[-1]
            self.wrong.append(f"afterwards {' '.join(words[:2])} ends with {code}: {last[:200]}")
            self.afterwards = f"exit code {code}"
        elif not self.afterwards:
            self.afterwards = "works"

    def same(self, cwd: Path, words: Sequence[str], ranks: int = 1) -> None:
        """The training in cwd/run must have come to the end of an undisturbed one."""
        if self.afterwards not in ("", "works"):
            return
        whole = cwd / "whole"
        whole.mkdir()
        for name in ("given", "images", "cache"):
            if (cwd / name).exists():
                (whole / name).symlink_to(cwd / name)
        self.recovers(words, whole, ranks)
        wanted, found = trained(whole), trained(cwd)
        differs = [name for name in wanted if found.get(name) != wanted[name]]
        self.afterwards = "differs" if differs else "bit-equal"
        if differs:
            self.wrong.append(f"{len(differs)} of {len(wanted)} differ, the first {differs[0]}")

    @contextmanager
    def unharmed(self, *folders: Path, but: str = ".lock") -> Generator[None, None, None]:
        """What lies in these folders must stay as it is, but for names with `but` in them; more may come."""
        before = files(folders, but)
        yield
        after = files(folders, but)
        harmed = [name for name, bits in before.items() if after.get(name) != bits]
        self.watched, self.changed = self.watched + len(before), self.changed + len(harmed)
        if harmed:
            self.wrong.append(f"changed: {harmed[0]}")


def files(folders: Sequence[Path], but: str) -> Files:
    """Each file's hash by its path."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): digest.of_file(path) for path in paths if but not in path.name}


@cache
def mountable() -> bool:
    """Whether this process may mount a disk of its own."""
    with TemporaryDirectory() as place:
        done = subprocess.run(["mount", "-t", "tmpfs", "dumo", place], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", place], check=True)
    return done.returncode == 0


@contextmanager
def disk(place: Path, size: str) -> Generator[Callable[[str], object], None, None]:
    """A disk of this size at a new folder; yields what mounts it anew with other options. Raises Left where not."""
    if not mountable():
        raise Left("no right to mount a disk")
    place.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o")
    subprocess.run([*mount, f"size={size}", "dumo", str(place)], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
