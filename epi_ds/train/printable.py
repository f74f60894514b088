"""What a model writes, as a terminal may be given it."""

from __future__ import annotations

_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    # Controls of 8 bits, among them the one that begins sequences: there are no pictures of them.
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
}


def printable(text: str) -> str:
    """Return a text with pictures in the place of its control characters, but for newlines and tabs.

    Sequences that begin with one would move the cursor, set the window's title or write into the clipboard.
    """
    return text.translate(_PICTURES)
