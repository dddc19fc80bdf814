"""How a long function reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], object]
"""Called with the name of a step, how many of its parts are done, and how many there are.

A step that is not counted has one part. A step ends when the next one begins.
"""


def no_progress(step: str, done: int, total: int) -> None:
    """Report to nobody."""
