"""Is a folder of normal images what it should be? All that speaks against it, without a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.cleaning.embedding import Embedder, Held, Network
from patchcore_plugin.cleaning.evidence import SUSPICIOUS_SCORE, Evidence, find_evidence, largest_mean, robust_scale
from patchcore_plugin.cleaning.files import ImageFacts, find_copies, find_odd, read_all_facts
from patchcore_plugin.depth import IntensityRange
from patchcore_plugin.images import ImageError
from patchcore_plugin.progress import Progress, no_progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MIN_IMAGES = 10
"""Fewest comparable images that are ranked: with fewer, what is usual is unknown."""

WORST_IMAGES = 20
"""Images that the report shows, at most."""

LEFT_OUT = "unreadable", "suspicious", "copy", "in the test folder"
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
    """

    images: list[Path]
    findings: list[Finding]
    ranked: list[Path]
    scores: list[float]
    suspects: list[Suspect]
    map_limit: float
    intensity_range: IntensityRange | None

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
        map: Deviations (h, w) of its patches.
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
    network: Network | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> CheckReport:
    """Check normal images.

    Args:
        images: Paths of images that should be normal, sorted.
        test_images: Paths of images that must not be among them.
        network: The backbone that compares them; None is EfficientNet-Lite0.
        seed: Seed of the patches that are compared with.
        progress: Called with each step.

    Raises:
        UsageError: If the backbone or a layer is unknown, or the image size does not fit the backbone.
    """
    embedder = Embedder(network or Network())  # first: a wrong name is reported before the long work
    facts = read_all_facts(images, "read", progress)
    readable = [image for image in facts if not image.error]
    findings = [Finding(image.path, "unreadable", image.error) for image in facts if image.error]
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
    span = _range(compared) if deep else None
    paths = [image.path for image in compared]
    embed = Held(lambda start: embedder.stream(paths, span, start))
    evidence = find_evidence(embed, len(paths), seed, progress)
    middle, deviation = robust_scale(largest_mean(evidence.maps.reshape(len(paths), -1)))
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
