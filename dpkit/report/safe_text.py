"""Text that came with a run (names, caveats, settings), made safe to print in a page or in Markdown.

Guarantees: no character that hides or reorders its neighbours is left; nothing in it is read as a ledger anchor; in
Markdown it stays inside its line and its text, whatever punctuation, markup or address it holds.

Not promised: that it is true, or short.
"""

from __future__ import annotations

import html
import re
import unicodedata

# What `dpkit verify` looks for in a file: "entry <sequence>, <64 hex digits>". A line break may stand for the space.
_ANCHOR_COMMA = re.compile(r"(entry\s+\d+\s*),(?=\s*[0-9a-f]{64})", re.IGNORECASE)
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_MARKDOWN = re.compile(r"([\\`*_\[\]~|#$])")


def visible(text: str) -> str:
    """``text`` with every control, formatting and surrogate character but line breaks and tabs shown as U+FFFD."""
    return "".join("�" if unicodedata.category(c) in _INVISIBLE and c not in "\n\t" else c for c in text)


def without_anchor(text: str, comma: str) -> str:
    """``text`` with ``comma`` in place of the comma of whatever looks like an anchor."""
    return _ANCHOR_COMMA.sub(rf"\1{comma}", text)


def in_html(text: str) -> str:
    """``text`` as HTML that shows it, for element content and quoted attributes."""
    return without_anchor(html.escape(visible(text)), "&#44;")


def in_markdown(text: str) -> str:
    """``text`` as inline Markdown that shows it, on one line."""
    escaped = html.escape(" ".join(visible(text).split()), quote=False)
    escaped = _MARKDOWN.sub(r"\\\1", escaped)
    # Readers such as GitHub's turn bare addresses and names into links.
    for sign, entity in (("://", "&#58;//"), ("www.", "www&#46;"), ("@", "&#64;")):
        escaped = escaped.replace(sign, entity)
    return without_anchor(escaped, "&#44;")


def fenced(text: str) -> str:
    """``text`` as a fenced code block that it cannot close."""
    text = visible(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"
