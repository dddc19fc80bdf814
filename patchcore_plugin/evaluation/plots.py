"""Plots of the report, as SVG."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.metrics import roc_curve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patchcore_plugin.evaluation.runner import Result

_COLORS = colormaps["tab10"].colors
# The same results give the same file: no date, no random names. Names of models appear as written, not as TeX.
_STYLE = {
    "svg.hashsalt": "patchcore",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def roc_curves(models: dict[str, Sequence[Result]]) -> str:
    """Draw the ROC curves of every model and seed on one data set; returns a data URL."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6, 4.2), layout="constrained")
        axis = figure.subplots()
        for number, (name, results) in enumerate(models.items()):
            for turn, result in enumerate(results):
                if "image_auroc" not in result.metrics:
                    continue
                labels, scores = _labels_and_scores(result)
                false, true, _ = roc_curve(labels, scores)
                color = _COLORS[number % len(_COLORS)]
                axis.plot(false, true, color=color, alpha=0.8, linewidth=1.2, label=None if turn else name)
        axis.set(xlabel="normal images called anomalous", ylabel="defective images found", xlim=(0, 1), ylim=(0, 1.01))
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(PercentFormatter(1))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(loc="lower right")
        return _url(figure)


def score_histograms(models: dict[str, Result]) -> str:
    """Draw histograms of normal and defective scores, one per model on one data set; returns a data URL."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6, 1.7 * len(models)), layout="constrained")
        for axis, (name, result) in zip(figure.subplots(len(models), squeeze=False)[:, 0], models.items(), strict=True):
            labels, scores = _labels_and_scores(result)
            edges = np.histogram_bin_edges(scores, 40)
            for label, color, meaning in ((0, "tab:blue", "normal"), (1, "tab:red", "defective")):
                axis.hist(scores[labels == label], edges, color=color, alpha=0.55, label=meaning)
            threshold = result.content["threshold"]
            if threshold is not None:
                axis.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.4g}")
            axis.set_title(name, fontsize=9, loc="left")
            axis.legend(fontsize=7)
        axis.set_xlabel("image score")
        return _url(figure)


def _labels_and_scores(result: Result) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([image[column] for image in result.predictions]) for column in ("label", "score"))


def _url(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"
