"""The library transformers where it is missing, and where it is there and broken."""

import pytest

from dumo import runtime
from dumo.encoders.transformers_library import import_transformers
from dumo.types import UserError


def test_a_missing_library_is_answered_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "installed_version", lambda name: None)
    with pytest.raises(UserError, match=r"^net\.texts needs transformers: .*install"):
        import_transformers("net.texts")


@pytest.mark.parametrize(
    "error", [ImportError("tokenizers>=0.22 is required"), ModuleNotFoundError("No module named 'x'", name="x")]
)
def test_a_library_that_is_broken_is_not_to_be_installed(error: ImportError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(runtime, "import_module", fail)
    with pytest.raises(UserError, match=f"^net.texts needs transformers, whose import failed: {error}$"):
        import_transformers("net.texts")
