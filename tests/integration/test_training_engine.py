"""OpenVINO and torch train the same model, and test images that were validated are not embedded again."""

import numpy as np
import pytest
import torch
from helpers.training import folder_datamodule, make_engine, make_model
from PIL import Image

from patchcore_plugin.model.embedding_engine import EmbeddingNetwork
from patchcore_plugin.model.torch_model import FaissPatchcoreModel


@pytest.fixture
def embedded(monkeypatch):
    """Number of images that each engine embeds."""
    counts = {"openvino": 0, "torch": 0}
    own, call = FaissPatchcoreModel._embed, EmbeddingNetwork.__call__

    def by_torch(model, images):
        counts["torch"] += not torch.jit.is_tracing() and len(images)
        return own(model, images)

    def by_openvino(network, images):
        counts["openvino"] += len(images)
        return call(network, images)

    monkeypatch.setattr(FaissPatchcoreModel, "_embed", by_torch)
    monkeypatch.setattr(EmbeddingNetwork, "__call__", by_openvino)
    return counts


def test_engines_train_the_same_model(few, tmp_path, embedded):
    models, metrics = {}, {}
    for name in ("torch", "openvino"):
        models[name] = make_model(embedding_engine=name)
        metrics[name] = make_engine(tmp_path / name).train(models[name], datamodule=folder_datamodule(few))[0]
        # of the test images, which are the validation's, none is embedded twice; one picture compares the engines
        assert embedded == {"torch": 24 + (name == "openvino"), "openvino": (24 + 1) * (name == "openvino")}
    banks = [model.model.memory_bank for model in models.values()]
    torch.testing.assert_close(*banks, rtol=0, atol=1e-3 * float(banks[0].abs().max()))
    assert metrics["openvino"] == pytest.approx(metrics["torch"], abs=1e-3)


def test_auto_tests_by_openvino(trained, cells, tmp_path, embedded):
    """104 images are worth the conversion, and give what the training gave; predicting them embeds no image again."""
    engine, model = make_engine(tmp_path), make_model()
    found = engine.test(model, datamodule=folder_datamodule(cells), ckpt_path=str(trained.checkpoint))[0]
    assert found == pytest.approx(trained.metrics)
    assert embedded == {"torch": 1, "openvino": 104 + 1}
    engine.predict(model, datamodule=folder_datamodule(cells), ckpt_path=str(trained.checkpoint))
    assert embedded["openvino"] == 104 + 1


def test_pictures_are_those_of_anomalib(trained, few, tmp_path):
    from anomalib.visualization import ImageVisualizer

    for name, visualizer in (("ours", True), ("theirs", ImageVisualizer())):
        engine = make_engine(tmp_path / name)
        engine.test(make_model(visualizer=visualizer), datamodule=folder_datamodule(few), ckpt_path=str(trained.checkpoint))
    ours, theirs = (sorted((tmp_path / name).rglob("images/**/*.png")) for name in ("ours", "theirs"))
    assert len(ours) == len(theirs) == 16
    for path, other in zip(ours, theirs, strict=True):
        assert path.name == other.name
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(other)))


def test_a_picture_that_cannot_be_saved_is_an_error(trained, few, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        make_engine(tmp_path).test(
            make_model(visualizer=True), datamodule=folder_datamodule(few), ckpt_path=str(trained.checkpoint)
        )
