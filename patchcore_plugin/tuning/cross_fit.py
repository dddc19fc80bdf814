"""Scores of images by memory banks that have not learned them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from patchcore_plugin.coreset.sampler import GreedyCoreset
from patchcore_plugin.errors import UsageError
from patchcore_plugin.images import read_image
from patchcore_plugin.model.lightning_model import FaissPatchcore
from patchcore_plugin.model.torch_model import nearest_by_product
from patchcore_plugin.scoring.scores import farthest_patches, image_score, reweight
from patchcore_plugin.tuning.criterion import FoldScores
from patchcore_plugin.tuning.synthetic import SyntheticDefect, add_defect

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.depth import IntensityRange
    from patchcore_plugin.scoring.scores import ScoreRule

CORESET_RATIO = 0.01
"""Share of the patches in the banks that settings are compared by, whatever the config's: larger ones would take hours."""

_QUERY_ROWS = 1024  # of a distance matrix: bounds its memory
_PARTS = {"post_processor": True, "evaluator": False, "visualizer": False}  # of a model, that no score depends on


class Embedder:
    """Embeds images as a model with some arguments does.

    Args:
        arguments: Arguments of FaissPatchcore.
        count: Number of images that it will embed.

    Raises:
        UsageError: If FaissPatchcore does not take them.
    """

    def __init__(self, arguments: Mapping[str, Any], count: int) -> None:
        known = inspect.signature(FaissPatchcore).parameters
        unknown = [name for name in arguments if name not in known]
        if unknown:
            msg = f"FaissPatchcore has no argument {', '.join(map(repr, unknown))}."
            raise UsageError(msg)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._module = FaissPatchcore(**{**arguments, **_PARTS}).eval().to(device)
        self._device, self._count = device, count

    @torch.inference_mode()
    def embed(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """Patch embeddings (h, w, D) of an image (H, W, 3)."""
        image = torch.tensor(pixels).permute(2, 0, 1)[None].to(self._device)
        return self._module.embed(self._module.pre_processor.transform(image.float() / 255), self._count)[0]


def read(image: Path | SyntheticDefect, intensity_range: IntensityRange | None = None) -> NDArray[np.uint8]:
    """Read an image file, or make a synthetic defect."""
    if not isinstance(image, SyntheticDefect):
        return read_image(image, intensity_range=intensity_range)
    source = read_image(image.source, intensity_range=intensity_range)
    return add_defect(read_image(image.path, intensity_range=intensity_range), image, source)


def draw_folds(images: int, folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each of N images (N,): equally large ones, drawn at random."""
    return np.random.default_rng(seed).permutation(np.arange(images) % folds)


@torch.inference_mode()
def fit_bank(embeddings: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Coreset (M, D) of embeddings (N, h, w, D)."""
    rows = embeddings.reshape(-1, embeddings.shape[-1])
    return rows[GreedyCoreset(ratio=CORESET_RATIO, random_state=seed, progress=False).fit(rows)]


@torch.inference_mode()
def score(bank: torch.Tensor, embeddings: Iterable[torch.Tensor], rules: Sequence[ScoreRule]) -> NDArray[np.float64]:
    """Image scores (R, N) by R rules, of images with embeddings (h, w, D), by a memory bank (M, D)."""
    found, bank, most = [], bank.float(), min(len(bank), max(rule.num_neighbors for rule in rules))
    for embedding in embeddings:
        queries = embedding.reshape(-1, embedding.shape[-1]).float()
        parts = [nearest_by_product(rows, bank, 1) for rows in queries.split(_QUERY_ROWS)]
        distances, nearest = (torch.cat(part)[:, 0] for part in zip(*parts, strict=True))
        patch = distances.reshape(1, *embedding.shape[:2])
        farthest = farthest_patches(patch)
        _, neighbors = nearest_by_product(bank[nearest[farthest]], bank, most)
        support = (queries[farthest, None] - bank[neighbors]).square().sum(2).sqrt()
        found.append([float(reweight(image_score(patch, rule), support[:, : rule.num_neighbors])) for rule in rules])
    return np.array(found, np.float64).reshape(-1, len(rules)).T


def cross_fit(
    rules: Sequence[ScoreRule],
    normal: Sequence[torch.Tensor],
    defective: Sequence[torch.Tensor],
    fold: NDArray[np.int64],
    parents: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> list[FoldScores]:
    """Score each fold of the normal images, and the defective ones, by a bank of the other folds.

    Args:
        rules: How patch distances become image scores.
        normal: Embeddings of the normal images, (h, w, D) each.
        defective: Embeddings of defective images, (h, w, D) each.
        fold: Fold of each normal image (N,).
        parents: Number of the normal image that each synthetic defect was made of; None for real ones.
        seed: Seed of the coresets.

    Returns:
        Scores for each rule.
    """
    folds = int(fold.max()) + 1
    parents = None if parents is None else fold[parents]
    normals = np.zeros((len(rules), len(normal)))
    defects = np.full((len(rules), len(defective), folds), np.nan)
    for held_out in range(folds):
        inside = np.flatnonzero(fold == held_out)
        counted = np.arange(len(defective)) if parents is None else np.flatnonzero(parents == held_out)
        bank = fit_bank(torch.stack([normal[number] for number in np.flatnonzero(fold != held_out)]), seed)
        both = [*(normal[number] for number in inside), *(defective[number] for number in counted)]
        found = score(bank, both, rules)
        normals[:, inside], defects[:, counted, held_out] = found[:, : len(inside)], found[:, len(inside) :]
    return [FoldScores(normal_row, fold, row) for normal_row, row in zip(normals, defects, strict=True)]
