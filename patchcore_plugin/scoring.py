"""The arithmetic of PatchCore's scores, written once for numpy arrays and torch tensors.

Source: Roth et al., arXiv 2106.08265, section 3.3. The functions follow the Python array API standard, so that the
runtime calls them without torch and the training model can be traced through them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Nearest = Callable[[Any], tuple[Any, Any]]
    Support = Callable[[Any, Any], Any]

SIGMA = 4.0
"""Standard deviation, in pixels, of the Gaussian that smooths the anomaly map (section 3.3 of the paper)."""


_ALONE = 2**17  # multiplications: OpenBLAS takes threads from 2**18 on


class Scores(NamedTuple):
    """Raw anomaly scores of a batch.

    Attributes:
        image: Image scores (B,), float32.
        patch: Distance of each patch to its nearest bank vector (B, h, w), float32, in feature units.
    """

    image: Any
    patch: Any


def score(embedding: Any, nearest: Nearest, support: Support, smoothing: float = 0) -> Scores:
    """Score a batch of embeddings against a memory bank.

    Args:
        embedding: Patch embeddings (B, h, w, D), float32.
        nearest: Gives the distances (N,) and bank indices (N,) of the nearest bank vectors of patches (N, D).
        support: Gives the distances (B, b) of patches (B, D) to the b nearest neighbours of the bank vectors (B,) that are
            nearest to them, those themselves first. A neighbourhood of one leaves the image score as it is.
        smoothing: Standard deviation, in patches, of a Gaussian that smooths the distances before the largest is taken for
            the image score: a defect covers several patches, and a single one that stands out is often chance. 0 is the
            paper's.
    """
    xp = array_namespace(embedding)
    _, height, width, dimensions = embedding.shape
    patches = height * width
    queries = xp.reshape(embedding, (-1, dimensions))
    distance, index = nearest(queries)
    patch = xp.reshape(distance, (-1, patches))
    # Row, among all queries, of each image's most anomalous patch.
    worst = xp.argmax(patch, axis=1) + patches * xp.arange(patch.shape[0], dtype=xp.int64, device=device(patch))
    if smoothing:
        smoothed = anomaly_map(xp.reshape(distance, (-1, height, width)), (height, width), sigma=smoothing)
        image = xp.max(xp.reshape(smoothed, (-1, patches)), axis=1)
    else:
        image = xp.take(distance, worst, axis=0)
    around = support(xp.take(queries, worst, axis=0), xp.take(index, worst, axis=0))
    if around.shape[1] > 1:  # a neighbourhood of one would weigh every score with nothing
        image = reweight(image, around)
    return Scores(image, xp.reshape(distance, (-1, height, width)))


def reweight(distance: Any, support: Any) -> Any:
    """Image score after equation 7 of the paper.

    Args:
        distance: Image score to weigh (B,): the distance s* of the most anomalous patch to its nearest bank vector m*, or
            what smoothing leaves of the distances there.
        support: Distances of the most anomalous patch to the b nearest neighbours of m* in the bank, m* the first (B, b).

    Returns:
        ``(1 - exp(s*) / sum(exp(support))) * s*`` (B,). The softmax is shifted by its largest term and cannot overflow.
    """
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
        piece = max(1, _ALONE // (patch.shape[2] * max(patch.shape[1], size[1])))
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


def normalize(values: NDArray[np.float32], threshold: float, minimum: float, maximum: float) -> NDArray[np.float32]:
    """Scale raw scores to [0, 1] with the threshold at 0.5, as anomalib's post-processor does.

    Args:
        values: Raw scores, any shape, in feature units.
        threshold: Raw threshold.
        minimum: Smallest raw score seen in validation.
        maximum: Largest raw score seen in validation. Equal to ``minimum``, it leaves only below, at and above.
    """
    values = np.asarray(values, dtype=np.float32)
    if maximum == minimum:
        return (0.5 + 0.5 * np.sign(values - np.float32(threshold))).astype(np.float32)
    return np.clip((values - np.float32(threshold)) / np.float32(maximum - minimum) + np.float32(0.5), 0, 1)
