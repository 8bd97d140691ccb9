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

    def gather(answers: list[object], mine: object) -> None:
        answers[:] = [mine, (None, agreement.packed(errors[-1]))]

    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return errors


def test_the_system_s_refusal_names_its_file(failing: list[Exception]) -> None:
    failing.append(PermissionError(errno.EACCES, "Permission denied", Path("a/b")))
    with pytest.raises(PermissionError) as caught:
        agreement.agreed(lambda: 1)
    assert (caught.value.strerror, caught.value.filename) == ("Permission denied", "a/b")


def test_a_full_disk_stays_one(failing: list[Exception]) -> None:
    failing.append(OSError(errno.EDQUOT, "Disk quota exceeded"))
    with pytest.raises(OSError, match="quota") as caught:
        agreement.agreed(lambda: 1)
    assert files.full(caught.value)
    assert caught.value.filename is None


def test_others_are_told_by_rank(failing: list[Exception]) -> None:
    failing += [UserError("this is wrong"), KeyError("x")]
    with pytest.raises(RuntimeError, match="rank 1: KeyError: 'x'"):
        agreement.own(lambda: 1)
    failing.pop()
    with pytest.raises(UserError, match=r"^this is wrong$"):
        agreement.own(lambda: 1)
