"""The images that settings are compared on: drawn from folders, and refused where they would compare nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patchcore_plugin.cleaning.files import ImageFacts, read_all_facts
from patchcore_plugin.depth import IntensityRange
from patchcore_plugin.errors import UsageError
from patchcore_plugin.images import ImageError
from patchcore_plugin.model.data_checks import check_proportions
from patchcore_plugin.names import as_line
from patchcore_plugin.progress import Progress, no_progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MIN_NORMAL = 20
"""Fewest normal images: half of them make a bank, and the others are scored by it."""

MIN_DEFECTIVE = 5
"""Fewest defective images: the standard error of fewer means nothing."""

NORMAL_LIMIT = 200
"""Normal images that are compared, at most."""

DEFECTIVE_LIMIT = 100
"""Defective images that are compared, at most."""

_NAMED = 3  # paths in a message


@dataclass(frozen=True)
class Images:
    """The images of a comparison.

    Attributes:
        normal: Paths of normal images, in random order.
        defective: Paths of defective images; empty where synthetic ones stand for them.
        intensity_range: Values of images deeper than 8 bits that become 0 and 255; None for images of 8 bits.
    """

    normal: list[Path]
    defective: list[Path]
    intensity_range: IntensityRange | None


def draw_images(
    normal: Sequence[Path],
    defective: Sequence[Path] = (),
    intensity_range: IntensityRange | None = None,
    region_size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Images:
    """Draw the images of a comparison, and read each once to check it.

    Of images with the same pixels the first alone is taken, as its copy would be known to the bank that it is scored by.

    Args:
        normal: Paths of normal images, sorted.
        defective: Paths of defective images, sorted; none for synthetic ones.
        intensity_range: The config's; None takes that of the normal images, where they are deep.
        region_size: Width and height of the mask image of a region of interest, which must fit all images.
        seed: Seed of the draw.
        progress: Called with each step.

    Raises:
        UsageError: If there are too few images, or one is normal and defective, or does not fit the region of interest.
        ImageError: If an image cannot be read, or the images are not all of 8 bits, nor all deeper.
    """
    rng = random.Random(seed)  # noqa: S311
    both = sorted(set(normal) & set(defective))
    if both:
        _refuse_both([(path, path) for path in both])
    drawn = [rng.sample(normal, min(len(normal), NORMAL_LIMIT)), rng.sample(defective, min(len(defective), DEFECTIVE_LIMIT))]
    facts = _read([*drawn[0], *drawn[1]], progress)
    check_proportions({image.path: image.size[::-1] for image in facts}, region_size)
    own, others = ({image.pixel_hash: image for image in reversed(facts) if image.path in set(paths)} for paths in drawn)
    both = [(own[pixels].path, others[pixels].path) for pixels in own if pixels in others]
    if both:
        _refuse_both(both)
    kept = [[image for image in facts if known.get(image.pixel_hash) is image] for known in (own, others)]
    _check_count(len(kept[0]), MIN_NORMAL, len(normal), "normal", "take more images.")
    if defective:
        way_out = "add some, or leave --defects out: synthetic defects stand for them then."
        _check_count(len(kept[1]), MIN_DEFECTIVE, len(defective), "defective", way_out)
    return Images(*([image.path for image in images] for images in kept), _range(kept[0], kept[1], intensity_range))


def _read(paths: Sequence[Path], progress: Progress) -> list[ImageFacts]:
    facts = read_all_facts(paths, "read", progress)
    bad = [image for image in facts if image.error]
    if bad:
        names = "".join(f"\n  {as_line(str(image.path))}: {image.error}" for image in bad[:_NAMED])
        more = f"\n  and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        msg = f"{len(bad)} of {len(paths)} images cannot be read; repair them, or take them out:{names}{more}"
        raise ImageError(msg)
    return facts


def _refuse_both(pairs: Sequence[tuple[Path, Path]]) -> None:
    names = "".join(
        f"\n  {as_line(str(one))}{'' if one == other else ' and ' + as_line(str(other))}" for one, other in pairs[:_NAMED]
    )
    more = f"\n  and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
    msg = f"{len(pairs)} images are among the normal and among the defective ones; take them out of one folder:{names}{more}"
    raise UsageError(msg)


def _check_count(count: int, needed: int, found: int, kind: str, way_out: str) -> None:
    if count < needed:
        copies = f" ({found - count} more have the pixels of another)" if found > count else ""
        msg = f"At least {needed} {kind} images are needed, and there are {count}{copies}: {way_out}"
        raise UsageError(msg)


def _range(
    normal: Sequence[ImageFacts], defective: Sequence[ImageFacts], intensity_range: IntensityRange | None
) -> IntensityRange | None:
    """The intensity range of images that are all of 8 bits, or all deeper."""
    images = [*normal, *defective]
    deep = [image for image in images if image.values is not None]
    flat = [image for image in images if image.values is None]
    if deep and flat:
        msg = (
            f"{as_line(str(deep[0].path))} is deeper than 8 bits ({deep[0].kind}), and {as_line(str(flat[0].path))} is not "
            f"({flat[0].kind}): a model reads one or the other."
        )
        raise ImageError(msg)
    if flat and intensity_range is not None:
        msg = f"The config has an intensity_range, which is for deeper images, and {as_line(str(flat[0].path))} has 8 bits."
        raise ImageError(msg)
    if flat or intensity_range is not None:
        return intensity_range
    low, high = min(image.values[0] for image in normal), max(image.values[1] for image in normal)
    if low == high:
        msg = f"All pixels of all normal images are {low:g}: there is nothing to compare."
        raise ImageError(msg)
    return IntensityRange(low, high)
