"""How a head is named, read and ordered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from common.attention.head import ONLY_STACK, Head, Place


def test_a_head_without_its_stack_says_how_it_is_written():
    for numbers in ((1, 0), (1, 0, 2), ("1", 0)):
        with pytest.raises(UserError, match=r"write Head\.at\(1, 0\) or Head\.parse"):
            Head(*numbers)


NUMBERS = st.integers(0, 999)


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("5.1", Head("", 5, 1)),
        ("0.0", Head("", 0, 0)),
        ("12.10", Head("", 12, 10)),
        ("cross 2.3", Head("cross", 2, 3)),
        ("encoder 0.11", Head("encoder", 0, 11)),
    ],
)
def test_a_head_reads_as_it_prints(text, head):
    assert Head.parse(text) == head
    assert str(head) == text


@given(st.sampled_from(["", "encoder", "decoder", "cross", "vision"]), NUMBERS, NUMBERS)
def test_every_head_comes_back_from_its_name(stack, layer, head):
    assert Head.parse(str(Head(stack, layer, head))) == (stack, layer, head)


@pytest.mark.parametrize(
    "text",
    ["", "5", "5.", ".1", "5.1.2", "a.b", "-1.0", "5.-1", " ", "5,1", "٣.١", "1" * 7 + ".0", "cross", None, 5.1],
)
def test_what_is_no_head_is_refused_in_one_line_that_quotes_it(text):
    with pytest.raises(UserError) as error:
        Head.parse(text)
    assert repr(text) in str(error.value) and 'such as "5.1"' in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_head_of_a_causal_model_has_plain_numbers():
    head = Head.at(np.int64(2), np.int64(3))
    assert head == ("", 2, 3) and type(head.layer) is type(head.head) is int
    assert Head.at(2, 3, "cross") == Head("cross", 2, 3) != head


def test_where_a_head_stands():
    head = Head("cross", 2, 3)
    assert head.place == (2, 3) and head.attention == Place("cross", 2)
    assert np.arange(20).reshape(4, 5)[head.place] == 13


def test_heads_are_in_the_order_of_layers_and_then_heads():
    """By number, not by name: 10.0 comes after 9.1."""
    names = ["10.0", "9.1", "0.10", "0.9", "9.0"]
    assert [str(head) for head in sorted(map(Head.parse, names))] == ["0.9", "0.10", "9.0", "9.1", "10.0"]


def test_heads_are_keys_and_two_stacks_are_two_heads():
    heads = {Head.at(1, 2), Head.parse("1.2"), Head("encoder", 1, 2)}
    assert len(heads) == 2 and Head(ONLY_STACK, 1, 2) in heads
