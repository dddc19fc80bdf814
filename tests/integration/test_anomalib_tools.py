"""What anomalib and OpenVINO offer around a model: inferencers, model_api, loggers, pipelines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from anomalib.data.utils import read_image
from helpers.pictures import encoded
from helpers.training import LAYERS, make_engine
from PIL import Image

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def graph(trained, tmp_path_factory):
    """A graph for images of the size of the test images."""
    root = tmp_path_factory.mktemp("graph")
    return make_engine(root).export(trained.model, "openvino", export_root=root, input_size=(300, 300))


@pytest.fixture
def colored(test_images, tmp_path):
    """A test image in color."""
    gray = np.asarray(Image.open(test_images[0]).convert("L"))
    path = tmp_path / "colored.png"
    path.write_bytes(encoded(Image.fromarray(np.stack([gray, gray // 10 * 9, gray // 5 * 4], axis=-1))))
    return path


def expected(trained, path):
    with torch.no_grad():
        return trained.model(read_image(path, as_tensor=True)[None])


def open_by_model_api(path):
    from model_api.adapters import OpenvinoAdapter, create_core
    from model_api.models import Model

    return Model.create_model(OpenvinoAdapter(create_core(), str(path), device="CPU", plugin_config=F32))


def test_inferencer(trained, graph, test_images, monkeypatch, tmp_path):
    from anomalib.deploy import OpenVINOInferencer

    monkeypatch.chdir(tmp_path)  # it makes a folder
    inferencer = OpenVINOInferencer(graph, device="CPU", config=F32)
    for path in test_images[::2]:
        ours, theirs = expected(trained, path), inferencer.predict(path)
        assert float(theirs.pred_score[0]) == pytest.approx(float(ours.pred_score), abs=1e-3)
        assert bool(theirs.pred_label[0]) == bool(ours.pred_label)


def test_model_api(trained, graph, test_images, colored):
    model = open_by_model_api(graph)
    assert type(model).__name__ == "AnomalyDetection"
    for path in [*test_images[::2], colored]:
        ours, theirs = expected(trained, path), model(cv2.imread(str(path)))
        assert theirs.pred_score == pytest.approx(float(ours.pred_score), abs=1e-3)
        assert theirs.pred_label == str(bool(ours.pred_label))
        levels = np.round(255 * ours.anomaly_map.squeeze().numpy()).astype(np.uint8)
        assert np.abs(theirs.anomaly_map - cv2.resize(levels, (300, 300)).astype(int)).max() <= 1
        assert (theirs.pred_mask != cv2.resize(ours.pred_mask.squeeze().numpy().astype(np.uint8), (300, 300))).mean() < 1e-3


@pytest.mark.slow  # the other export is tested always
def test_model_api_of_a_graph_for_any_size(trained, tmp_path, colored):
    """It takes RGB then: model_api turns no colors of such a graph."""
    path = make_engine(tmp_path).export(trained.model, "openvino", export_root=tmp_path)
    model = open_by_model_api(path)
    score = float(expected(trained, colored).pred_score)
    assert model(np.asarray(Image.open(colored))).pred_score == pytest.approx(score, abs=1e-3)


@pytest.mark.slow  # its small twin is test_registry.py::test_models_are_usable_wherever_anomalib_takes_one
def test_benchmark(cells, tmp_path):
    """anomalib's own command refuses models of other packages."""
    folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/defective"}
    ours = {"backbone": "efficientnet_lite0", "layers": LAYERS, "coreset_sampling_ratio": 0.01}
    data = {"name": "cells", "root": str(cells), **folders, "num_workers": 0, "val_split_mode": "same_as_test"}
    benchmark = {
        "seed": 42,
        "model": {"class_path": "patchcore_plugin.FaissPatchcore", "init_args": ours},
        "data": {"class_path": "anomalib.data.Folder", "init_args": data},
    }
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": benchmark}))
    command = [Path(sys.executable).with_name("patchcore"), "anomalib", "benchmark", "--config", "benchmark.yaml"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    (table,) = tmp_path.glob("runs/**/*.csv")
    assert "image_AUROC" in table.read_text(), run.stderr
