"""The report of an evaluation: one HTML file that needs no other file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader
from sklearn.metrics import roc_auc_score

from patchcore_plugin import __version__
from patchcore_plugin.evaluation.metrics import METRICS
from patchcore_plugin.evaluation.plots import roc_curves, score_histograms
from patchcore_plugin.evaluation.summary import MEAN, Row, write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patchcore_plugin.evaluation.runner import Result

_GALLERIES = {
    "misses": "Worst misses: defective images with the lowest scores",
    "false_alarms": "Worst false alarms: normal images with the highest scores",
    "defects": "One of each kind of defect: the image with the median score",
}


def write_report(results: Sequence[Result], rows: Sequence[Row], skipped: dict[str, str], file: Path) -> None:
    """Write the report.

    Args:
        results: Results of all jobs in the plan, including those that failed or have not been run.
        rows: Summary of the results.
        skipped: Reason why a data set was skipped, by its name.
        file: HTML file to write; it never exists half-written.
    """
    done = [result for result in results if result.content]
    environment = Environment(loader=PackageLoader("patchcore_plugin.evaluation", "."), autoescape=True, trim_blocks=True)
    baselines = ", ".join(dict.fromkeys(result.job.baseline for result in done if result.job.baseline))
    parts = [_part(rows, is_cost=False, compared=bool(baselines)), _part(rows, is_cost=True, compared=False)]
    machines = sorted({"{system}, {cores} cores, torch with {threads} threads".format(**r.content["machine"]) for r in done})
    page = environment.get_template("report.html.j2").render(
        parts=parts,
        metrics=[metric for part in parts for metric in part["metrics"]],
        failed=[result for result in results if result.error],
        missing=[result for result in results if result.status == "not run"],
        skipped=skipped,
        sections=[_section(name, done) for name in dict.fromkeys(result.job.dataset for result in done)],
        galleries=_GALLERIES,
        baselines=baselines,
        published=_published(rows),
        machines=machines,
        version=__version__,
    )
    write_whole(file, page)


def _part(rows: Sequence[Row], *, is_cost: bool, compared: bool) -> dict[str, Any]:
    """One table of the results, with the qualities or with the costs.

    Args:
        rows: Summary of the results.
        is_cost: Whether to show the costs.
        compared: Whether to show the difference from the baseline.
    """
    names = [name for name, metric in METRICS.items() if metric.is_cost == is_cost and any(name in r.means for r in rows)]
    return {
        "metrics": [METRICS[name] for name in names],
        "lines": [_cells(row, rows, names) for row in rows],
        "compared": compared,
    }


def _cells(row: Row, rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """One line of a table: for each metric the mean, the deviation, and whether the mean is the best of its data set."""
    cells = []
    for name in names:
        if name not in row.means:
            cells.append(("", "", False))
            continue
        metric = METRICS[name]
        text = format(row.means[name], metric.format)
        peers = [other for other in rows if other.dataset == row.dataset and name in other.means]
        best = max(metric.better * float(format(peer.means[name], metric.format)) for peer in peers)
        spread = f"± {row.spreads[name]:{metric.format}}" if name in row.spreads else ""
        cells.append((text, spread, bool(metric.better) and len(peers) > 1 and metric.better * float(text) == best))
    difference = "" if row.difference is None else f"{row.difference:+.4f}"
    interval = "" if row.interval is None else "{:+.4f} to {:+.4f}".format(*row.interval)
    return {"row": row, "cells": cells, "difference": difference, "interval": interval, "mean": row.dataset == MEAN}


def _published(rows: Sequence[Row]) -> dict[str, Any]:
    """The table of measured and published figures: its metrics, its lines, and the sources; no line if none is published."""
    known = [row for row in rows if row.published.keys() & row.means.keys()]
    names = [name for name in METRICS if any(name in row.published.keys() & row.means.keys() for row in known)]
    lines = []
    for row in known:
        cells = [("", "", "")] * len(names)
        for place, name in enumerate(names):
            if name in row.published and name in row.means:
                pair = row.means[name], row.published[name]
                cells[place] = (*(format(value, METRICS[name].format) for value in pair), f"{pair[0] - pair[1]:+.4f}")
        lines.append({"row": row, "cells": cells})
    sources = {row.model: row.source for row in known}
    return {"metrics": [METRICS[name].title for name in names], "lines": lines, "sources": sources}


def _section(dataset: str, done: Sequence[Result]) -> dict[str, Any]:
    """The section of the report about one data set."""
    models: dict[str, list[Result]] = {}
    for result in done:
        if result.job.dataset == dataset:
            models.setdefault(result.job.model, []).append(result)
    first = {name: results[0] for name, results in models.items()}
    return {
        "name": dataset,
        "roc": roc_curves(models),
        "histograms": score_histograms(first),
        "models": list(models),
        "defects": _defects(models),
        "pictures": {name: _pictures(result) for name, result in first.items()},
        "seeds": {name: result.job.seed for name, result in first.items()},
    }


def _defects(models: dict[str, list[Result]]) -> list[dict[str, Any]]:
    """For each kind of image: its count, and for each model the AUROC and the share called anomalous."""
    kinds = {}
    for image in sorted(next(iter(models.values()))[0].predictions, key=lambda image: (image["label"], image["kind"])):
        key = image["label"], image["kind"]
        kinds[key] = kinds.get(key, 0) + 1
    table = []
    for (label, kind), count in kinds.items():
        cells = [[_of_kind(result, label, kind) for result in results] for results in models.values()]
        table.append({"kind": kind, "normal": not label, "count": count, "cells": [_mean_of_kind(cell) for cell in cells]})
    return table


def _of_kind(result: Result, label: int, kind: str) -> tuple[float | None, float | None]:
    """AUROC of one kind of defect against all normal images, and share of the kind that is called anomalous."""
    scores = [image["score"] for image in result.predictions if (image["label"], image["kind"]) == (label, kind)]
    normal = [image["score"] for image in result.predictions if not image["label"]]
    threshold = result.content["threshold"]
    auroc = roc_auc_score([0] * len(normal) + [1] * len(scores), normal + scores) if label and normal and scores else None
    flagged = float(np.mean(np.array(scores) > threshold)) if scores and threshold is not None else None
    return auroc, flagged


def _mean_of_kind(cells: Sequence[tuple[float | None, float | None]]) -> tuple[str, str]:
    aurocs, flagged = ([value for value in values if value is not None] for values in zip(*cells, strict=True))
    return (f"{np.mean(aurocs):.4f}" if aurocs else "", f"{np.mean(flagged):.1%}" if flagged else "")


def _pictures(result: Result) -> dict[str, list[dict[str, Any]]]:
    """Galleries of a result: for each picture a data URL, a name, a score, and whether it includes the ground truth."""
    galleries = {}
    for gallery, entries in result.content["pictures"].items():
        galleries[gallery] = []
        for entry in entries:
            image = result.predictions[entry["index"]]
            content = base64.b64encode((result.folder / entry["file"]).read_bytes()).decode()
            galleries[gallery].append(
                {
                    "url": f"data:image/jpeg;base64,{content}",
                    "name": f"{image['kind']}/{Path(image['image']).name}",
                    "score": f"{image['score']:.4g}",
                    "masked": entry["masked"],
                }
            )
    return galleries
