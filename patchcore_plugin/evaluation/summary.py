"""Tables of an evaluation: mean and spread over seeds, and paired differences from a baseline."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_plugin.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from patchcore_plugin.evaluation.runner import Result

MEAN = "mean of all"
"""Data set of the rows that average the others."""

COMPARED = "image_auroc"
"""Metric whose difference has a confidence interval."""

_RESAMPLES, _CONFIDENCE = 1000, 0.95


@dataclass
class Row:
    """A model on a data set.

    Attributes:
        dataset: Name of the data set, or :data:`MEAN`.
        model: Name of the model.
        seeds: How many jobs are done.
        means: Mean over the seeds, by metric.
        spreads: Standard deviation over the seeds, by metric, where there are several.
        difference: Of :data:`COMPARED`, mean over seeds of this model's less its baseline's with the same seed.
        interval: 95 % confidence interval of the difference.
        resampled: The differences of the resampled test images.
    """

    dataset: str
    model: str
    seeds: int
    means: dict[str, float]
    spreads: dict[str, float]
    difference: float | None = None
    interval: tuple[float, float] | None = None
    resampled: NDArray[np.float64] | None = field(default=None, repr=False)


def summarise(results: Sequence[Result]) -> list[Row]:
    """Summarise results by data set and model, in their order, with the means over all data sets last.

    The confidence interval is a bootstrap over test images, paired: normal and defective images are drawn with replacement,
    every draw counts for both models and for all seeds whose test sets hold the image, and the 2.5th and 97.5th percentile
    of 1,000 draws bound the interval. It says how far the difference depends on which images were tested; how far it
    depends on the seed, the spread says. Data sets are drawn independently for the difference of the means.
    """
    done = [result for result in results if result.content]
    rows = []
    for dataset, model in dict.fromkeys((result.job.dataset, result.job.model) for result in done):
        own = {r.job.seed: r for r in done if (r.job.dataset, r.job.model) == (dataset, model)}
        row = Row(dataset, model, len(own), *_mean_and_spread([result.metrics for result in own.values()]))
        base = next(iter(own.values())).job.baseline
        peers = {r.job.seed: r for r in done if (r.job.dataset, r.job.model) == (dataset, base)}
        pairs = [(own[seed], peers[seed]) for seed in own if seed in peers]
        if pairs and model != base:
            _compare(row, pairs)
        rows.append(row)
    return rows + _over_datasets(rows)


def _mean_and_spread(metrics: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    values = {name: [found[name] for found in metrics if name in found] for name in METRICS}
    means = {name: statistics.fmean(found) for name, found in values.items() if found}
    return means, {name: statistics.stdev(found) for name, found in values.items() if len(found) > 1}


def _over_datasets(rows: Sequence[Row]) -> list[Row]:
    """A row for each model that has been run on every data set, if there are several."""
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    means = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        if len(datasets) < 2 or len(own) < len(datasets):
            continue
        shared = [name for name in METRICS if all(name in row.means for row in own)]
        mean = Row(
            MEAN, model, min(row.seeds for row in own), {n: statistics.fmean(r.means[n] for r in own) for n in shared}, {}
        )
        if all(row.difference is not None for row in own):
            mean.difference = statistics.fmean(row.difference for row in own)
            if all(row.resampled is not None for row in own):
                mean.interval = _bounds(np.mean([row.resampled for row in own], axis=0))
        means.append(mean)
    return means


def _compare(row: Row, pairs: Sequence[tuple[Result, Result]]) -> None:
    """Fill in the difference of a row from its baseline, and the interval where both classes have several images."""
    if not all(COMPARED in result.metrics for pair in pairs for result in pair):
        return
    row.difference = statistics.fmean(one.metrics[COMPARED] - other.metrics[COMPARED] for one, other in pairs)
    from scipy.stats import bootstrap
    from sklearn import config_context
    from sklearn.metrics import auc, roc_curve

    numbers: dict[tuple[int, str], int] = {}  # of every image of any seed's test set
    columns = []
    for result in (result for pair in pairs for result in pair):
        labels = np.array([image["label"] for image in result.predictions])
        places = [numbers.setdefault((image["label"], _name(image)), len(numbers)) for image in result.predictions]
        columns.append((labels, np.array([image["score"] for image in result.predictions]), np.array(places)))
    classes = [np.array([number for (label, _), number in numbers.items() if label == kind]) for kind in (0, 1)]
    if min(map(len, classes)) < 2:
        return

    def difference(*drawn: NDArray[np.int64]) -> float:
        weights = np.bincount(np.concatenate(drawn), minlength=len(numbers))
        # roc_auc_score does the same, and takes its time to check what does not change here.
        values = [auc(*roc_curve(labels, scores, sample_weight=weights[places])[:2]) for labels, scores, places in columns]
        return float(np.mean(values[::2]) - np.mean(values[1::2]))

    with config_context(assume_finite=True, skip_parameter_validation=True):
        found = bootstrap(classes, difference, n_resamples=_RESAMPLES, vectorized=False, method="percentile", rng=0)
    row.resampled = found.bootstrap_distribution
    row.interval = _bounds(row.resampled)


def _name(image: dict[str, Any]) -> str:
    """Name of a test image that is the same in every split: its kind, and its file's name."""
    return f"{image['kind']}/{Path(image['image']).name}"


def _bounds(resampled: NDArray[np.float64]) -> tuple[float, float] | None:
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail]).tolist()
    return (low, high) if np.isfinite(low + high) else None


def write_csv(results: Sequence[Result], rows: Sequence[Row], output: Path) -> None:
    """Write results.csv, a line per job, and summary.csv, a line per data set, model and metric."""
    jobs = [["dataset", "model", "seed", "status", "error", *METRICS, "threshold"]]
    for result in results:
        job, values = result.job, [result.metrics.get(name) for name in METRICS]
        threshold = (result.content or {}).get("threshold")
        jobs.append([job.dataset, job.model, job.seed, result.status, result.error, *values, threshold])
    summary = [["dataset", "model", "seeds", "metric", "mean", "deviation", "difference", "low", "high"]]
    for row in rows:
        for name, mean in row.means.items():
            compared = [row.difference, *(row.interval or (None, None))] if name == COMPARED else [None] * 3
            summary.append([row.dataset, row.model, row.seeds, name, mean, row.spreads.get(name), *compared])
    for name, lines in {"results.csv": jobs, "summary.csv": summary}.items():
        text = io.StringIO(newline="")
        csv.writer(text).writerows(lines)
        write_whole(output / name, text.getvalue())


def write_whole(file: Path, text: str) -> None:
    """Write a text file beside, then in its place: nobody finds half of it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(file)
