"""Arguments of FaissPatchcore, checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, get_args

import torch
from anomalib import PrecisionType

from patchcore_plugin.bundle import MAX_INPUT_SIDE, MAX_MEMBERS, Tiles
from patchcore_plugin.checks import check_number
from patchcore_plugin.coreset.sampler import BOUNDS as SAMPLER_BOUNDS
from patchcore_plugin.errors import UsageError
from patchcore_plugin.images import MAX_PIXELS
from patchcore_plugin.model.pre_processing import Normalization

_MEMBER = "{backbone: efficientnet_lite1, layers: [blocks.2, blocks.4]}"

BOUNDS: dict[str, dict[str, Any]] = {
    "coreset_sampling_ratio": SAMPLER_BOUNDS["ratio"],
    "coreset_radius": {**SAMPLER_BOUNDS["radius"], "optional": True},
    "coreset_projection": {**SAMPLER_BOUNDS["projection"], "optional": True},
    "random_state": {**SAMPLER_BOUNDS["random_state"], "optional": True},
    "outlier_rejection": {
        "low": 0, "closed": "right", "optional": True,
        "hint": "It is a number of standard deviations: 2 leaves out what is rare, 3 less, None nothing.",
    },
    "memory_budget": {
        "low": 0, "closed": "right", "optional": True,
        "hint": "4 lets the embeddings and the coreset take 4 GiB per process; leave it out to use the free memory.",
    },
}  # fmt: skip
"""Bounds of the model's numbers, for :func:`patchcore_plugin.checks.check_number`."""


def check_numbers(**values: Any) -> None:
    """Check numbers by the names of their arguments.

    Raises:
        UsageError: If a value is outside its :data:`BOUNDS`.
    """
    for name, value in values.items():
        check_number(name, value, **BOUNDS[name])


def dtype_of_bank(precision: str | PrecisionType) -> torch.dtype:
    """Type of the memory bank's vectors; a UsageError if ``precision`` names none."""
    value = precision.value if isinstance(precision, PrecisionType) else str(precision).lower()
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    if value not in dtypes:
        msg = f"precision must be 'float32' or 'float16', got {precision!r}."
        raise UsageError(msg)
    return dtypes[value]


def dtype_of_embeddings(name: str) -> torch.dtype:
    """Type in which training holds embeddings; a UsageError if ``name`` is none."""
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        msg = f"embedding_dtype must be one of {', '.join(map(repr, dtypes))} or None, got {name!r}."
        raise UsageError(msg)
    return dtypes[name]


def check_image_size(value: Any, name: str = "image_size") -> tuple[int, int]:
    """Height and width as plain numbers.

    Raises:
        UsageError: Unless ``value`` is two whole numbers, each a length that a bundle's network may have, and no more pixels
            than those of the largest image that is decoded.
    """
    size = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if len(size) != 2 or any(isinstance(side, bool) or not isinstance(side, Integral) or side < 1 for side in size):
        msg = f"{name} must be a height and a width in pixels, e.g. [256, 256], got {value!r}."
        raise UsageError(msg)
    if max(size) > MAX_INPUT_SIDE or size[0] * size[1] > MAX_PIXELS:
        msg = (
            f"{name} may have sides of up to {MAX_INPUT_SIDE:,} pixels, and up to {MAX_PIXELS:,} pixels in all, got "
            f"{value!r}. Each pixel takes memory in every layer: begin with [256, 256]."
        )
        raise UsageError(msg)
    return int(size[0]), int(size[1])


def check_tiles(tile_size: Any, tile_stride: Any) -> Tiles | None:
    """The tiles of the arguments ``tile_size`` and ``tile_stride``; None without any.

    Raises:
        UsageError: Unless both are a length, or a height and a width, in pixels, and the stride is no larger than the size;
            or if there is a stride without a size.
    """
    if tile_size is None:
        if tile_stride is not None:
            msg = f"tile_stride={tile_stride!r} has no meaning without tile_size."
            raise UsageError(msg)
        return None
    size, stride = (
        check_image_size([value, value] if isinstance(value, Integral) else value, name)
        for name, value in {"tile_size": tile_size, "tile_stride": tile_size if tile_stride is None else tile_stride}.items()
    )
    if stride[0] > size[0] or stride[1] > size[1]:
        msg = f"tile_stride must be at most tile_size, {list(size)}, got {list(stride)}: it would leave pixels out."
        raise UsageError(msg)
    return Tiles(size=size, stride=stride)


def check_normalization(value: Any) -> None:
    """Raise a UsageError unless ``value`` names a normalization, or is None."""
    if value is not None and value not in get_args(Normalization):
        msg = f"normalization must be None or one of {', '.join(map(repr, get_args(Normalization)))}, got {value!r}."
        raise UsageError(msg)


def check_ensemble(members: Any) -> list[dict[str, Any]] | None:
    """Further members of an ensemble as plain dictionaries; None without any.

    Raises:
        UsageError: Unless ``members`` is a list of dictionaries, each with a backbone, and layers or weights where they are
            not those of the model.
    """
    if members is None:
        return None
    if isinstance(members, str | dict) or not isinstance(members, Iterable):
        msg = f"ensemble must be a list of further members such as {_MEMBER}, got {members!r}."
        raise UsageError(msg)
    members = [dict(member) if isinstance(member, Mapping) else member for member in members]
    if len(members) > MAX_MEMBERS - 1:
        msg = f"An ensemble has at most {MAX_MEMBERS} members, the model's own backbone among them; got {len(members)} more."
        raise UsageError(msg)
    for member in members:
        known = isinstance(member, dict) and {"backbone"} <= member.keys() <= {"backbone", "layers", "backbone_weights"}
        if not known or not isinstance(member["backbone"], str):
            msg = (
                f"A member of the ensemble has a backbone, and may have layers and backbone_weights, as in {_MEMBER}; got "
                f"{member!r}."
            )
            raise UsageError(msg)
        layers, weights = member.get("layers"), member.get("backbone_weights")
        if layers is not None and not isinstance(layers, str):
            member["layers"] = (
                list(layers) if isinstance(layers, Iterable) else layers
            )  # the backbone refuses what is no list
        if weights is not None:
            member["backbone_weights"] = str(weights)
    return members or None
