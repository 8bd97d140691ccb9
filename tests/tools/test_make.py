"""What make does of an environment that could not be made."""

import subprocess
from pathlib import Path

from fresh import ENVIRONMENT

ROOT = Path(__file__).parents[2]
# As where Debian's python3-venv is missing: it links Python, then fails for lack of pip.
NO_PIP = """#!/bin/sh
if [ "$1" = -m ]; then
  mkdir -p "$3/bin"
  ln -s /bin/sh "$3/bin/python"
  exit 1
fi
"""


def test_an_environment_that_failed_is_made_anew(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text(NO_PIP)
    python.chmod(0o755)
    made = tmp_path / "venv/bin/python"
    words = ["make", "-C", str(ROOT), f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", str(made)]
    assert subprocess.run(words, env=ENVIRONMENT, capture_output=True).returncode == 2
    assert made.parent.is_dir()
    assert not made.is_symlink()
