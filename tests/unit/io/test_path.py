"""Where the user says that something is."""

from pathlib import Path

import pytest

from dumo.io.read import user_path
from dumo.types import UserError


def test_a_home_that_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_path("~/data", "data.root") == Path("/home/somebody/data")
    with pytest.raises(UserError, match=r"^data.root is ~no-such-user/data, and no such home is known"):
        user_path("~no-such-user/data", "data.root")
