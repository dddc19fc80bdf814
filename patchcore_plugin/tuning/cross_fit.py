"""Scores of images by memory banks that have not learned them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from patchcore_plugin.coreset.sampler import GreedyCoreset
from patchcore_plugin.images import read_image
from patchcore_plugin.model.torch_model import nearest_by_product
from patchcore_plugin.scoring.scores import farthest_patches, image_score, reweight
from patchcore_plugin.tuning.criterion import FoldScores
from patchcore_plugin.tuning.synthetic import SyntheticDefect, add_defect

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import RegionOfInterest
    from patchcore_plugin.depth import IntensityRange
    from patchcore_plugin.scoring.scores import ScoreRule

CORESET_RATIO = 0.01
"""Share of the patches in the banks that settings are compared by, whatever the config's: larger ones would take hours."""

_QUERY_ROWS = 1024  # of a distance matrix: bounds its memory


def read(
    image: Path | SyntheticDefect, intensity_range: IntensityRange | None = None, region: RegionOfInterest | None = None
) -> NDArray[np.uint8]:
    """Read an image file, or make a synthetic defect in the region."""
    if not isinstance(image, SyntheticDefect):
        return read_image(image, intensity_range=intensity_range)
    source = read_image(image.source, intensity_range=intensity_range)
    return add_defect(read_image(image.path, intensity_range=intensity_range), image, source, region and region.pixels)


def draw_folds(images: int, folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each of N images (N,): equally large ones, drawn at random."""
    return np.random.default_rng(seed).permutation(np.arange(images) % folds)


@torch.inference_mode()
def fit_bank(embeddings: torch.Tensor, rule: ScoreRule, seed: int = 0) -> torch.Tensor:
    """Coreset (M, D) of the inspected patches among embeddings (N, h, w, D)."""
    rows = rule.inspected(embeddings).reshape(-1, embeddings.shape[-1])
    return rows[GreedyCoreset(ratio=CORESET_RATIO, random_state=seed, progress=False).fit(rows)]


@torch.inference_mode()
def score(bank: torch.Tensor, embeddings: Iterable[torch.Tensor], rules: Sequence[ScoreRule]) -> NDArray[np.float64]:
    """Image scores (R, N) by R rules of one region, of images with embeddings (h, w, D), by a memory bank (M, D)."""
    found, bank, most = [], bank.float(), min(len(bank), max(rule.num_neighbors for rule in rules))
    for embedding in embeddings:
        inspected = rules[0].inspected(embedding[None])
        queries = inspected.reshape(-1, embedding.shape[-1]).float()
        parts = [nearest_by_product(rows, bank, 1) for rows in queries.split(_QUERY_ROWS)]
        distances, nearest = (torch.cat(part)[:, 0] for part in zip(*parts, strict=True))
        distances = distances.reshape(inspected.shape[:-1])
        farthest = farthest_patches(distances)
        patch = rules[0].on_grid(distances, embedding.shape[:2])
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
        rules: How patch distances become image scores, all with one region.
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
        bank = fit_bank(torch.stack([normal[number] for number in np.flatnonzero(fold != held_out)]), rules[0], seed)
        both = [*(normal[number] for number in inside), *(defective[number] for number in counted)]
        found = score(bank, both, rules)
        normals[:, inside], defects[:, counted, held_out] = found[:, : len(inside)], found[:, len(inside) :]
    return [FoldScores(normal_row, fold, row) for normal_row, row in zip(normals, defects, strict=True)]
