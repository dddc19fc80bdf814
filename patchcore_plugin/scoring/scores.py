"""PatchCore's scores: image score and anomaly map from patch distances, written once for NumPy arrays and torch tensors.

Source: Roth et al., arXiv 2106.08265, section 3.3. The functions follow the Python array API standard, so the runtime calls
them without torch, and the training model can be traced through them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device

from patchcore_plugin.bundle import MAX_NEIGHBORS, MAX_SMOOTHING
from patchcore_plugin.checks import check_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_plugin.bundle import Manifest

SIGMA = 4.0
"""Standard deviation, in pixels, of the Gaussian that smooths the anomaly map (section 3.3 of the paper)."""

_SINGLE_THREAD_MULTIPLICATIONS = 2**17  # of one matrix product; OpenBLAS uses several threads from 2**18 on


@dataclass(frozen=True)
class ScoreRule:
    """How patch distances become an image score.

    Each field has the same name in the bundle's manifest.

    Attributes:
        num_neighbors: Number of neighbors of the nearest bank vector that re-weight the image score (equation 7); 1 turns
            the weight off.
        score_smoothing: Standard deviation, in patches, of a Gaussian that smooths the distances before their largest
            becomes the image score: a defect covers several patches, and a single patch that stands out is often chance. 0
            turns smoothing off, as in the paper.

    Raises:
        UsageError: If a value is out of range.
    """

    num_neighbors: int = 9
    score_smoothing: float = 0

    def __post_init__(self) -> None:
        check_number("num_neighbors", self.num_neighbors, 1, MAX_NEIGHBORS, whole=True)
        check_number(
            "score_smoothing",
            self.score_smoothing,
            0,
            MAX_SMOOTHING,
            hint="1 smooths over about five by five patches, 0 not at all.",
        )

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Read the rule from the manifest of a bundle."""
        return cls(**{field.name: getattr(manifest, field.name) for field in fields(cls)})

    def __str__(self) -> str:
        """The rule in words."""
        smoothed = f", smoothed by {self.score_smoothing:g} patches" if self.score_smoothing else ""
        weighted = f", re-weighted by {self.num_neighbors} neighbors" if self.num_neighbors > 1 else ""
        return f"largest patch distance{smoothed}{weighted}"


class Scores(NamedTuple):
    """Raw anomaly scores of a batch.

    Attributes:
        image: Image scores (B,), float32.
        patch: Distance of each patch to its nearest bank vector (B, h, w), float32, in feature units.
    """

    image: Any
    patch: Any


def image_score(patch: Any, rule: ScoreRule) -> Any:
    """Largest patch distance of each image, after the rule's smoothing: the image score before equation 7.

    Args:
        patch: Distance of each patch to its nearest bank vector (B, h, w), float32.
        rule: How the model scores images.

    Returns:
        Distances (B,), float32.
    """
    xp = array_namespace(patch)
    _, height, width = patch.shape
    if rule.score_smoothing:
        patch = anomaly_map(patch, (height, width), sigma=rule.score_smoothing)
    return xp.max(xp.reshape(patch, (-1, height * width)), axis=1)


def farthest_patches(patch: Any) -> Any:
    """Find each image's farthest patch.

    Args:
        patch: Distance of each patch to its nearest bank vector (B, h, w).

    Returns:
        Number of the patch (B,), int64, counted image by image and row by row over the whole batch.
    """
    xp = array_namespace(patch)
    images, height, width = patch.shape
    first = height * width * xp.arange(images, dtype=xp.int64, device=device(patch))
    return xp.argmax(xp.reshape(patch, (-1, height * width)), axis=1) + first


