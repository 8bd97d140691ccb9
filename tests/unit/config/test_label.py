"""A label is a class by its name or its number."""

import pytest

from dumo.config import label
from dumo.types import UserError


def test_a_name_with_commas_is_one_label() -> None:
    names = ["Paris, France", "Rome", "Paris"]
    assert label.split_labels("Paris, France,Rome,Paris,1", names) == ["Paris, France", "Rome", "Paris", "1"]


@pytest.mark.parametrize(("name", "typed"), [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")])
def test_a_name_is_found_in_either_form_of_unicode(name: str, typed: str) -> None:
    assert label.label_index(typed, ["bar", name], 2) == 1
    with pytest.raises(UserError, match="did you mean 'caf\u00e9'"):
        label.label_index(f"{typed}s", ["bar", name], 2)
