"""Text of others as data: it moves no cursor, turns no line round, and breaks none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.loading.escapes import escape, escaped, first_line


@given(st.text(st.characters()))
def test_what_is_escaped_is_printable(text):
    assert escaped(text).isprintable()


@given(st.text(st.characters(categories=["L", "N", "P"])))
def test_what_is_printable_stays(text):
    assert escaped(text) == text


@pytest.mark.parametrize(
    ("char", "shown"), [("\x1b", "\\x1b"), ("\u202e", "\\u202e"), ("\U000e0001", "\\U000e0001"), ("\ud800", "\\ud800")]
)
def test_an_escape_is_as_python_writes_it(char, shown):
    assert escape(char) == escaped(char) == shown


def test_what_is_kept_stays():
    assert escaped("a\nb\tc", keep="\n") == "a\nb\\x09c"


def test_the_first_line_of_an_error_is_what_it_says():
    assert first_line(ValueError("\n  what\nwhere")) == "what"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("x" * 500)) == "x" * 200
