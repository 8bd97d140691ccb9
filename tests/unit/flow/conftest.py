"""Ranks that are simulated one after the other in one process."""

import pytest

from dumo.runtime import dist


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks whose batches are alike, so each knows what the other would answer."""
    monkeypatch.setattr(dist, "all_values", lambda value: [value, value])
