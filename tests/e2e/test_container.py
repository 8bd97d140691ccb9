"""What of the Dockerfile can be tried without Docker: what it copies is there and enough for the line that installs."""

import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest

from fresh import finished, made

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
STEPS = [tuple(line.split(maxsplit=1)) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]


def of(kind: str) -> list[str]:
    """What follows the steps of a kind."""
    return [words for name, words in STEPS if name == kind]


def sent(name: str) -> bool:
    """Whether a file or folder of the top is sent to Docker: the last line of .dockerignore that fits it says."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    return [line.startswith("!") for line in lines if fnmatch(name, line.lstrip("!"))][-1]


def test_the_last_user_is_not_root_and_nothing_is_kept() -> None:
    assert of("USER")[-1] in re.findall(r"useradd (\w+)", DOCKERFILE)
    assert of("ENTRYPOINT") == ['["dumo"]']
    for line in of("RUN"):
        assert "pip install" not in line or "--no-cache-dir" in line
        assert "apt-get install" not in line or line.endswith("rm -rf /var/lib/apt/lists/*")
    # versions are those of constraints.txt, and of no other file
    assert re.findall(r"==|torch[<>=~]", DOCKERFILE) == []
    assert [sent(name) for name in (".git", "runs", ".venv", "src")] == [False, False, False, True]


def test_any_user_can_write_next_to_what_is_mounted(tmp_path: Path) -> None:
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    above = {f"{tmp_path}{Path(place).parent}" for place in re.findall(r'-v "[^"]*:(/tmp/[^"]+)"', page)}
    assert above
    for command in re.findall(r"install --directory --mode \S+ /tmp\S*", DOCKERFILE):
        finished("bash", "-c", command.replace("/tmp", f"{tmp_path}/tmp"), cwd=tmp_path)
    for folder in above:
        assert Path(folder).stat().st_mode & 0o777 == 0o777


@pytest.mark.nightly
def test_what_is_copied_installs(tmp_path: Path) -> None:
    for words in of("COPY"):
        *sources, target = words.split()
        for source in sources:
            assert sent(source), f"{source} is left out by .dockerignore"
            there = f"{tmp_path}{target}"
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, there, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                Path(there).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, there)
    (line,) = (line for line in of("RUN") if line.startswith("pip install"))
    programs = made(tmp_path / "venv") / "bin"
    finished("bash", "-c", f"{programs}/{line.replace('/opt/', f'{tmp_path}/opt/')}", cwd=tmp_path, INDEX="none")
    assert finished(programs / "dumo", "--version", cwd=tmp_path).startswith("dumo ")
