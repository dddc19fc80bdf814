"""The runtime's answer for one image."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patchcore_plugin.bundle import RegionRule
from patchcore_plugin.scoring import conformal, scores, thresholds
from patchcore_plugin.scoring.regions import Region, find_regions

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_plugin.bundle import Manifest
    from patchcore_plugin.images import ImageError
    from patchcore_plugin.scoring import Scores
    from patchcore_plugin.scoring.thresholds import Verdict


@dataclass(frozen=True)
class Prediction:
    """The runtime's answer for one image: its raw scores, and how the bundle reads them.

    Attributes:
        score: Raw image score: a distance in feature units, larger is more anomalous.
        patch_distances: Distance (h, w) of each patch to its nearest bank vector, float32, in feature units; 0 outside the
            region of interest.
        size: Height and width of the image, in pixels.
        manifest: Manifest of the bundle that answered.
        milliseconds: Time of the stages ``"network"``, pre-processing included, and ``"search"``; empty if not measured.
    """

    score: float
    patch_distances: NDArray[np.float32] = field(repr=False)
    size: tuple[int, int]
    manifest: Manifest = field(repr=False)
    milliseconds: dict[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, raw: Scores, image: int, size: tuple[int, int], manifest: Manifest, **milliseconds: float) -> Self:
        """Take the raw scores of one image out of those of several.

        Args:
            raw: Raw scores of the images.
            image: Number of the image among them, from 0.
            size: Height and width of the image, in pixels.
            manifest: Manifest of the bundle that scored.
            **milliseconds: Time of each stage.
        """
        return cls(float(raw.image[image]), raw.patch[image], size, manifest, milliseconds)

    @cached_property
    def normalized_score(self) -> float | None:
        """Score in [0, 1] with the threshold at 0.5; None if the model was never validated."""
        normalized = thresholds.normalize(np.float32([self.score]), self.manifest.image)
        return None if normalized is None else float(normalized[0])

    @cached_property
    def threshold(self) -> float | None:
        """Raw score above which an image is anomalous, sensitivity included; None without a threshold."""
        return thresholds.raw_threshold(self.manifest.image)

    @cached_property
    def review_threshold(self) -> float | None:
        """Raw score above which an image is to review at least, sensitivity included; None without a review band."""
        return thresholds.raw_review_threshold(self.manifest.image)

    @cached_property
    def ratio(self) -> float | None:
        """Score as a share of the threshold: 0.61 is 61 % of the limit. None without a threshold above 0."""
        return self.score / self.threshold if self.threshold is not None and self.threshold > 0 else None

    @cached_property
    def verdict(self) -> Verdict | None:
        """``"anomalous"`` above the threshold, ``"review"`` above that of a review band; None without a threshold."""
        return thresholds.verdict(self.score, self.manifest.image)

    @cached_property
    def p_value(self) -> float | None:
        """How rare so large a score is among normal images, in (0, 1]; None where the bundle has no calibration.

        At most a share ``a`` of normal images has a p-value of at most ``a``; see :mod:`patchcore_plugin.scoring.conformal`.
        With n calibration images the smallest p-value is 1 / (n + 1). Where the calibration has recording sessions, this is
        the largest p-value that a session gives.
        """
        calibration = self.manifest.calibration
        if calibration is None:
            return None
        return conformal.image_p_value(calibration, thresholds.without_rounding(self.score))

    @cached_property
    def mean_distance(self) -> float:
        """Mean of the anomaly map, in feature units: how far from the bank the image lies as a whole."""
        recipe = self.manifest.preprocessing
        return float(scores.map_mean(self.patch_distances[None], recipe.size, recipe.region)[0])

    @cached_property
    def anomaly_map(self) -> NDArray[np.float32]:
        """Raw map (H, W), float32, over the part of the image that the network saw, in feature units.

        Made from the patch distances at first use; 0 outside the region of interest.
        """
        recipe = self.manifest.preprocessing
        return scores.anomaly_map(self.patch_distances[None], recipe.size, region=recipe.region)[0]

    @cached_property
    def normalized_map(self) -> NDArray[np.float32] | None:
        """The map in [0, 1] with the pixel threshold at 0.5; None if the model was never validated."""
        return thresholds.normalize(self.anomaly_map, self.manifest.pixel)

    @cached_property
    def shown_map(self) -> NDArray[np.float32]:
        """The map for display, around [0, 1], with the pixel threshold, sensitivity included, at 0.5.

        If the model was never validated, the map is divided by its own largest value.
        """
        return thresholds.display_values(self.anomaly_map, self.manifest.pixel)

    @cached_property
    def pixel_threshold(self) -> float | None:
        """Raw value of the map above which a pixel is anomalous, sensitivity included; None without a threshold."""
        return thresholds.raw_threshold(self.manifest.pixel)

    @cached_property
    def _regions(self) -> tuple[list[Region], list[Region], int]:
        """The regions in pixels of the map, and of the image; and the number of those that are smaller than the limit."""
        limit = thresholds.verdict_limit(self.manifest.pixel)
        if limit is None:
            return [], [], 0
        rule, preprocessing = self.manifest.regions or RegionRule(), self.manifest.preprocessing
        height, width = preprocessing.pixel_size(self.size)
        gaps = int(rule.close_gaps / height), int(rule.close_gaps / width)
        found = [
            (
                region,
                Region(
                    **vars(preprocessing.to_image(region, self.size)),
                    area=max(1, round(region.area * height * width)),
                    peak=region.peak,
                    mm_per_pixel=rule.mm_per_pixel,
                ),
            )
            for region in find_regions(self.anomaly_map, limit, gaps)
        ]
        unit = 1 if rule.mm_per_pixel is None else rule.mm_per_pixel**2
        kept = [pair for pair in found if pair[1].area * unit >= rule.min_area]
        return [region for region, _ in kept], [region for _, region in kept], len(found) - len(kept)

    @property
    def map_regions(self) -> list[Region]:
        """The regions, in the same order, in pixels of the map; empty without a threshold."""
        return self._regions[0]

    @property
    def regions(self) -> list[Region] | None:
        """Connected parts of the map above the pixel threshold, the highest peak first, in pixels of the image.

        By the bundle's rule for regions, where it has one, parts with small gaps between them are one region, and small ones
        are left out. None without a threshold.
        """
        return None if self.pixel_threshold is None else self._regions[1]

    @property
    def small_regions(self) -> int | None:
        """Number of regions left out because they are smaller than the bundle's limit; None without a threshold."""
        return None if self.pixel_threshold is None else self._regions[2]


class Outcome(NamedTuple):
    """The outcome for one image of several: a prediction, or the error for which the image cannot be read.

    Attributes:
        pixels: The image (H, W, 3), u8, RGB; None with an error.
        embedding: Patch embeddings (h, w, D) of the image, float32; None with an error.
        prediction: The prediction; None with an error.
        error: Reason why the image cannot be read; None with a prediction.
    """

    pixels: NDArray[np.uint8] | None = None
    embedding: NDArray[np.float32] | None = None
    prediction: Prediction | None = None
    error: ImageError | OSError | None = None
