"""Checks of arguments."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from patchcore_plugin.errors import UsageError


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    closed: str = "both",
    whole: bool = False,
    hint: str = "",
) -> None:
    """Refuse an argument that is not a finite number within its bounds.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Its value.
        low: Lower bound.
        high: Upper bound.
        closed: Bounds that belong to the range: ``"both"``, ``"left"``, ``"right"`` or ``"neither"``.
        whole: Accept integers only.
        hint: Sentence that tells what the argument means, and a good value.

    Raises:
        UsageError: If the value is no such number; the message names the argument, the value and the range.
    """
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool) and math.isfinite(value)
    above = number and (value >= low if closed in ("both", "left") else value > low)
    below = number and (value <= high if closed in ("both", "right") else value < high)
    if not (above and below):
        kind = "a whole number" if whole else "a finite number"
        msg = f"{name} must be {kind}{_range(low, high, closed)}, got {value!r}.{hint and ' ' + hint}"
        raise UsageError(msg)


def _range(low: float, high: float, closed: str) -> str:
    if math.isfinite(low) and math.isfinite(high):
        left, right = "[" if closed in ("both", "left") else "(", "]" if closed in ("both", "right") else ")"
        return f" in {left}{low:g}, {high:g}{right}"
    if math.isfinite(low):
        return f" of at least {low:g}" if closed in ("both", "left") else f" above {low:g}"
    if math.isfinite(high):
        return f" of at most {high:g}" if closed in ("both", "right") else f" below {high:g}"
    return ""
