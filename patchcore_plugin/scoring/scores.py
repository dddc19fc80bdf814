"""The arithmetic of PatchCore's scores, written once for numpy arrays and torch tensors.

Source: Roth et al., arXiv 2106.08265, section 3.3. The functions follow the Python array API standard, so that the
runtime calls them without torch and the training model can be traced through them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_plugin.bundle import Manifest

SIGMA = 4.0
"""Standard deviation, in pixels, of the Gaussian that smooths the anomaly map (section 3.3 of the paper)."""


_SINGLE_THREAD_PRODUCT = 2**17  # multiplications; OpenBLAS takes threads from 2**18 on


@dataclass(frozen=True)
class ScoreRule:
    """How patch distances become an image score.

    A field here has the same name in the bundle's manifest.

    Attributes:
        num_neighbors: Neighbors of the nearest bank vector that re-weight the image score (equation 7); 1 turns that off.
        score_smoothing: Standard deviation, in patches, of a Gaussian that smooths the distances before the largest is
            taken for the image score: a defect covers several patches, and a single one that stands out is often chance.
            0 is the paper's.
    """

    num_neighbors: int = 9
    score_smoothing: float = 0

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The rule that a bundle's manifest records."""
        return cls(**{field.name: getattr(manifest, field.name) for field in fields(cls)})


class Scores(NamedTuple):
    """Raw anomaly scores of a batch.

    Attributes:
        image: Image scores (B,), float32.
        patch: Distance of each patch to its nearest bank vector (B, h, w), float32, in feature units.
    """

    image: Any
    patch: Any


def image_score(patch: Any, rule: ScoreRule) -> Any:
    """Image scores (B,) before equation 7: the largest patch distance, after the rule's smoothing.

    Args:
        patch: Distance of each patch to its nearest bank vector (B, h, w), float32.
        rule: How the model scores images.
    """
    xp = array_namespace(patch)
    _, height, width = patch.shape
    if rule.score_smoothing:
        patch = anomaly_map(patch, (height, width), sigma=rule.score_smoothing)
    return xp.max(xp.reshape(patch, (-1, height * width)), axis=1)


def farthest_patches(patch: Any) -> Any:
    """Row (B,), int64, of each image's farthest patch, among the patches of all images in order.

    Args:
        patch: Distance of each patch to its nearest bank vector (B, h, w).
    """
    xp = array_namespace(patch)
    images, height, width = patch.shape
    first = height * width * xp.arange(images, dtype=xp.int64, device=device(patch))
    return xp.argmax(xp.reshape(patch, (-1, height * width)), axis=1) + first


def reweight(distance: Any, support: Any) -> Any:
    """Image score after equation 7 of the paper.

    Args:
        distance: Image score to weigh (B,): the distance s* of the most anomalous patch to its nearest bank vector m*, or
            what smoothing leaves of the distances there.
        support: Distances of the most anomalous patch to the b nearest neighbours of m* in the bank, m* the first (B, b).

    Returns:
        ``(1 - exp(s*) / sum(exp(support))) * s*`` (B,). The softmax is shifted by its largest term and cannot overflow.
        A neighborhood of one leaves the score as it is.
    """
    if support.shape[1] == 1:
        return distance
    xp = array_namespace(distance)
    shift = xp.max(support, axis=1)
    weight = 1 - xp.exp(support[:, 0] - shift) / xp.sum(xp.exp(support - shift[:, None]), axis=1)
    return weight * distance


def anomaly_map(patch: Any, size: tuple[int, int], upsampling: str = "bilinear", sigma: float = SIGMA) -> Any:
    """Anomaly map at image resolution: patch distances upsampled and smoothed.

    Both steps are linear and separable, so each axis is one matrix, and the map is two small products.

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
        # In products so small that BLAS takes no threads: those go on spinning afterwards, and slow what comes next.
        piece = max(1, _SINGLE_THREAD_PRODUCT // (patch.shape[2] * max(patch.shape[1], size[1])))
        parts = [rows[first : first + piece] @ patch @ columns for first in range(0, size[0], piece)]
        return np.concatenate(parts, axis=1)
    return patch.new_tensor(rows) @ patch @ patch.new_tensor(columns)


def map_mean(patch: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Mean (B,) of each :func:`anomaly_map`, without the map: the mean of a linear function of the patches is another one.

    Args:
        patch: Patch distances (B, h, w), float32.
        size: Height and width of the map, in pixels.
    """
    rows, columns = (
        _axis_matrix(patches, pixels, "bilinear", SIGMA).mean(0)
        for patches, pixels in zip(patch.shape[1:], size, strict=True)
    )
    return (patch @ columns) @ rows


@lru_cache(maxsize=32)
def _axis_matrix(patches: int, pixels: int, upsampling: str, sigma: float) -> NDArray[np.float32]:
    """Matrix (pixels, patches) that upsamples one axis, then smooths it with a Gaussian cut at four sigma."""
    centres = (np.arange(pixels) + 0.5) * patches / pixels - 0.5
    if upsampling == "nearest":
        upsample = np.eye(patches)[np.arange(pixels) * patches // pixels]
    elif upsampling == "bilinear":
        offset = np.clip(centres, 0, patches - 1)[:, None] - np.arange(patches)
        upsample = np.clip(1 - np.abs(offset), 0, None)
    else:
        msg = f"upsampling must be 'bilinear' or 'nearest', got {upsampling!r}."
        raise ValueError(msg)
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    # Border pixels are mirrored: a tap outside falls on the pixel that np.pad puts there.
    source = np.pad(np.arange(pixels), reach, mode="reflect" if pixels > 1 else "edge")
    smooth = np.zeros((pixels, pixels))
    for tap, weight in enumerate(kernel):
        smooth[np.arange(pixels), source[tap : tap + pixels]] += weight
    return (smooth @ upsample).astype(np.float32)
