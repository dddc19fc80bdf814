"""The files of earlier versions in tests/data/old, and what those versions said of them: see make_old_files.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from helpers.training import ROOT

if TYPE_CHECKING:
    from pathlib import Path

OLD = ROOT / "tests/data/old"
EXPECTED = json.loads((OLD / "expected.json").read_text())
IMAGES = sorted((OLD / "images").iterdir())


def assert_bundle_scores(bundle: Path, name: str) -> None:
    """A bundle gives the scores that are expected of the file ``name``."""
    from patchcore_plugin import PatchcoreRuntime

    predictions = PatchcoreRuntime(bundle, cache=False).predict(IMAGES)
    for kind, attribute in {"raw": "score", "normalized": "normalized_score"}.items():
        scores = [getattr(prediction, attribute) for prediction in predictions]
        assert scores == pytest.approx(EXPECTED[name][kind], rel=1e-4)
