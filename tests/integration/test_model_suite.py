"""The steps of anomalib's own model tests, for our model, and for one with every argument of ours set."""

from __future__ import annotations

import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image
from helpers.training import assert_scores_alike, folder_datamodule, make_engine, make_model

from patchcore_plugin import FaissPatchcore

EVERY_ARGUMENT = {
    "layers": ["blocks.4"],
    "num_neighbors": 3,
    "random_state": 1,
    "coreset_projection": 0.9,
    "embedding_dtype": "float16",
    "memory_budget": 1.0,
    "image_size": (128, 160),
    "normalization": "backbone",
    "score_smoothing": 1,
    "outlier_rejection": 3,
    "augmentations": ["brightness"],
    "ensemble": [{"backbone": "efficientnet_lite0", "layers": ["blocks.2"]}],
    "region_of_interest": [{"rectangle": [0.1, 0.1, 0.9, 0.8]}],
    "tile_size": 96,
    "tile_stride": 64,
    "embedding_engine": "openvino",
}


@pytest.fixture(scope="module", params=["plain", "every argument"])
def arguments(request, few, tmp_path_factory):
    if request.param == "plain":
        return {}
    excluded = tmp_path_factory.mktemp("excluded") / "exclude.txt"
    excluded.write_text(f"{sorted((few / 'train/good').iterdir())[0].name}\n")
    return {**EVERY_ARGUMENT, "exclude": excluded}


@pytest.fixture(scope="module")
def fitted(arguments, few, tmp_path_factory):
    """A model, its engine, and the checkpoint that fit wrote."""
    model, engine = make_model(**arguments), make_engine(tmp_path_factory.mktemp("suite"))
    engine.fit(model=model, datamodule=folder_datamodule(few))
    return model, engine, engine.best_model_path


def test_fit_and_test(fitted, few):
    model, engine, _ = fitted
    found = engine.test(model=model, datamodule=folder_datamodule(few))[0]
    assert 0 <= found["image_AUROC"] <= 1


def test_train(arguments, few, tmp_path):
    found = make_engine(tmp_path).train(model=make_model(**arguments), datamodule=folder_datamodule(few))[0]
    assert 0 <= found["image_AUROC"] <= 1


def test_from_a_checkpoint(fitted, arguments, few, tmp_path):
    """Validation, test and predictions by another engine and a new model are those of the fitted one."""
    model, engine, checkpoint = fitted
    data = folder_datamodule(few)
    expected = engine.test(model=model, datamodule=data)[0]
    assert make_engine(tmp_path).validate(model=make_model(**arguments), datamodule=data, ckpt_path=checkpoint) is not None
    found = make_engine(tmp_path).test(model=make_model(**arguments), datamodule=data, ckpt_path=checkpoint)[0]
    assert found == pytest.approx(expected)
    images = PredictDataset(path=few / "test/defective")
    scores = [
        torch.cat([batch.pred_score for batch in run.predict(model=each, dataset=images, ckpt_path=checkpoint)])
        for run, each in ((engine, model), (make_engine(tmp_path), make_model(**arguments)))
    ]
    torch.testing.assert_close(*scores)
    assert len(scores[0]) == 8


@pytest.mark.slow  # each kind of export is tested always with the plain model
def test_exports(fitted, few, tmp_path):
    *_, checkpoint = fitted
    model = FaissPatchcore.load_from_checkpoint(checkpoint).eval()
    images = torch.stack([read_image(path, as_tensor=True) for path in sorted((few / "test/good").iterdir())[:2]])
    paths = {kind: make_engine(tmp_path).export(model, kind, export_root=tmp_path) for kind in ("torch", "onnx", "openvino")}
    assert_scores_alike(paths["openvino"], model, images)
    assert_scores_alike(paths["onnx"], model, images)
    loaded = torch.load(paths["torch"], weights_only=False)["model"].eval()
    torch.testing.assert_close(loaded(images).pred_score, model(images).pred_score)
