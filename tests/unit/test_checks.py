"""Checks of numbers: what is refused, and what is said."""

import math

import numpy as np
import pytest

from patchcore_plugin.checks import check_number


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (0, {"low": 0}),
        (1, {"low": 0, "high": 1, "closed": "right"}),
        (0.0, {"low": 0, "high": 1, "closed": "left"}),
        (np.float32(0.5), {"low": 0, "high": 1, "closed": "neither"}),
        (np.int64(3), {"low": 1, "whole": True}),
        (10**400, {"low": 0}),
        (None, {"low": 0, "optional": True}),
        (-1e300, {}),
    ],
)
def test_accepted(value, bounds):
    check_number("size", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-1, {"low": 0}, "size must be a finite number of at least 0, got -1."),
        (0, {"low": 0, "closed": "right"}, "size must be a finite number above 0, got 0."),
        (5, {"high": 4}, "size must be a finite number of at most 4, got 5."),
        (4, {"high": 4, "closed": "left"}, "size must be a finite number below 4, got 4."),
        (2, {"low": 0, "high": 1}, "size must be a number in [0, 1], got 2."),
        (0, {"low": 0, "high": 1, "closed": "right"}, "size must be a number in (0, 1], got 0."),
        (1, {"low": 0, "high": 1, "closed": "left"}, "size must be a number in [0, 1), got 1."),
        (1, {"low": 0, "high": 1, "closed": "neither"}, "size must be a number in (0, 1), got 1."),
        (1.5, {"low": 1, "whole": True}, "size must be a whole number of at least 1, got 1.5."),
        (True, {"low": 1, "whole": True}, "size must be a whole number of at least 1, got True."),
        (True, {}, "size must be a finite number, got True."),
        (math.nan, {}, "size must be a finite number, got nan."),
        (math.inf, {"low": 0}, "size must be a finite number of at least 0, got inf."),
        (None, {"low": 0}, "size must be a finite number of at least 0, got None."),
        ("3", {"low": 0, "optional": True}, "size must be None or a finite number of at least 0, got '3'."),
        (-1, {"low": 0, "hint": "3 is a good one."}, "size must be a finite number of at least 0, got -1. 3 is a good one."),
    ],
)
def test_refused(value, bounds, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        check_number("size", value, **bounds)
    assert str(caught.value) == message
