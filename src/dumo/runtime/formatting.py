"""Format numbers for users, and escape untrusted text for the terminal.

`number_text`, `bytes_text`, `duration_text`, `minutes_text` and `nfe_text` write numbers.
`escape_controls` and `escape_line` escape terminal control characters.
"""

import re

SECONDS_PER_HOUR = 3600

# Characters that move the cursor, colour, break or turn round a line, and halves of characters, which cannot be printed
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def number_text(value: float) -> str:
    """Return a number with three significant digits, or with all digits before the point: 0.123, 1,234, -5,000."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bytes_text(size: float, base: int = 1000) -> str:
    """Return a number of bytes as text: 1.23 GB, or, with base 1024, 1.23 GiB."""
    units = ("KiB", "MiB", "GiB", "TiB", "PiB") if base == 1024 else ("kB", "MB", "GB", "TB", "PB")
    power = 1
    while power < len(units) and size >= 999.5 * base**power:
        power += 1
    return f"{number_text(size / base**power)} {units[power - 1]}"


def duration_text(seconds: float) -> str:
    """Format seconds as h:mm:ss, such as 1:02:03, or as m:ss, such as 2:03 or -2:03."""
    whole_seconds = round(seconds)
    sign = "-" if whole_seconds < 0 else ""
    hours, rest = divmod(abs(whole_seconds), SECONDS_PER_HOUR)
    minutes, seconds_left = divmod(rest, 60)
    if hours:
        return f"{sign}{hours}:{minutes:02}:{seconds_left:02}"
    return f"{sign}{minutes}:{seconds_left:02}"


def minutes_text(minutes: float) -> str:
    """Format minutes in words: 9 seconds, 1 minute, 31.7 minutes."""
    if minutes < 1:
        seconds = max(1, round(60 * minutes))
        return "1 second" if seconds == 1 else f"{seconds} seconds"
    rounded = round(minutes, 1)
    return "1 minute" if rounded == 1 else f"{rounded:g} minutes"


def nfe_text(n: int) -> str:
    """Format an NFE: 1 NFE, 2 NFE."""
    return f"{n} NFE"


def escape_controls(text: str) -> str:
    """Escape the control characters of a text, except line breaks, so that a file name cannot control the terminal."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def escape_line(text: str) -> str:
    """Escape the control characters and line breaks of a text."""
    return escape_controls(text).replace("\n", r"\n")
