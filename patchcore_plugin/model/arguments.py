"""Arguments of FaissPatchcore, checked before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, get_args

import torch
from anomalib import PrecisionType

from patchcore_plugin.model.pre_processing import Normalization


def dtype_of_bank(precision: str | PrecisionType) -> torch.dtype:
    """Type of the memory bank; a ValueError if ``precision`` names none."""
    value = precision.value if isinstance(precision, PrecisionType) else str(precision).lower()
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    if value not in dtypes:
        msg = f"precision must be 'float32' or 'float16', got {precision!r}."
        raise ValueError(msg)
    return dtypes[value]


def dtype_of_embeddings(name: str) -> torch.dtype:
    """Type in which training holds embeddings; a ValueError if ``name`` is none."""
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        msg = f"embedding_dtype must be one of {', '.join(map(repr, dtypes))} or None, got {name!r}."
        raise ValueError(msg)
    return dtypes[name]


def check_image_size(value: Any) -> tuple[int, int]:
    """Height and width as plain numbers; a ValueError unless ``value`` is two whole numbers of at least 1."""
    size = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if len(size) != 2 or any(isinstance(side, bool) or not isinstance(side, Integral) or side < 1 for side in size):
        msg = f"image_size must be a height and a width in pixels, e.g. [256, 256], got {value!r}."
        raise ValueError(msg)
    return int(size[0]), int(size[1])


def check_normalization(value: Any) -> None:
    """Raise a ValueError unless ``value`` names a normalisation."""
    if value not in get_args(Normalization):
        msg = f"normalization must be one of {', '.join(map(repr, get_args(Normalization)))}, got {value!r}."
        raise ValueError(msg)


def check_position_weight(value: Any) -> None:
    """Raise a ValueError unless ``value`` is a finite distance of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        msg = (
            f"position_weight must be a finite number of at least 0, got {value!r}. It is the distance, in feature units, "
            "by which patches at opposite edges of the image differ through their place alone; 0 leaves the place out."
        )
        raise ValueError(msg)


def check_smoothing(value: Any) -> None:
    """Raise a ValueError unless ``value`` is a finite number of patches of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        msg = (
            f"score_smoothing must be a finite number of at least 0, got {value!r}. It is the standard deviation of a "
            "Gaussian, in patches: 1 smooths over about five by five of them, 0 not at all."
        )
        raise ValueError(msg)
