from importlib import metadata

import numpy
import pytest

from dumo import runtime
from dumo.types import UserError


def test_a_version_that_an_extra_does_not_allow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy<99,>=98; extra == 'old'", "numpy; extra == 'new'"])
    with pytest.raises(UserError, match=rf"^net needs numpy<99,>=98, and {numpy.__version__} is installed: pip "):
        runtime.require("numpy", "old", "net")
    assert runtime.require("numpy", "new", "net") is numpy


def test_what_is_missing_is_named_with_all_packages_of_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "installed_version", lambda name: None)
    with pytest.raises(UserError, match=r"^net needs transformers, which is .* pip install .*'transformers<"):
        runtime.require("transformers", "text", "net")
