"""Checks of arguments: one function, which gets the bounds of an argument as data."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Literal

from patchcore_plugin.errors import UsageError


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    closed: Literal["both", "left", "right", "neither"] = "both",
    whole: bool = False,
    optional: bool = False,
    hint: str = "",
) -> None:
    """Refuse an argument that is not a finite number within its bounds.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Value of the argument.
        low: Lower bound.
        high: Upper bound.
        closed: Bounds that belong to the range.
        whole: Accept whole numbers only.
        optional: Accept ``None`` too.
        hint: One or two sentences: what the argument means, and a good value.

    Raises:
        UsageError: If the value is no such number; the message gives the argument's name, the value, the range and the hint.

    Example:
        >>> check_number("ratio", 2, 0, 1, closed="right", hint="0.1 keeps every tenth patch.")
        Traceback (most recent call last):
        UsageError: ratio must be a number in (0, 1], got 2. 0.1 keeps every tenth patch.
    """
    if optional and value is None:
        return
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool) and -math.inf < value < math.inf
    above = number and (value >= low if closed in ("both", "left") else value > low)
    below = number and (value <= high if closed in ("both", "right") else value < high)
    if not (above and below):
        kind = "a whole number" if whole else "a number" if math.isfinite(high - low) else "a finite number"
        allowed = f"{'None or ' if optional else ''}{kind}{_range(low, high, closed)}"
        msg = f"{name} must be {allowed}, got {value!r}.{hint and ' ' + hint}"
        raise UsageError(msg)


def _range(low: float, high: float, closed: str) -> str:
    if math.isfinite(low) and math.isfinite(high):
        left, right = "[" if closed in ("both", "left") else "(", "]" if closed in ("both", "right") else ")"
        return f" in {left}{low}, {high}{right}"
    if math.isfinite(low):
        return f" of at least {low}" if closed in ("both", "left") else f" above {low}"
    if math.isfinite(high):
        return f" of at most {high}" if closed in ("both", "right") else f" below {high}"
    return ""
