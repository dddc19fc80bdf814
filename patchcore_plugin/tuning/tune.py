"""Which settings are best for some images? The comparison, from a plan to a report."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.embedder import Embedder
from patchcore_plugin.progress import Progress, no_progress
from patchcore_plugin.scoring.scores import ScoreRule
from patchcore_plugin.tuning.criterion import Comparison, choose, compare
from patchcore_plugin.tuning.cross_fit import CORESET_RATIO, cross_fit, draw_folds, read, score
from patchcore_plugin.tuning.images import MIN_DEFECTIVE, MIN_NORMAL
from patchcore_plugin.tuning.synthetic import SyntheticDefect, draw_defects

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from patchcore_plugin.bundle import RegionOfInterest
    from patchcore_plugin.tuning.criterion import FoldScores
    from patchcore_plugin.tuning.images import Images
    from patchcore_plugin.tuning.settings import Setting

FOLDS = 2
"""Parts of the normal images: each is scored by a bank of the others."""

REAL_MARGIN = 1.0
"""Standard errors by which a setting must be better than the config's, on real defects."""

MEMORY_LIMIT = 2 * 2**30
"""Bytes of the embeddings that are held at a time, at most."""

_OVERHEAD = 1.3  # of the coresets, as a factor of the time of all else


@dataclass(frozen=True)
class Group:
    """Settings that share embeddings."""

    settings: list[Setting]

    def rules(self, region: RegionOfInterest | None = None) -> list[ScoreRule]:
        """How each setting makes image scores of patch distances in a region."""
        names = ("num_neighbors", "score_smoothing")
        return [ScoreRule(**{n: s.arguments[n] for n in names if n in s.arguments}, region=region) for s in self.settings]


@dataclass(frozen=True)
class Plan:
    """What is going to be compared.

    Attributes:
        settings: The settings, the config's own first.
        groups: The same, by their embeddings.
        images: The images.
        defects: The defective images, real or synthetic.
        seconds: About how long it will take.
    """

    settings: list[Setting]
    groups: list[Group]
    images: Images
    defects: list[Path] | list[SyntheticDefect]
    seconds: float


@dataclass(frozen=True)
class TuneReport:
    """What a comparison found.

    Attributes:
        settings: The settings, the config's own first.
        comparisons: AUROC of each, and its difference from the first.
        chosen: Number of the chosen one.
        normal: Number of normal images.
        defective: Number of defective images.
        synthetic: Whether these are synthetic.
        deep: Whether the images are deeper than 8 bits.
    """

    settings: list[Setting]
    comparisons: list[Comparison]
    chosen: int
    normal: int
    defective: int
    synthetic: bool
    deep: bool


def group_settings(settings: Sequence[Setting]) -> list[Group]:
    """Group settings by their embeddings."""
    grouped: dict[object, list[Setting]] = {}
    for setting in settings:
        grouped.setdefault(setting.embedding, []).append(setting)
    return [Group(members) for members in grouped.values()]


def make_plan(settings: Sequence[Setting], images: Images, seed: int = 0, progress: Progress = no_progress) -> Plan:
    """Try each setting on one image: a wrong argument is found at once, and time and memory of all images are known.

    Where the embeddings of all images need more than :data:`MEMORY_LIMIT`, fewer images are compared.

    Raises:
        UsageError: If FaissPatchcore refuses a setting's arguments, or too few images are left.
    """
    groups = group_settings(settings)
    trials = []
    for number, group in enumerate(groups):
        progress("try the settings", number, len(groups))
        trials.append(_try_out(group, images))
    progress("try the settings", len(groups), len(groups))
    normal, defective = images.normal, images.defective
    largest = max(trial.size for trial in trials)
    fitting = MEMORY_LIMIT // largest
    defective = defective[: fitting // 2]
    normal = normal[: fitting - len(defective) if defective else fitting // 2]
    if len(normal) < MIN_NORMAL or (images.defective and len(defective) < MIN_DEFECTIVE):
        msg = (
            f"A setting needs {largest / 2**20:,.0f} MiB for the embeddings of an image, so that too few images fit "
            f"into {MEMORY_LIMIT / 2**30:g} GiB. Give the config a smaller image_size, or name other settings."
        )
        raise UsageError(msg)
    defects = defective or draw_defects(normal, seed)
    embedded, scored = len(normal) + len(defects), len(normal) + len(defects) * (FOLDS if defective else 1)
    seconds = _OVERHEAD * sum(trial.embedding * embedded + trial.search * scored for trial in trials)
    return Plan(list(settings), groups, replace(images, normal=normal, defective=defective), defects, seconds)


class _Trial(NamedTuple):
    """What one image takes: bytes of its embeddings, and seconds."""

    size: int
    embedding: float
    search: float


def _try_out(group: Group, images: Images) -> _Trial:
    """Embed an image, and search in a bank of the size that is to be expected."""
    embedder = Embedder(group.settings[0].arguments, len(images.normal) + len(images.defective))
    for _ in range(2):  # the first run takes longer
        started = time.perf_counter()
        embedding = embedder.embed(read(images.normal[0], images.intensity_range))
        embedded = time.perf_counter()
    height, width, dimension = embedding.shape
    share = 1 if embedder.region is None else embedder.region.share
    rows = max(1, int(CORESET_RATIO * share * height * width * len(images.normal) * (FOLDS - 1) / FOLDS))
    bank = torch.rand(rows, dimension, device=embedding.device).to(embedding.dtype)
    before = time.perf_counter()
    score(bank, [embedding], group.rules(embedder.region))
    return _Trial(embedding.nbytes, embedded - started, time.perf_counter() - before)


def run_plan(plan: Plan, seed: int = 0, progress: Progress = no_progress) -> TuneReport:
    """Compare settings by the AUROC of defective against held-out normal images.

    The normal images are divided into folds, and each fold is scored by a bank that is the coreset of the others. The
    config's own setting is chosen, unless another is better by a margin of standard errors on
    real defects: synthetic ones choose nothing, as what they favor lost on the real defects of solar cells.

    Args:
        plan: What to compare.
        seed: Seed of the folds and the coresets.
        progress: Called with each step.
    """
    synthetic = not plan.images.defective
    found = {}
    for group in plan.groups:
        scores = _cross_fit(group, plan, seed, progress)
        found |= {setting.name: row for setting, row in zip(group.settings, scores, strict=True)}
    comparisons = compare([found[setting.name] for setting in plan.settings])
    return TuneReport(
        settings=plan.settings,
        comparisons=comparisons,
        chosen=0 if synthetic else choose(comparisons, REAL_MARGIN),
        normal=len(plan.images.normal),
        defective=len(plan.defects),
        synthetic=synthetic,
        deep=plan.images.intensity_range is not None,
    )


def _cross_fit(group: Group, plan: Plan, seed: int, progress: Progress) -> list[FoldScores]:
    """Scores of a group's settings."""
    step, normal = f"compare {', '.join(setting.name for setting in group.settings)}", plan.images.normal
    every = [*normal, *plan.defects]
    embedder, embeddings = Embedder(group.settings[0].arguments, len(every)), []
    for image in every:
        embeddings.append(embedder.embed(read(image, plan.images.intensity_range, embedder.region)))
        progress(step, len(embeddings), len(every))
    parents = None if plan.images.defective else np.array([defect.parent for defect in plan.defects])
    fold = draw_folds(len(normal), FOLDS, seed)
    rules = group.rules(embedder.region)
    return cross_fit(rules, embeddings[: len(normal)], embeddings[len(normal) :], fold, parents, seed)
