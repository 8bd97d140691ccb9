"""What fails on one rank is raised on all."""

import errno
from pathlib import Path

import pytest
import torch.distributed

from dumo.io import file as files
from dumo.runtime import dist
from dumo.training import agreement
from dumo.types import UserError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Two ranks, of which this is the first; the other one fails with the last of these."""
    errors: list[Exception] = []

    def gather(answers: list[object], mine: object, group: None) -> None:
        answers[:] = [mine, (None, agreement.sendable_error(errors[-1]))]

    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return errors


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied", Path("a/b")), PermissionError, "Permission denied.*a/b"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), OSError, "quota"),
        (UserError("this is wrong"), UserError, "^this is wrong$"),
        (KeyError("x"), RuntimeError, "KeyError: 'x'"),
    ],
)
def test_others_are_told_by_rank(failing: list[Exception], error: Exception, kind: type[Exception], says: str) -> None:
    """The system's refusal names its file, and a full disk stays one."""
    failing.append(error)
    for work in (agreement.gather_results, agreement.on_each_rank):
        with pytest.raises(kind, match=says) as caught:
            work(lambda: 1)
        assert not isinstance(error, OSError) or files.is_disk_full(caught.value) == files.is_disk_full(error)
        assert getattr(caught.value, "filename", None) == (str(f) if (f := getattr(error, "filename", None)) else None)


def test_long_work_is_waited_for_before_a_collective_counts_its_time(
    failing: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    failing.append(UserError("other"))
    monkeypatch.setattr(dist, "wait_for_all", lambda: order.append("waited"))
    for is_long in (True, False):
        with pytest.raises(UserError):
            agreement.on_main_rank(lambda: order.append("worked"), is_long=is_long)
    assert order == ["worked", "waited", "worked"]
