"""The metrics of an evaluation, computed by scikit-learn and anomalib."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from anomalib.metrics import AUPRO, F1Max
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

AUPRO_LIMIT = 0.3
"""Largest false-positive rate of pixels in the integral of the per-region overlap, as in MVTec AD's paper."""


class Metric(NamedTuple):
    """Description of a metric.

    Attributes:
        title: Short name, with the unit.
        format: Format specification of the value.
        better: 1 if more is better, -1 if less is better, 0 if neither is.
        meaning: Explanation in one sentence.
        is_cost: Whether the metric is a time, a memory or a size instead of a quality of detection. Qualities are the
            same for the same images and seed on every machine.
    """

    title: str
    format: str
    better: int
    meaning: str
    is_cost: bool = False


METRICS = {
    "image_auroc": Metric("image AUROC", ".4f", 1, "Area under the ROC curve of the image scores."),
    "average_precision": Metric("AP", ".4f", 1, "Average precision of the image scores."),
    "f1_max": Metric("F1-max", ".4f", 1, "F1 at the best threshold for these test images."),
    "fpr_at_95_tpr": Metric(
        "FPR95",
        ".3f",
        -1,
        "Share of normal images called anomalous, at the threshold that finds 95 % of the defective.",
    ),
    "fpr_at_99_tpr": Metric("FPR99", ".3f", -1, "The same share at the threshold that finds 99 % of the defective."),
    "pixel_auroc": Metric("pixel AUROC", ".4f", 1, "Area under the ROC curve of the anomaly maps' pixels."),
    "aupro": Metric("AUPRO", ".4f", 1, "Area under the per-region overlap, up to 30 % false-positive pixels."),
    "pixel_f1_max": Metric("pixel F1-max", ".4f", 1, "F1 of the pixels at the best threshold."),
    "fit_seconds": Metric("fit s", ".1f", -1, "Training time with the memory bank, without validation.", is_cost=True),
    "bank_seconds": Metric(
        "coreset s", ".1f", -1, "Part of the training that turns embeddings into the bank (PaDiM: Gaussians).", is_cost=True
    ),
    "peak_mebibytes": Metric(
        "peak MiB", ".0f", -1, "Highest resident memory of the process during training, libraries included.", is_cost=True
    ),
    "latency_milliseconds": Metric(
        "latency ms",
        ".1f",
        -1,
        "Median time of one decoded image through the torch model: pre-processing, network, scores, map.",
        is_cost=True,
    ),
    "bank_vectors": Metric("bank", ".0f", 0, "Vectors in the memory bank.", is_cost=True),
    "state_mebibytes": Metric("model MiB", ".1f", -1, "Size of all parameters and buffers of the model.", is_cost=True),
}
"""All metrics, in the order of the tables."""


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """Compute the metrics of image scores.

    Args:
        labels: Labels ``(N,)``: 0 for normal images, 1 for anomalous images.
        scores: Raw scores ``(N,)``, finite. Scores clipped to [0, 1] would have ties.

    Returns:
        Values by the names of :data:`METRICS`; empty if all images are of one class.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if len(np.unique(labels)) < 2:
        return {}
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    return {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "average_precision": float(average_precision_score(labels, scores)),
        "f1_max": _f1_max(labels, scores),
        "fpr_at_95_tpr": float(false[true >= 0.95][0]),
        "fpr_at_99_tpr": float(false[true >= 0.99][0]),
    }


def pixel_metrics(masks: NDArray[np.bool_], maps: NDArray[np.float32]) -> dict[str, float]:
    """Compute the metrics of anomaly maps.

    Args:
        masks: Ground truth ``(N, H, W)``, bool, True in defects.
        maps: Raw anomaly maps ``(N, H, W)``, f32.

    Returns:
        Values by the names of :data:`METRICS`; empty if no pixel is defective, or every pixel is.
    """
    if masks.all() or not masks.any():
        return {}
    aupro = AUPRO(fields=["scores", "labels"], fpr_limit=AUPRO_LIMIT)
    aupro.update(SimpleNamespace(scores=torch.from_numpy(maps), labels=torch.from_numpy(masks).int()))
    return {
        "pixel_auroc": float(roc_auc_score(masks.ravel(), maps.ravel())),
        "aupro": float(aupro.compute()),
        "pixel_f1_max": _f1_max(masks.ravel(), maps.ravel()),
    }


def _f1_max(labels: NDArray, scores: NDArray) -> float:
    metric = F1Max(fields=["scores", "labels"])
    metric.update(SimpleNamespace(scores=torch.from_numpy(scores), labels=torch.from_numpy(labels).int()))
    return float(metric.compute())
