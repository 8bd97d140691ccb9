"""What `dumo.testing` refuses: one case per row, with the names that the message must contain."""

import pytest

from dumo.testing.exact import APART, ExactNet
from dumo.types import Needs, UserError

CASES = [
    (Needs(heads=("slope", "chord")), "chord, slope"),
    (Needs(inputs=("t", "s")), "define s:"),
]


@pytest.mark.parametrize(("needs", "names"), CASES)
def test_refused(needs: Needs, names: str) -> None:
    with pytest.raises(UserError, match=names):
        ExactNet(APART, needs)
