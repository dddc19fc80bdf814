"""The answer for one image."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from patchcore_plugin.bundle import Box, Manifest
from patchcore_plugin.scoring.conformal import p_value
from patchcore_plugin.scoring.regions import Region, find_regions
from patchcore_plugin.scoring.scores import anomaly_map, map_mean
from patchcore_plugin.scoring.thresholds import display_values, normalize, raw_threshold, verdict, without_rounding

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_plugin.scoring import Scores


@dataclass(frozen=True)
class Prediction:
    """Answer for one image.

    Attributes:
        score: Raw image score: a distance in feature units, larger is more anomalous.
        normalized_score: Score in [0, 1] with the threshold at 0.5; None if the model was never validated.
        threshold: Raw score above which an image is anomalous, sensitivity included; None without a threshold.
        verdict: ``"normal"`` or ``"anomalous"``; None without a threshold.
        patch_distances: Distance (h, w) of each patch to its nearest bank vector, float32, in feature units.
        size: Height and width of the image, in pixels.
        manifest: That of the bundle which answered.
        milliseconds: Time of the stages ``"network"``, pre-processing included, and ``"search"``; empty if not measured.
    """

    score: float
    normalized_score: float | None
    threshold: float | None
    verdict: Literal["normal", "anomalous"] | None
    patch_distances: NDArray[np.float32] = field(repr=False)
    size: tuple[int, int]
    manifest: Manifest = field(repr=False)
    milliseconds: dict[str, float] = field(repr=False, default_factory=dict)

    @classmethod
    def of(cls, scores: Scores, image: int, size: tuple[int, int], manifest: Manifest, **milliseconds: float) -> Self:
        """Read the raw scores of one image by a bundle's manifest.

        Args:
            scores: Raw scores of one or more images.
            image: Number of the image among them, from 0.
            size: Height and width of the image, in pixels.
            manifest: The bundle's manifest.
            **milliseconds: Time of each stage.
        """
        raw, scale = scores.image[image : image + 1], manifest.image
        normalized = normalize(raw, scale)
        return cls(
            score=float(raw[0]),
            normalized_score=None if normalized is None else float(normalized[0]),
            threshold=raw_threshold(scale),
            verdict=verdict(float(raw[0]), scale),
            patch_distances=scores.patch[image],
            size=size,
            manifest=manifest,
            milliseconds=milliseconds,
        )

    @cached_property
    def p_value(self) -> float | None:
        """How rare so large a score is among normal images, in (0, 1]; None where the bundle has no calibration.

        At most ``a`` for at most a share ``a`` of normal images; see :mod:`patchcore_plugin.scoring.conformal`. With n
        calibration images it cannot be less than 1 / (n + 1).
        """
        calibration = self.manifest.calibration
        return None if calibration is None else p_value(calibration.scores, without_rounding(self.score))

    @cached_property
    def mean_distance(self) -> float:
        """Mean of the anomaly map, in feature units: how far from the bank the image lies as a whole."""
        return float(map_mean(self.patch_distances[None], self.manifest.preprocessing.size)[0])

    @cached_property
    def anomaly_map(self) -> NDArray[np.float32]:
        """Raw map (H, W), float32, over the part of the image that the model saw, in feature units.

        The patch distances, upsampled and smoothed when first asked for.
        """
        return anomaly_map(self.patch_distances[None], self.manifest.preprocessing.size)[0]

    @cached_property
    def normalized_map(self) -> NDArray[np.float32] | None:
        """The map in [0, 1] with the pixel threshold at 0.5; None if the model was never validated."""
        return normalize(self.anomaly_map, self.manifest.pixel)

    @cached_property
    def shown_map(self) -> NDArray[np.float32]:
        """The map for display, around [0, 1], with the pixel threshold at 0.5, sensitivity included.

        Where the model was never validated, the map is stretched from 0 to its own largest value.
        """
        return display_values(self.anomaly_map, self.manifest.pixel)

    @cached_property
    def pixel_threshold(self) -> float | None:
        """Raw value of the map above which a pixel is anomalous, sensitivity included; None without one."""
        return raw_threshold(self.manifest.pixel)

    @cached_property
    def regions(self) -> list[Region] | None:
        """Connected parts of the map above the pixel threshold, in pixels of the image; None without a threshold."""
        if self.pixel_threshold is None:
            return None
        recipe = self.manifest.preprocessing
        (height, width), (rows, columns) = self.size, recipe.resize
        scale = height / rows * width / columns
        return [
            Region(
                *recipe.to_image(Box(region.left, region.top, region.width, region.height), self.size),
                area=max(1, round(region.area * scale)),
                peak=region.peak,
            )
            for region in self.map_regions
        ]

    @cached_property
    def map_regions(self) -> list[Region]:
        """Connected parts of the map above the pixel threshold, in pixels of the map; empty without a threshold."""
        return [] if self.pixel_threshold is None else find_regions(self.anomaly_map, self.pixel_threshold)
