"""One way to name a head, and the layer it stands in."""

from __future__ import annotations

from typing import NamedTuple

from common import UserError

ONLY_STACK = ""  # the stack of a model that has one: a causal language model


class Place(NamedTuple):
    """One attention layer: its stack (see `Head`) and its number, from 0."""

    stack: str
    layer: int


class _Fields(NamedTuple):
    stack: str
    layer: int
    head: int


class Head(_Fields):
    """One attention head: `layer` and `head` count from 0, `stack` is "" where the model has one stack, else `encoder`,
    `decoder` or `cross`. Printed `5.1`, or `cross 2.3`."""

    __slots__ = ()

    def __new__(cls, stack: str, layer: int, head: int | None = None) -> Head:
        """Raises UserError where the stack is left out, as `Head.at` allows."""
        if head is None or not isinstance(stack, str):
            given = ", ".join(repr(one) for one in (stack, layer, head) if one is not None)
            raise UserError(
                f'Head({given}) names no head: write Head.at(1, 0) or Head.parse("1.0") for head 0 of layer 1'
            )
        return super().__new__(cls, stack, layer, head)

    @classmethod
    def at(cls, layer: int, head: int, stack: str = ONLY_STACK) -> Head:
        """The head of that layer and number, as plain whole numbers."""
        return cls(stack, int(layer), int(head))

    @classmethod
    def parse(cls, text: object) -> Head:
        """The head that a string such as `5.1` or `cross 2.3` names. Raises UserError for anything else."""
        stack, _, numbers = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
        layer, dot, head = numbers.partition(".")
        if not (dot and _is_number(layer) and _is_number(head)):
            raise UserError(f'{text!r} is no head; write layer.head, such as "5.1"')
        return cls(stack, int(layer), int(head))

    @property
    def attention(self) -> Place:
        """The attention layer that the head is in."""
        return Place(self.stack, self.layer)

    @property
    def place(self) -> tuple[int, int]:
        """(layer, head): where the head stands in an array [layers, heads]."""
        return self.layer, self.head

    def __str__(self) -> str:
        numbers = f"{self.layer}.{self.head}"
        return f"{self.stack} {numbers}" if self.stack else numbers


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 6  # longer ones are no head and slow to read
