"""Continuous integration types the pages that changed, and one in turn; without git all."""

from collections.abc import Generator

import pytest

from docs import turn


@pytest.fixture(autouse=True)
def _anew() -> Generator[None, None, None]:
    """Nothing is remembered."""
    turn.due.cache_clear()
    yield
    turn.due.cache_clear()


@pytest.mark.parametrize(("base", "since"), [("b", "b"), ("h", "HEAD^")])  # on a branch; on main
def test_what_changed_and_one_in_turn(base: str, since: str, monkeypatch: pytest.MonkeyPatch) -> None:
    says = {
        "branch --all --format=%(refname:short)": "main\nmine",
        "merge-base HEAD main": base,
        "rev-parse HEAD": "h",
        f"diff --name-only {since}": "docs/memory.md\nsrc/dumo/types/spec.py",
        "rev-list --count HEAD": f"{len(turn.TYPED) + 1}",
    }
    monkeypatch.setattr(turn, "git", lambda *words: says[" ".join(words)])
    assert turn.due() == {"memory", turn.TYPED[1]}


def test_without_git_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*words: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(turn, "git", missing)
    assert turn.due() == {*turn.TYPED}
