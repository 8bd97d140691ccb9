"""Which pages continuous integration types: those that changed on this branch, and one in turn. Each night types all.

The turn goes by the number of commits, so that all processes of a session agree. Without git it types all.
"""

import subprocess
from functools import cache

import pytest

from docs.page import ROOT

TYPED = (
    *("captions", "compare", "evaluation", "families", "gpus", "library", "loop", "mathematics", "memory"),
    *("objectives/details", "objectives/index", "own-objective", "paper", "personal", "photos", "pretrained", "sdxl"),
    "trained",
)


def tier(page: str) -> pytest.MarkDecorator:
    """The mark of a test that types a page, by its name in docs without .md."""
    assert page in TYPED
    return pytest.mark.slow if page in due() else pytest.mark.nightly


@cache
def due() -> set[str]:
    """What continuous integration types."""
    try:
        changed, commits = changed_files(), int(git("rev-list", "--count", "HEAD"))
    except (OSError, subprocess.CalledProcessError):
        return {*TYPED}
    return {page for page in TYPED if f"docs/{page}.md" in changed} | {TYPED[commits % len(TYPED)]}


def changed_files() -> set[str]:
    """Since this branch left main; on main, since the commit before."""
    base = git("merge-base", "HEAD", main_branch())
    if base == git("rev-parse", "HEAD"):
        base = "HEAD^"
    return {*git("diff", "--name-only", base).splitlines()}


def main_branch() -> str:
    """As the server has it, where there is one."""
    branches = git("branch", "--all", "--format=%(refname:short)").splitlines()
    return "origin/main" if "origin/main" in branches else "main"


def git(*words: str) -> str:
    """What it says. Raises where it is not there, or fails."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
