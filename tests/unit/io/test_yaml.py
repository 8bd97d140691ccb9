"""What is written is read back, whatever it is; what asks for too much, or is no plain value, is refused soon."""

from contextlib import suppress
from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dumo.io.yaml import MAX_DEPTH, MAX_DIGITS, MAX_SLOW_CHARACTERS, dump_yaml, parse_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\ufeff"))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=8)
FEW = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@pytest.mark.nightly
@FEW
@given(VALUES, st.booleans())
def test_what_is_dumped_is_parsed(value: object, flow: bool) -> None:
    assert parse_yaml(dump_yaml(value, flow=flow)) == value


@FEW
@given(st.text(st.sampled_from("{}[]&*!|>%@`\"'#:,-?<= \t\n\0\\xea0129.~\ud800\u00e9"), max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with suppress(yaml.YAMLError):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["1e5", "1E-4", "-3e+2", "2024-01-01", "yes", "null", "012", "1_0", "~", "=", "<<"])
def test_a_text_that_looks_like_another_value(text: str) -> None:
    assert parse_yaml(dump_yaml({text: [text]})) == {text: [text]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-1.5E+3", -1500.0),
        ("1e", "1e"),
        ("0x10", 16),
        ("2024-99-99", "2024-99-99"),
        ('"\\ud83d\\ude42"', "🙂"),
        ("\ufeffa: 1", {"a": 1}),
        ("{<<: {a: 1, b: 2}, a: 3}", {"a": 3, "b": 2}),
        ("[&a {x: 1}, *a]", [{"x": 1}, {"x": 1}]),
        # an anchor that overrides what it merges, and is itself merged by a mapping that lies less deep
        ("a: [[&m {<<: {x: 1}, x: 2}]]\nb: {<<: *m}", {"a": [[{"x": 2}]], "b": {"x": 2}}),
        ('{"<<": 1, <<: {a: 1}}', {"<<": 1, "a": 1}),
        ("{=: 1}", {"=": 1}),
    ],
)
def test_values(text: str, value: object) -> None:
    assert parse_yaml(text) == value


def laughs(line: str) -> str:
    """Nine lines, each ten times the one before."""
    return "\n".join(["a: &a {x: 1}", *(line.format(n, ",".join([f"*{o}"] * 10)) for o, n in pairwise("abcdefghi"))])


REFUSED = [
    ("{a: 1, b: 2, a: 3}", "key a stands there twice"),
    ("{1: a, 0x1: b}", "key 0x1 stands there twice"),
    ("{1: a, true: b}", "key true stands there twice"),
    ("{~: a, null: b}", "key null stands there twice"),
    ("{=: 1, '=': 2}", "key = stands there twice"),
    ("{<<: {a: 1}, <<: {b: 2}}", "key << stands there twice"),
    ("{<<: {a: 1, a: 2}}", "key a stands there twice"),
    ("{? !!seq x : 1}", "unhashable|sequence"),
    ("!!map x", "mapping"),
    ("!!bool x", "neither true nor false"),
    ("!!int x", "no number"),
    ("!!int ''", "no number"),
    ("!!float x", "no number"),
    ("!!binary eA==", "binary"),
    ("!!set {a}", "set"),
    ("!!python/object/apply:os.system [exit]", "python"),
    ("9" * (MAX_DIGITS + 1), "a number of"),
    ("0x" + "f" * 5000, "a number of"),
    ("1" + ":01" * 100_000, "a number of"),
    ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deep"),
    ("[" * 2000, "deep"),
    ("{a: " * 100_000, "deep"),
    ("- " * 100_000, "deep"),
    (laughs("{0}: &{0} [{1}]"), "aliases"),
    (laughs("{0}: &{0} {{<<: [{1}]}}"), "aliases"),
    ("&a [*a]", "aliases"),
    (f"a: &a {'x' * 10_000}\nb: [{'*a,' * 1000}]", "aliases"),
    ("'" * (MAX_SLOW_CHARACTERS + 1), "quoted"),
    ("a\0b", "special characters"),
    ("\udcff", "special characters"),
    ('"\\ud800"', "utf-16"),
    ("\ta: b", "cannot start"),
    ("? [a]\n: b", "unhashable"),
    ("a\n---\nb", "single document"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[text[:20] for text, _ in REFUSED])
def test_refused(text: str, said: str) -> None:
    with pytest.raises(yaml.YAMLError, match=said):
        parse_yaml(text)


def test_depth_that_is_read() -> None:
    nested = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert dump_yaml(parse_yaml(nested), flow=True).strip() == nested
