"""What is written is read back, whatever it is; a key that occurs twice, and what is no plain value, is refused."""

from contextlib import suppress

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dumo.io.yaml import dump_yaml, parse_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
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


REFUSED = [
    ("{a: 1, b: 2, a: 3}", "key a stands there twice"),
    ("{~: a, b: {c: 1, c: 2}}", "key c stands there twice"),
    ("{<<: {a: 1}, <<: {b: 2}}", "key << stands there twice"),
    ("{<<: {a: 1, a: 2}}", "key a stands there twice"),
    ("[&m {x: 1, x: 2}, *m]", "key x stands there twice"),
    ("!!int x", "invalid literal"),
    ("!!python/object/apply:os.system [exit]", "python"),
    ("? [a]\n: b", "unhashable"),
    ("\ta: b", "cannot start"),
    ("a\n---\nb", "single document"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[text[:20] for text, _ in REFUSED])
def test_refused(text: str, said: str) -> None:
    with pytest.raises(yaml.YAMLError, match=said):
        parse_yaml(text)
