"""Makes text of unknown origin harmless for a terminal.

What an agent says, and what it read somewhere, may hold escape sequences: they would move the
cursor, rename the window or write to the clipboard of whoever looks on.
"""

import re

# Control characters but tab and line feed; DEL; C1; marks that turn the direction of writing;
# halves of characters, which cannot be written at all.
_DANGEROUS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def clean(text: str) -> str:
    """Return the text with every dangerous character replaced by a visible one."""
    return _DANGEROUS.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def clean_line(text: str, longest: int | None = None) -> str:
    """Return the text on one line, cut to `longest` characters."""
    line = " ".join(clean(text).split())
    return line if longest is None or len(line) <= longest else line[: longest - 1] + "…"
