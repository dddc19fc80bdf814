"""Unit tests train nothing: their bundle is made of the embeddings in tests/data, and fixtures that train are refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers.training import make_model

if TYPE_CHECKING:
    from patchcore_plugin import FaissPatchcore

TRAINING_FIXTURES = {"trained", "runtime", "normal_only", "calibrated"}
NEEDS_TRAINING = "a unit test trains nothing, and its fixtures {}: move it to tests/integration, or use `bundle` or `fitted`"


def pytest_runtest_setup(item) -> None:
    """Refuse a test whose fixtures train, before any of them is set up."""
    used = sorted(TRAINING_FIXTURES & set(item.fixturenames))
    if used:
        pytest.fail(NEEDS_TRAINING.format(", ".join(used)), pytrace=False)


@pytest.fixture(scope="session")
def fitted(real_embeddings) -> FaissPatchcore:
    """A model whose coreset is every 20th of the real embeddings, and whose thresholds are set by hand."""
    import torch

    from patchcore_plugin.bundle.origins import locate_patches

    model = make_model()
    rows = np.arange(0, len(real_embeddings), 20)
    model.model.memory_bank = torch.from_numpy(real_embeddings[rows])
    model.model.covering_radius.fill_(40)
    model.origins = locate_patches(rows, [(f"/cells/good/{number}.png", 32, 32) for number in range(3)])
    scale = {"_{}_threshold": 50.0, "{}_min": 40.0, "{}_max": 70.0}
    scales = {name.format(kind): torch.tensor(value) for kind in ("image", "pixel") for name, value in scale.items()}
    model.post_processor.load_state_dict(scales)
    return model.eval()


@pytest.fixture(scope="session")
def bundle(fitted, tmp_path_factory) -> Path:
    """The bundle of ``fitted``."""
    from patchcore_plugin.export import export_bundle

    return export_bundle(fitted, tmp_path_factory.mktemp("export") / "bundle", "cells")
