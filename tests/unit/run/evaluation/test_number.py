"""Numbers are written so that they can be read."""

import pytest

from dumo.run.evaluation.number import large, number, spread


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1797, "1,797"), (True, "True"), ("hop", "hop"), (None, "–"), (float("nan"), "–"), (0.0, "0"),
        (2.3456, "2.35"), (94.04, "94.0"), (0.00835, "0.00835"), (1234.5, "1,234"), (-0.02, "−0.0200"),
        (4.87e-5, "4.87 · 10⁻⁵"), (-1.5e-10, "−1.50 · 10⁻¹⁰"), (3.2e7, "3.20 · 10⁷"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: object, text: str) -> None:
    assert number(value) == text


def test_spreads_and_large_numbers() -> None:
    assert spread(0.14208, 0.0206) == "0.142 ± 0.021"
    assert spread(-12.3, 4.56) == "−12.3 ± 4.6"
    assert (spread(0.5, 0.0), spread(None, None)) == ("0.500", "–")
    assert [large(x) for x in (742_856, 999, 7.58e6, 6.7779e8, 2e15)] == [
        "743\u00a0k", "999", "7.58\u00a0M", "678\u00a0M", "2,000\u00a0T",
    ]  # fmt: skip
