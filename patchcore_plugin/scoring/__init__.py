"""Scores: from patch distances to image score, anomaly map, threshold, regions, p-value and drift."""

from patchcore_plugin.scoring.scores import ScoreRule, Scores, anomaly_map

__all__ = ["ScoreRule", "Scores", "anomaly_map"]
