"""File names as text: for a file in UTF-8, a terminal, and a spreadsheet."""

import os

import pytest

from patchcore_plugin.names import as_line, as_text, from_cell, to_cell


@pytest.mark.parametrize(
    ("name", "text"),
    [("part ä.png", "part ä.png"), (os.fsdecode(b"caf\xe9.png"), r"caf\udce9.png"), ("\ud800", r"\ud800")],
)
def test_as_text(name, text):
    assert as_text(name) == text
    assert text.encode()


@pytest.mark.parametrize(
    ("text", "line"),
    [("a [red].png", "a [red].png"), ("a\x1b[31m\n.png", r"a\x1b[31m\n.png"), ("\udce9\u202e", r"\udce9\u202e")],
)
def test_as_line(text, line):
    assert as_line(text) == line


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠", "'", "'=", "''"])  # noqa: RUF001
def test_formulas(begin):
    text = f"{begin}1+1.png"
    assert to_cell(text) == f"'{text}"
    assert from_cell(to_cell(text)) == text
    assert from_cell(to_cell(f"a{text}")) == to_cell(f"a{text}") == f"a{text}"