def reweight(distance: Any, support: Any) -> Any:
    """Weigh image scores by equation 7 of the paper.

    Args:
        distance: Image score to weigh (B,): the distance s* of the farthest patch to its nearest bank vector m*, or the
            largest smoothed distance.
        support: Distances (B, b) of the farthest patch to the b nearest neighbors of m* in the bank, m* itself the first.

    Returns:
        ``(1 - exp(s*) / sum(exp(support))) * distance`` (B,). With one neighbor, ``distance`` itself.
    """
    if support.shape[1] == 1:
        return distance
    xp = array_namespace(distance)
    shift = xp.max(support, axis=1)  # the largest exponent is then 0: nothing overflows
    weight = 1 - xp.exp(support[:, 0] - shift) / xp.sum(xp.exp(support - shift[:, None]), axis=1)
    return weight * distance


def weighted_mean(distances: Sequence[Any], weights: Sequence[Any]) -> Any:
    """Mean of the distances of an ensemble's members, each multiplied by the member's weight.

    Args:
        distances: Distances by each member, all of one shape.
        weights: Weight of each member; the first is 1.

    Returns:
        Distances in feature units of the first member; of a single member its own, untouched.
    """
    total = distances[0]
    if len(distances) == 1:
        return total
    for distance, weight in zip(distances[1:], weights[1:], strict=True):
        total = total + weight * distance
    return total / len(distances)


def anomaly_map(patch: Any, size: tuple[int, int], upsampling: str = "bilinear", sigma: float = SIGMA) -> Any:
    """Upsample and smooth patch distances to an anomaly map.

    Both steps are linear and separable, so each axis is one matrix, and the map takes two small matrix products.

    Args:
        patch: Patch distances (B, h, w), float32.
        size: Height and width of the map, in pixels.
        upsampling: ``"bilinear"`` as in the paper, or ``"nearest"`` as in anomalib's ``Patchcore``.
        sigma: Standard deviation of the Gaussian, in pixels of the map.

    Returns:
        Anomaly map (B, H, W), float32, in feature units.
    """
    rows = _axis_matrix(patch.shape[1], size[0], upsampling, sigma)
    columns = _axis_matrix(patch.shape[2], size[1], upsampling, sigma).T
    if isinstance(patch, np.ndarray):
        # in products so small that BLAS uses one thread: more would wait actively afterwards, and slow what runs next
        step = max(1, _SINGLE_THREAD_MULTIPLICATIONS // (patch.shape[2] * max(patch.shape[1], size[1])))
        parts = [rows[first : first + step] @ patch @ columns for first in range(0, size[0], step)]
        return np.concatenate(parts, axis=1)
    return patch.new_tensor(rows) @ patch @ patch.new_tensor(columns)


def map_mean(patch: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Mean of each :func:`anomaly_map`, computed without the map, which is linear in the patches.

    Args:
        patch: Patch distances (B, h, w), float32.
        size: Height and width of the map, in pixels.

    Returns:
        Means (B,), float32.
    """
    rows, columns = (
        _axis_matrix(patches, pixels, "bilinear", SIGMA).mean(0)
        for patches, pixels in zip(patch.shape[1:], size, strict=True)
    )
    return (patch @ columns) @ rows


@lru_cache(maxsize=32)
def _axis_matrix(patches: int, pixels: int, upsampling: str, sigma: float) -> NDArray[np.float32]:
    """Matrix (pixels, patches) that upsamples one axis, then smooths it with a Gaussian that is cut at four sigma."""
    centers = (np.arange(pixels) + 0.5) * patches / pixels - 0.5
    if upsampling == "nearest":
        upsample = np.eye(patches)[np.arange(pixels) * patches // pixels]
    elif upsampling == "bilinear":
        offset = np.clip(centers, 0, patches - 1)[:, None] - np.arange(patches)
        upsample = np.clip(1 - np.abs(offset), 0, None)
    else:
        msg = f"upsampling must be 'bilinear' or 'nearest', got {upsampling!r}."
        raise ValueError(msg)
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    # the image is mirrored at its border: np.pad says which pixel stands outside
    source = np.pad(np.arange(pixels), reach, mode="reflect" if pixels > 1 else "edge")
    smooth = np.zeros((pixels, pixels))
    for tap, weight in enumerate(kernel):
        smooth[np.arange(pixels), source[tap : tap + pixels]] += weight
    return (smooth @ upsample).astype(np.float32)
