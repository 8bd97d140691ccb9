"""A new environment, without a network, in which what is installed in this one can be imported, too."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

NO_NETWORK = """
import sys

def refuse(event, args):
    host = {"socket.connect": lambda: args[1][0], "socket.getaddrinfo": lambda: args[0]}.get(event)
    if host and host() not in ("127.0.0.1", "localhost"):
        raise RuntimeError(f"{event} {args}")

sys.addaudithook(refuse)
"""
# pip takes what is there, and builds with the hatchling that is there
ALONE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
OURS = ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "SLOW")  # of this test, or of the make that runs it
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OURS}
ENVIRONMENT |= {**ALONE, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def finished(*words: object, cwd: Path, **env: str) -> str:
    """What a command prints on stdout; it must succeed."""
    done = subprocess.run([*map(str, words)], cwd=cwd, env=ENVIRONMENT | env, capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stdout + done.stderr)
    return done.stdout


def link(venv: Path) -> None:
    """Let a new environment import what this one has but dumo, and refuse it the network."""
    (site,) = venv.glob("lib/python*/site-packages")
    for old in site.glob("setuptools*"):  # of Python 3.11's venv, older than torch takes
        shutil.rmtree(old)
    (site / "no_network.py").write_text(NO_NETWORK)
    # a path here is no folder of .pth files: dumo, installed for development, is not found in it
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\nimport no_network\n")


def made(venv: Path) -> Path:
    """A new environment, linked."""
    finished(sys.executable, "-m", "venv", venv, cwd=venv.parent)
    link(venv)
    return venv
