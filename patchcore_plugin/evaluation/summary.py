"""Summary of an evaluation: mean and standard deviation over seeds, and paired differences from a baseline."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import bootstrap
from sklearn import config_context
from sklearn.metrics import auc, roc_curve

from patchcore_plugin.errors import writing
from patchcore_plugin.evaluation.metrics import METRICS
from patchcore_plugin.evaluation.plan import MEAN
from patchcore_plugin.moving import replace
from patchcore_plugin.names import to_cell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from patchcore_plugin.evaluation.plan import Job
    from patchcore_plugin.evaluation.runner import Result

COMPARED = "image_auroc"
"""Metric that is compared with the baseline's."""

_BOOTSTRAP_DRAWS, _CONFIDENCE = 1000, 0.95


@dataclass(frozen=True)
class Row:
    """Summary of one model on one data set.

    Attributes:
        dataset: Name of the data set, or :data:`MEAN`.
        model: Name of the model.
        seeds: Number of finished jobs.
        means: Mean over the seeds, by the name of the metric.
        spreads: Standard deviation over the seeds, by the name of the metric; absent for a single seed.
        difference: Mean over the seeds of the model's :data:`COMPARED` minus the baseline's with the same seed.
        draws: The same difference in each draw of the bootstrap, ``(1000,)``; None if a class has fewer than two images.
        published: Published figures, by the name of the metric; those of the mean only if all data sets have results.
        source: Where the published figures are from.
    """

    dataset: str
    model: str
    seeds: int
    means: dict[str, float]
    spreads: dict[str, float]
    difference: float | None = None
    draws: NDArray[np.float64] | None = field(default=None, repr=False)
    published: dict[str, float] = field(default_factory=dict)
    source: str | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the difference."""
        if self.draws is None:
            return None
        tail = (1 - _CONFIDENCE) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail]).tolist()
        return (low, high) if np.isfinite(low + high) else None


def summarize(results: Sequence[Result]) -> list[Row]:
    """Summarize results by data set and model, in the order of the results; means over all data sets come last.

    The confidence interval comes from a paired bootstrap over test images. A draw takes normal and defective images with
    replacement, and each drawn image counts for both models and for every seed whose test set holds it. The 2.5th and
    97.5th percentile of 1,000 draws bound the interval. The interval shows how much the difference depends on the choice
    of test images; the standard deviation shows how much it depends on the seed. For the mean over data sets, each data
    set is drawn independently.
    """
    done = [result for result in results if result.content]
    rows = []
    for dataset, model in dict.fromkeys((result.job.dataset, result.job.model) for result in done):
        own = _by_seed(done, dataset, model)
        pairs = _pairs(own, done)
        means, spreads = _means_and_spreads([result.metrics for result in own.values()])
        published = _published(next(iter(own.values())).job, dataset)
        rows.append(Row(dataset, model, len(own), means, spreads, _difference(pairs), _draws(pairs), **published))
    whole = len({row.dataset for row in rows}) == len({result.job.dataset for result in results})
    jobs = {result.job.model: result.job for result in done}
    return rows + _over_datasets(rows, {model: _published(job, MEAN) for model, job in jobs.items()} if whole else {})


def _published(job: Job, dataset: str) -> dict[str, Any]:
    """Published figures of a model on a data set, and their source; empty if there are none."""
    figures = {} if job.published is None else job.published.figures.get(dataset, {})
    return {"published": figures, "source": job.published.source} if figures else {}


def _by_seed(results: Sequence[Result], dataset: str, model: str | None) -> dict[int, Result]:
    return {r.job.seed: r for r in results if (r.job.dataset, r.job.model) == (dataset, model)}


def _pairs(own: dict[int, Result], done: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Results of a model and of its baseline with the same seed; none for the baseline itself."""
    job = next(iter(own.values())).job
    peers = {} if job.model == job.baseline else _by_seed(done, job.dataset, job.baseline)
    pairs = [(own[seed], peers[seed]) for seed in own if seed in peers]
    return pairs if all(COMPARED in result.metrics for pair in pairs for result in pair) else []


