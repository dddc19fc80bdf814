"""Is a folder of normal images what it should be? All that speaks against it, without a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.cleaning.embedding import DEFAULT_ARGUMENTS, Held
from patchcore_plugin.cleaning.evidence import SUSPICIOUS_SCORE, Evidence, find_evidence, largest_mean, robust_scale
from patchcore_plugin.cleaning.files import ImageFacts, find_copies, find_odd, read_all_facts
from patchcore_plugin.depth import IntensityRange
from patchcore_plugin.images import ImageError
from patchcore_plugin.model.data_checks import have_same_proportions
from patchcore_plugin.model.embedder import Embedder
from patchcore_plugin.model.region import check_region, mask_size
from patchcore_plugin.progress import Progress, no_progress
from patchcore_plugin.scoring.scores import ScoreRule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from patchcore_plugin.bundle import RegionOfInterest

MIN_IMAGES = 10
"""Fewest comparable images that are ranked: with fewer, what is usual is unknown."""

WORST_IMAGES = 20
"""Images that the report shows, at most."""

LEFT_OUT = "unreadable", "unlike the mask", "suspicious", "copy", "in the test folder"
"""Findings whose images the list names; of copies the first image stays."""


@dataclass(frozen=True)
class Finding:
    """Something that speaks against an image.

    Attributes:
        image: The image.
        kind: One of :data:`LEFT_OUT`, ``"odd size"`` or ``"odd depth"``.
        text: The finding in words.
        like: The other image that it is like; None where there is none.
    """

    image: Path
    kind: str
    text: str
    like: Path | None = None


@dataclass(frozen=True)
class CheckReport:
    """What was found.

    Attributes:
        images: All images, sorted.
        findings: What speaks against them.
        ranked: The images that were compared, most suspicious first.
        scores: Their scores: robust standard deviations above the median.
        suspects: The worst of them, for pictures.
        map_limit: Deviation that the worst patches of most images stay below.
        intensity_range: Values of deep images that become 0 and 255; None for images of 8 bits.
        region: Pixels of the network's input that were compared; None where all were.
    """

    images: list[Path]
    findings: list[Finding]
    ranked: list[Path]
    scores: list[float]
    suspects: list[Suspect]
    map_limit: float
    intensity_range: IntensityRange | None
    region: RegionOfInterest | None = None

    @property
    def leave_out(self) -> list[Path]:
        """The images that a training should do without, sorted."""
        return sorted({finding.image for finding in self.findings if finding.kind in LEFT_OUT})


@dataclass(frozen=True)
class Suspect:
    """One of the worst images.

    Attributes:
        image: The image.
        score: Its score.
        map: Deviations (h, w) of its patches, 0 outside the region of interest.
        place: Row and column of its worst patch.
        like: The image with the nearest likeness of that patch.
        like_place: Row and column there.
    """

    image: Path
    score: float
    map: np.ndarray
    place: tuple[int, int]
    like: Path
    like_place: tuple[int, int]


def check_images(
    images: Sequence[Path],
    test_images: Sequence[Path] = (),
    arguments: Mapping[str, Any] = DEFAULT_ARGUMENTS,
    seed: int = 0,
    progress: Progress = no_progress,
) -> CheckReport:
    """Check normal images.

    Args:
        images: Paths of images that should be normal, sorted.
        test_images: Paths of images that must not be among them.
        arguments: Arguments of FaissPatchcore, whose backbone compares them, in its region of interest. Without an
            ``intensity_range``, the least and the largest value of all become 0 and 255 of deep images.
        seed: Seed of the patches that are compared with.
        progress: Called with each step.

    Raises:
        UsageError: If the backbone or a layer is unknown, or another argument is wrong.
        ImageError: If the mask image of a region of interest is none.
    """
    embedder = Embedder(arguments, len(images))  # first: a wrong name is reported before the long work
    mask = mask_size(check_region(arguments.get("region_of_interest")))
    facts = read_all_facts(images, "read", progress)
    readable = [image for image in facts if not image.error]
    findings = [Finding(image.path, "unreadable", image.error) for image in facts if image.error]
    unlike = {image.path: finding for image in readable if mask and (finding := _unlike_mask(image, mask))}
    findings += unlike.values()
    readable = [image for image in readable if image.path not in unlike]
    copies = find_copies(readable)
    for number, (like, words) in copies.items():
        findings.append(Finding(readable[number].path, "copy", words, readable[like].path))
    if test_images:
        tests = [image for image in read_all_facts(test_images, "read test images", progress) if not image.error]
        for number, (like, words) in find_copies(readable, tests).items():
            findings.append(Finding(readable[number].path, "in the test folder", words, tests[like].path))
    findings += _odd(readable)
    originals = [image for number, image in enumerate(readable) if number not in copies]
    deep = 2 * sum(image.values is not None for image in originals) > len(originals)
    compared = [image for image in originals if (image.values is not None) == deep]
    if len(compared) < MIN_IMAGES:
        return CheckReport(list(images), findings, [], [], [], 0, None)
    span = (embedder.intensity_range or _range(compared)) if deep else None
    paths, rule = [image.path for image in compared], ScoreRule(region=embedder.region)
    grid = next(embedder.stream(paths, span)).shape[:2]
    embed = Held(lambda start: (rule.inspected(found[None])[0] for found in embedder.stream(paths, span, start)))
    evidence = _on_grid(find_evidence(embed, len(paths), seed, progress), rule, grid)
    middle, deviation = robust_scale(largest_mean(rule.inspected(evidence.maps[..., None]).reshape(len(paths), -1)))
    order = np.argsort(-evidence.scores, kind="stable")
    findings += [
        Finding(paths[number], "suspicious", f"score {evidence.scores[number]:.1f}, above {SUSPICIOUS_SCORE}")
        for number in order
        if evidence.scores[number] > SUSPICIOUS_SCORE
    ]
    return CheckReport(
        images=list(images),
        findings=findings,
        ranked=[paths[number] for number in order],
        scores=[float(evidence.scores[number]) for number in order],
        suspects=[_suspect(number, paths, evidence) for number in order[:WORST_IMAGES]],
        map_limit=middle + SUSPICIOUS_SCORE * deviation,
        intensity_range=span,
        region=rule.region,
    )


def _unlike_mask(image: ImageFacts, mask: tuple[int, int]) -> Finding | None:
    """A finding if an image has other proportions than the mask image, which has this width and height."""
    height, width = image.size
    if have_same_proportions((width, height), mask):
        return None
    return Finding(image.path, "unlike the mask", f"{width} x {height} pixels, the mask has {mask[0]} x {mask[1]}")


def _on_grid(evidence: Evidence, rule: ScoreRule, grid: tuple[int, int]) -> Evidence:
    """Evidence of all patches, from that of the inspected ones; outside, the deviation is 0."""
    if rule.region is None:
        return evidence
    numbers = rule.region.patches(grid)
    return evidence._replace(
        maps=rule.on_grid(evidence.maps, grid),
        patch=numbers[evidence.patch],
        like_patch=numbers[evidence.like_patch],
    )


def _odd(images: Sequence[ImageFacts]) -> Iterator[Finding]:
    """Images whose size, or channels and depth, differ from those of nearly all."""
    numbers, common = find_odd([image.size for image in images])
    for number in sorted(numbers):
        (height, width), (rows, columns) = images[number].size, common
        yield Finding(images[number].path, "odd size", f"{width} x {height} pixels, not {columns} x {rows}")
    numbers, common = find_odd([image.kind for image in images])
    for number in sorted(numbers):
        yield Finding(images[number].path, "odd depth", f"{images[number].kind}, not {common}")


def _range(images: Sequence[ImageFacts]) -> IntensityRange:
    """Least and largest value of deep images."""
    low, high = min(image.values[0] for image in images), max(image.values[1] for image in images)
    if low == high:
        msg = f"All pixels of all images are {low:g}: there is nothing to compare."
        raise ImageError(msg)
    return IntensityRange(low, high)


def _suspect(number: int, paths: Sequence[Path], evidence: Evidence) -> Suspect:
    width = evidence.maps.shape[2]
    return Suspect(
        image=paths[number],
        score=float(evidence.scores[number]),
        map=evidence.maps[number],
        place=divmod(int(evidence.patch[number]), width),
        like=paths[evidence.like_image[number]],
        like_place=divmod(int(evidence.like_patch[number]), width),
    )
