"""Is a folder of normal images what it should be? All that speaks against it, without a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from patchcore_plugin.cleaning.evidence import Evidence, find_evidence, suspicious_above
from patchcore_plugin.cleaning.files import ImageFacts, find_copies, find_odd, read_all_facts
from patchcore_plugin.depth import IntensityRange
from patchcore_plugin.images import ImageError, read_image
from patchcore_plugin.model.pre_processing import build_pre_processor
from patchcore_plugin.model.torch_model import FaissPatchcoreModel
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


class Network(NamedTuple):
    """The backbone that compares images.

    Attributes:
        backbone: Its name, as FaissPatchcore takes it.
        layers: Its feature layers.
        image_size: Height and width of its input, in pixels.
    """

    backbone: str = "efficientnet_lite0"
    layers: tuple[str, ...] = ("blocks.2", "blocks.4")
    image_size: tuple[int, int] = (256, 256)


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
        scores: Their scores.
        limit: Score above which an image is suspicious; None if too few images could be compared.
        suspects: The worst of them, for pictures.
        intensity_range: Values of deep images that become 0 and 255; None for images of 8 bits.
    """

    images: list[Path]
    findings: list[Finding]
    ranked: list[Path]
    scores: list[float]
    limit: float | None
    suspects: list[Suspect]
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
        return CheckReport(list(images), findings, [], [], None, [], None)
    span = _range(compared) if deep else None
    paths = [image.path for image in compared]
    evidence = find_evidence(lambda: embedder.stream(paths, span), len(paths), seed, progress)
    limit = suspicious_above(evidence.scores)
    order = np.argsort(-evidence.scores, kind="stable")
    findings += [
        Finding(paths[number], "suspicious", f"score {evidence.scores[number]:.1f}, above {limit:.1f}")
        for number in order
        if evidence.scores[number] > limit
    ]
    return CheckReport(
        images=list(images),
        findings=findings,
        ranked=[paths[number] for number in order],
        scores=[float(evidence.scores[number]) for number in order],
        limit=limit,
        suspects=[_suspect(number, paths, evidence) for number in order[:WORST_IMAGES]],
        intensity_range=span,
    )


class Embedder:
    """Embeds images by a backbone, normalized as its weights were trained."""

    def __init__(self, network: Network) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = FaissPatchcoreModel(network.layers, network.backbone).eval().to(self._device)
        pre_processor = build_pre_processor(network.image_size, normalization="backbone", backbone=network.backbone)
        self._transform = pre_processor.transform

    @torch.inference_mode()
    def stream(self, paths: Sequence[Path], span: IntensityRange | None) -> Iterator[torch.Tensor]:
        """Patch embeddings (h, w, D) of each image."""
        for path in paths:
            pixels = torch.tensor(read_image(path, intensity_range=span)).permute(2, 0, 1)[None]
            yield self._model.embed(self._transform(pixels.to(self._device).float() / 255))[0]


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
    image_map = evidence.maps[number]
    place = np.unravel_index(image_map.argmax(), image_map.shape)
    like_place = np.unravel_index(evidence.like_patch[number][place], image_map.shape)
    return Suspect(
        image=paths[number],
        score=float(evidence.scores[number]),
        map=image_map,
        place=(int(place[0]), int(place[1])),
        like=paths[evidence.like_image[number][place]],
        like_place=(int(like_place[0]), int(like_place[1])),
    )