def _means_and_spreads(metrics: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard deviation over the seeds, both by the name of the metric."""
    values = {name: [found[name] for found in metrics if name in found] for name in METRICS}
    means = {name: statistics.fmean(found) for name, found in values.items() if found}
    return means, {name: statistics.stdev(found) for name, found in values.items() if len(found) > 1}


def _over_datasets(rows: Sequence[Row], published: dict[str, dict[str, Any]]) -> list[Row]:
    """One row for each model that has been run on all data sets; none for a single data set.

    Args:
        rows: Rows of the data sets.
        published: Published figures of the mean and their source, by model.
    """
    datasets = {row.dataset for row in rows}
    means = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        if len(datasets) < 2 or len(own) < len(datasets):
            continue
        shared = [name for name in METRICS if all(name in row.means for row in own)]
        values = {name: statistics.fmean(row.means[name] for row in own) for name in shared}
        differences, draws = [row.difference for row in own], [row.draws for row in own]
        difference = None if None in differences else statistics.fmean(differences)
        mean_draws = None if any(drawn is None for drawn in draws) else np.mean(draws, axis=0)
        seeds, known = min(row.seeds for row in own), published.get(model, {})
        means.append(Row(MEAN, model, seeds, values, {}, difference, mean_draws, **known))
    return means


def _difference(pairs: Sequence[tuple[Result, Result]]) -> float | None:
    """Mean difference of a model from its baseline."""
    if not pairs:
        return None
    return statistics.fmean(one.metrics[COMPARED] - other.metrics[COMPARED] for one, other in pairs)


def _draws(pairs: Sequence[tuple[Result, Result]]) -> NDArray[np.float64] | None:
    """Mean difference of a model from its baseline in each draw of the bootstrap; None without two images of each class."""
    numbers: dict[tuple[int, str], int] = {}  # a number for each image of any test set, by label and name
    columns = []
    for result in (result for pair in pairs for result in pair):
        labels = np.array([image["label"] for image in result.predictions])
        images = [numbers.setdefault((image["label"], _name(image)), len(numbers)) for image in result.predictions]
        columns.append((labels, np.array([image["score"] for image in result.predictions]), np.array(images)))
    classes = [np.array([number for (label, _), number in numbers.items() if label == kind]) for kind in (0, 1)]
    if min(map(len, classes)) < 2:
        return None

    def difference(*drawn: NDArray[np.int64]) -> float:
        weights = np.bincount(np.concatenate(drawn), minlength=len(numbers))
        # roc_auc_score gives the same, but checks its arguments again in each draw.
        values = [auc(*roc_curve(labels, scores, sample_weight=weights[images])[:2]) for labels, scores, images in columns]
        return float(np.mean(values[::2]) - np.mean(values[1::2]))

    with config_context(assume_finite=True, skip_parameter_validation=True):
        found = bootstrap(classes, difference, n_resamples=_BOOTSTRAP_DRAWS, vectorized=False, method="percentile", rng=0)
    return found.bootstrap_distribution


def _name(image: dict[str, Any]) -> str:
    """Name of a test image that stays the same in every split: kind and file name."""
    return f"{image['kind']}/{Path(image['image']).name}"


def write_csv(results: Sequence[Result], rows: Sequence[Row], output: Path) -> None:
    """Write results.csv, one line per job, and summary.csv, one line per data set, model and metric.

    Texts are written by :func:`patchcore_plugin.names.to_cell`: none is taken for a formula.
    """
    jobs = [["dataset", "model", "seed", "status", "error", *METRICS, "threshold"]]
    for result in results:
        job, values = result.job, [result.metrics.get(name) for name in METRICS]
        threshold = (result.content or {}).get("threshold")
        named = to_cell(job.dataset), to_cell(job.model), job.seed, result.status, to_cell(result.error or "")
        jobs.append([*named, *values, threshold])
    titles = ["dataset", "model", "seeds", "metric", "mean", "deviation", "difference", "low", "high"]
    summary = [[*titles, "published", "minus_published"]]
    for row in rows:
        for name, mean in row.means.items():
            compared = [row.difference, *(row.interval or (None, None))] if name == COMPARED else [None] * 3
            named = to_cell(row.dataset), to_cell(row.model), row.seeds
            published = row.published.get(name)
            beside = [published, None if published is None else mean - published]
            summary.append([*named, name, mean, row.spreads.get(name), *compared, *beside])
    for name, lines in {"results.csv": jobs, "summary.csv": summary}.items():
        text = io.StringIO(newline="")
        csv.writer(text).writerows(lines)
        write_whole(output / name, text.getvalue())


def write_whole(file: Path, text: str) -> None:
    """Write a text file under another name, then rename it, so that it never exists half-written."""
    partial = file.with_name(f".{file.name}.partial")
    with writing(partial):
        partial.write_text(text, encoding="utf-8", newline="")
    replace(partial, file)
