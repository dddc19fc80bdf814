"""Small trainings through anomalib's own Engine, on real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LAYERS = ["blocks.2", "blocks.4"]
ROOT = Path(__file__).parents[2]
EMBEDDINGS = ROOT / "tests" / "data" / "embeddings.npy"  # written by helpers/make_embeddings.py


def folder_datamodule(root: Path, **arguments):
    from anomalib.data import Folder

    defaults = {
        "name": "cells",
        "root": root,
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": "test/defective",
        "train_batch_size": 8,
        "eval_batch_size": 8,
        "num_workers": 0,
        "val_split_mode": "same_as_test",
    }
    return Folder(**{**defaults, **arguments})


def make_model(**arguments):
    from patchcore_plugin import FaissPatchcore

    defaults = {"backbone": "efficientnet_lite0", "layers": LAYERS, "coreset_sampling_ratio": 0.02, "visualizer": False}
    return FaissPatchcore(**{**defaults, **arguments})


def make_engine(root: Path, **arguments):
    from anomalib.engine import Engine

    return Engine(default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False, **arguments)


def assert_scores_alike(graph, model, images) -> None:
    """A graph that anomalib exported (ONNX or OpenVINO) gives the scores and maps of its model, for images (B, 3, H, W)."""
    import numpy as np
    import openvino
    import torch

    with torch.no_grad():
        expected = model(images)
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    # of an output with several names, which OpenVINO gives to merged nodes, any may be the first
    found = {name: value for output, value in compiled(images.numpy()).items() for name in output.names}
    np.testing.assert_allclose(found["pred_score"], expected.pred_score, rtol=1e-3)
    np.testing.assert_allclose(found["anomaly_map"], expected.anomaly_map, rtol=1e-3, atol=1e-3)


@dataclass
class Trained:
    """A model trained on ``cells`` through anomalib's Engine."""

    model: object
    checkpoint: Path
    metrics: dict[str, float]
