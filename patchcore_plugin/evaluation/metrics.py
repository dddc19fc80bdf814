"""What an evaluation measures, by scikit-learn and anomalib."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

AUPRO_LIMIT = 0.3
"""False-positive rate of pixels up to which the per-region overlap is integrated, as in MVTec AD's paper."""


class Metric(NamedTuple):
    """How a metric is shown.

    Attributes:
        title: Short name with its unit.
        format: Format of its value.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        meaning: One sentence.
    """

    title: str
    format: str
    better: int
    meaning: str


METRICS = {
    "image_auroc": Metric("image AUROC", ".4f", 1, "Area under the ROC curve of the image scores."),
    "average_precision": Metric("AP", ".4f", 1, "Average precision of the image scores."),
    "f1_max": Metric("F1-max", ".4f", 1, "F1 at the threshold that is best on these test images."),
    "fpr_at_95_tpr": Metric(
        "FPR95", ".3f", -1, "Share of normal images called anomalous where 95 % of the defective are found."
    ),
    "fpr_at_99_tpr": Metric("FPR99", ".3f", -1, "The same, where 99 % of the defective are found."),
    "pixel_auroc": Metric("pixel AUROC", ".4f", 1, "Area under the ROC curve of the anomaly maps' pixels."),
    "aupro": Metric("AUPRO", ".4f", 1, "Area under the per-region overlap, up to 30 % false-positive pixels."),
    "pixel_f1_max": Metric("pixel F1-max", ".4f", 1, "F1 of pixels at the best threshold."),
    "fit_seconds": Metric("fit s", ".1f", -1, "Training with the memory bank, without validation."),
    "bank_seconds": Metric(
        "coreset s", ".1f", -1, "Of it, turning the collected embeddings into the bank (PaDiM: Gaussians)."
    ),
    "peak_mebibytes": Metric(
        "peak MiB", ".0f", -1, "Highest resident memory of the process while it fits, libraries included."
    ),
    "latency_milliseconds": Metric(
        "latency ms", ".1f", -1, "Median of one decoded image through the torch model: pre-processing, network, scores, map."
    ),
    "bank_vectors": Metric("bank", ".0f", 0, "Vectors in the memory bank."),
    "state_mebibytes": Metric("model MiB", ".1f", -1, "All parameters and buffers of the model."),
}
"""All metrics, in the order of the tables."""

QUALITY = tuple(METRICS)[:8]
"""Those that the same images and seed give again; the others are measured."""


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """Metrics of image scores; none where all images are of one class.

    Args:
        labels: (N,) 0 for normal, 1 for anomalous images.
        scores: (N,) raw scores, finite. Not clipped to [0, 1]: that makes ties.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

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
    """Metrics of anomaly maps; none where no pixel, or every one, is defective.

    Args:
        masks: Ground truth (N, H, W), True in defects.
        maps: Raw anomaly maps (N, H, W).
    """
    import torch
    from anomalib.metrics import AUPRO
    from sklearn.metrics import roc_auc_score

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
    import torch
    from anomalib.metrics import F1Max

    metric = F1Max(fields=["scores", "labels"])
    metric.update(SimpleNamespace(scores=torch.from_numpy(scores), labels=torch.from_numpy(labels).int()))
    return float(metric.compute())
