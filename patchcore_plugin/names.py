"""File names as text: what UTF-8 cannot hold, what a terminal would obey, and what a spreadsheet would compute."""

from __future__ import annotations

# A spreadsheet takes a cell that begins so for a formula; the wide ones count where Chinese or Japanese is typed.
_FORMULA_BEGINS = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001
_QUOTE = "'"


def as_text(name: str) -> str:
    r"""A name in characters that UTF-8 can hold.

    A file name may have bytes that are no UTF-8. Python reads such a byte, E9 for example, as the character U+DCE9, which no
    text file can hold; it becomes the six characters ``\udce9``, as in JSON.

    Example:
        >>> as_text("caf\udce9.png")
        'caf\\udce9.png'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def as_line(text: str) -> str:
    r"""A text as one line that a terminal prints, and obeys nothing in it.

    Example:
        >>> as_line("a\x1b[31m.png")
        'a\\x1b[31m.png'
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def to_cell(text: str) -> str:
    """A text as a cell of a CSV file that no spreadsheet takes for a formula; :func:`from_cell` gives the text back.

    A ``'`` is put before a text that begins with ``=``, ``+``, ``-``, ``@``, one of these in full width, a tab, a line
    break, or a ``'``.

    Example:
        >>> to_cell("=1+1.png"), to_cell("a.png")
        ("'=1+1.png", 'a.png')
    """
    return _QUOTE + text if text.startswith((*_FORMULA_BEGINS, _QUOTE)) else text


def from_cell(cell: str) -> str:
    """The text of a cell that :func:`to_cell` made."""
    return cell.removeprefix(_QUOTE)
