"""Numbers as a page writes them."""

from math import floor, log10


def number(value: object) -> str:
    """Three significant digits, no exponent unless it is needed, a dash for nothing; other things as they are."""
    if value is None or value != value:
        return "–"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or not value or 100 <= abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", "−")
    power = floor(log10(abs(value)))
    if -4 < power < 6:
        return f"{value:.{max(0, 2 - power)}f}".replace("-", "−")
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 10**power:.2f}".replace("-", "−") + f" · 10{raised}"


def large(value: float | int) -> str:
    """Three significant digits and k, M, G or T for a power of a thousand."""
    power = min(4, floor(log10(value) / 3)) if value >= 1000 else 0
    return f"{number(value / 1000**power)}\u00a0{'kMGT'[power - 1]}" if power else number(value)


def spread(value: float | None, sd: float | None) -> str:
    """A number with its spread, to two digits of the spread."""
    if value is None or not sd or sd < 0:
        return number(value)
    digits = max(0, 1 - floor(log10(sd)))
    return f"{value:.{digits}f} ± {sd:.{digits}f}".replace("-", "−")
