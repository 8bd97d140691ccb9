import pytest

from dumo import runtime


def test_an_optional_package_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    monkeypatch.setattr(runtime.metadata, "requires", lambda name: ["numpy; extra == 'new'"])
    assert runtime.require("numpy", "new", "net") is numpy
