"""Fixtures for all tests. Their data are real: images of ELPV, trained models, exported bundles."""

from __future__ import annotations

import logging
import os

# Set before the import of the hub's client: a download must fail at once, not after a minute of retries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from helpers.training import EMBEDDINGS, ROOT, Trained, folder_datamodule, make_engine, make_model

# A busy machine is no failure.
hypothesis.settings.register_profile("any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any speed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(autouse=True)
def logs_that_reach_caplog(monkeypatch):
    """A service that an earlier test of this process started has taken the loggers for itself."""
    for name in ("patchcore.service", "patchcore.webhook"):
        log = logging.getLogger(name)
        monkeypatch.setattr(log, "propagate", True)
        monkeypatch.setattr(log, "disabled", False)


@pytest.fixture(scope="session")
def elpv(tmp_path_factory) -> Path:
    """All monocrystalline cells of ELPV, in the folders that the demo makes."""
    pytest.importorskip("elpv_dataset", reason="the package elpv-dataset with the real images is not installed")
    from patchcore_plugin.elpv import lay_out

    root = tmp_path_factory.mktemp("elpv")
    lay_out(root)
    return root


@pytest.fixture(scope="session")
def cells(elpv, tmp_path_factory) -> Path:
    """Some of the cells: 24 normal ones for training, 52 normal and 52 defective ones for the test."""
    root = tmp_path_factory.mktemp("cells")
    for folder, count in {"train/good": 24, "test/good": 52, "test/defective": 52}.items():
        images = sorted((elpv / folder).iterdir())
        (root / folder).mkdir(parents=True)
        for image in images[:: len(images) // count][:count]:
            shutil.copy(image, root / folder)
    return root


@pytest.fixture(scope="session")
def few(cells, tmp_path_factory) -> Path:
    """Eight cells to train, and eight normal and eight defective ones to test."""
    root = tmp_path_factory.mktemp("few")
    for folder in ("train/good", "test/good", "test/defective"):
        (root / folder).mkdir(parents=True)
        for image in sorted((cells / folder).iterdir())[:8]:
            shutil.copy(image, root / folder)
    return root


@pytest.fixture(scope="session")
def trained(cells, tmp_path_factory) -> Trained:
    """A model that anomalib's Engine trained on ``cells``."""
    root = tmp_path_factory.mktemp("results")
    model, engine = make_model(), make_engine(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = engine.train(model=model, datamodule=folder_datamodule(cells))
    return Trained(model.eval(), Path(engine.best_model_path), metrics[0])


@pytest.fixture(scope="session")
def bundle(trained, tmp_path_factory) -> Path:
    """The bundle of ``trained``."""
    from patchcore_plugin.export import export_bundle

    return export_bundle(trained.model, tmp_path_factory.mktemp("export") / "bundle", "cells")


@pytest.fixture
def bundle_copy(bundle, tmp_path) -> Path:
    """A copy of ``bundle`` that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def runtime(bundle):
    """The runtime of ``bundle``."""
    from patchcore_plugin import PatchcoreRuntime

    return PatchcoreRuntime.load(bundle)


@pytest.fixture(scope="session")
def test_images(cells) -> list[Path]:
    """A hundred test images, 50 of them defective."""
    return sorted((cells / "test").rglob("*.png"))[2:102]


@pytest.fixture(scope="session")
def real_embeddings() -> np.ndarray:
    """Patch embeddings (3072, 152), float32, of three real cells, each a grid of 32 x 32 patches."""
    return np.load(EMBEDDINGS).astype(np.float32)


@pytest.fixture(scope="session")
def bank_vectors(real_embeddings) -> np.ndarray:
    """The patches (2048, 152) of the first two cells, in random order, like a coreset."""
    return np.random.default_rng(0).permutation(real_embeddings[:2048])


@pytest.fixture(scope="session")
def patch_grids(real_embeddings) -> np.ndarray:
    """The four quarters (4, 16, 16, 152) of the third cell, none of whose patches is in ``bank_vectors``."""
    cell = real_embeddings[2048:].reshape(2, 16, 2, 16, -1)
    return np.ascontiguousarray(cell.swapaxes(1, 2)).reshape(4, 16, 16, -1)


@pytest.fixture(scope="session")
def normal_only(cells, tmp_path_factory) -> Path:
    """Checkpoint of the stock ``anomalib`` with configs/normal_only.yaml, for 52 normal cells, 20 of them held back."""
    folder = tmp_path_factory.mktemp("normal_only")
    command = [
        Path(sys.executable).parent / "anomalib", "train", "--config", ROOT / "configs" / "normal_only.yaml",
        "--data.init_args.root", cells / "test", "--data.init_args.num_workers", "0",
        "--data.init_args.val_split_ratio", "0.4",
        "--model.init_args.post_processor.init_args.false_positive_rate", "0.05",
    ]  # fmt: skip
    result = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (checkpoint,) = folder.glob("results/FaissPatchcore/my_part/v0/weights/lightning/model.ckpt")
    return checkpoint


@pytest.fixture(scope="session")
def calibrated(normal_only, tmp_path_factory) -> Path:
    """The bundle of ``normal_only``."""
    from patchcore_plugin import FaissPatchcore
    from patchcore_plugin.export import export_bundle

    model = FaissPatchcore.load_from_checkpoint(normal_only, map_location="cpu")
    return export_bundle(model, tmp_path_factory.mktemp("calibrated") / "bundle", "my_part")


@pytest.fixture(scope="session")
def held_back(cells) -> list[Path]:
    """The normal cells that ``normal_only`` held back for its thresholds."""
    from anomalib.data import Folder

    datamodule = Folder(
        name="my_part", root=cells / "test", normal_dir="good", val_split_mode="from_train", val_split_ratio=0.4,
        test_split_mode="none", seed=0,
    )  # fmt: skip
    datamodule.setup()
    return sorted(map(Path, datamodule.val_data.samples["image_path"]))


@pytest.fixture(scope="module")  # not the session: no other event loop can run while the browser is open
def browser():
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def keep(tmp_path):
    """A function that saves a screenshot of a page, in the folder CI_ARTIFACTS if that is set."""
    folder = Path(os.environ.get("CI_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"page-{name}.png", full_page=True)
