"""Text from models, files and arguments as data: nothing in it moves a cursor or turns a line round."""

from __future__ import annotations


def escaped(text: str, keep: str = "") -> str:
    """`text` with control, format and other unprintable characters (lone surrogates too) written as escapes, such as
    `\\x1b` or `\\u202e`; those in `keep` stay."""
    return "".join(char if char.isprintable() or char in keep else escape(char) for char in text)


def escape(char: str) -> str:
    """One character as Python would write it: `\\x07`, `\\u4e2d`, `\\U0001f600`."""
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, at most 200 characters; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
