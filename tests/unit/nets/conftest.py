"""Tiny models that diffusers saved."""

import pytest

from dumo.nets import Pretrained
from transformers_saved import Saved, saved


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Specs of tiny models, each saved once."""
    place, known = tmp_path_factory.mktemp("models"), dict[str, Pretrained]()

    def spec(name: str) -> Pretrained:
        if name not in known:
            known[name] = saved(place, name)
        return known[name]

    return spec
