"""What embeds images in a training: OpenVINO gives torch's embeddings, and torch embeds where it cannot."""

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers.training import LAYERS, make_model

from patchcore_plugin.bundle import RegionOfInterest, Tiles
from patchcore_plugin.errors import UsageError
from patchcore_plugin.model import embedding_engine
from patchcore_plugin.model.conversion import Embedding
from patchcore_plugin.model.embedding_engine import EmbeddingEngine
from patchcore_plugin.model.torch_model import FaissPatchcoreModel, Renormalization
from patchcore_plugin.scoring import ScoreRule


def pictures(count: int, height: int = 64, width: int = 80) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def make(**arguments) -> FaissPatchcoreModel:
    """A model of a tiny backbone."""
    defaults = {"layers": ["layer2", "layer3"], "backbone": "test_resnet", "pre_trained": False}
    return FaissPatchcoreModel(**{**defaults, **arguments}).train()


def test_weights_and_bank_are_not_copied():
    """Those of a network are the model's own; a model in half precision is not changed."""
    model = make()
    model.memory_bank = torch.randn(100, 8)
    shared = Embedding(model, part=True).model
    for ours, theirs in zip((*shared.parameters(), *shared.buffers()), (*model.parameters(), *model.buffers()), strict=True):
        assert ours.dtype != torch.float32 or ours.data_ptr() == theirs.data_ptr()
    half = make().half()
    assert next(Embedding(half).model.parameters()).dtype == torch.float32
    assert next(half.parameters()).dtype == torch.float16
    assert model.training


def ensemble() -> FaissPatchcoreModel:
    member = make(layers=["layer4"])
    member.renormalization = Renormalization((0.5, 0.4, 0.6), (0.1, 0.0, -0.1))
    return make(further=[member])


def hidden() -> FaissPatchcoreModel:
    pixels = np.zeros((64, 80), bool)
    pixels[10:50, 20:60] = True
    return make(rule=ScoreRule(region=RegionOfInterest.of(pixels)))


MODELS = {
    "plain": lambda: make(layers=LAYERS, backbone="efficientnet_lite0", pre_trained=True),
    "float16 bank": lambda: make(dtype=torch.float16),
    "tiles": lambda: make(tiles=Tiles(size=(32, 48), stride=(16, 32))),
    "ensemble": ensemble,
    "region": hidden,
    "transformer": lambda: make(backbone="test_vit", layers=["blocks.3"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_those_of_torch(name):
    model = MODELS[name]()
    images = pictures(3, 160, 160) if name == "transformer" else pictures(3)
    network = EmbeddingEngine("openvino").network(model, images, 1)
    found, expected = model.embed(images, network), model.embed(images)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    scale = float(expected.abs().max())
    np.testing.assert_allclose(found.float(), expected.float(), atol=scale * (1e-3 if name == "float16 bank" else 1e-4))


def test_auto_asks_whether_the_images_are_worth_a_conversion():
    model, engine, images = make(), EmbeddingEngine("auto"), pictures(2)
    assert engine.network(model, images, 63) is None
    network = engine.network(model, images, 64)
    assert network is not None
    assert engine.network(model, images, 64) is network
    assert engine.network(model, images, 63) is None  # the same pass gives the same embeddings, whatever came before
    assert engine.network(model, pictures(1, 96, 64), None) is not network  # another size; an unknown number of images
    assert EmbeddingEngine("torch").network(model, images, None) is None


def test_tiles_count_as_images():
    model = make(tiles=Tiles(size=(32, 32), stride=(32, 32)))
    assert EmbeddingEngine("auto").network(model, pictures(1), 11) is None  # of five tiles each
    assert EmbeddingEngine("auto").network(model, pictures(1), 13) is not None


def test_other_weights_are_another_network():
    model, engine, images = make(), EmbeddingEngine("openvino"), pictures(1)
    before = engine.network(model, images, None)
    model.load_state_dict(make().state_dict())
    after = engine.network(model, images, None)
    assert after is not before
    np.testing.assert_allclose(after(images), model.embed(images), atol=1e-3)


@pytest.mark.parametrize("hindrance", ["autocast", "double"])
def test_where_openvino_does_not_embed(hindrance):
    model, images = make(), pictures(1)
    if hindrance == "double":
        model.double()
        images = images.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=hindrance == "autocast"):
        assert EmbeddingEngine("auto").network(model, images, None) is None
        with pytest.raises(UsageError, match=r"mixed precision|torch\.float64") as error:
            EmbeddingEngine("openvino").network(model, images, None)
    assert "leave it at 'auto'" in str(error.value)


@pytest.mark.parametrize("failure", ["conversion", "other embeddings"])
def test_failure_is_told(failure, monkeypatch, caplog):
    """Auto falls back to torch, once and for all; OpenVINO, asked for, is an error."""
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if failure == "conversion":
            raise RuntimeError("no such operation")
        return convert(make(), *arguments[1:])

    convert = embedding_engine.convert
    monkeypatch.setattr(embedding_engine, "convert", fail)
    model, images, engine = make(), pictures(1), EmbeddingEngine("auto")
    assert engine.network(model, images, None) is None
    assert engine.network(model, images, None) is None
    assert len(calls) == 1
    assert caplog.text.count("OpenVINO cannot embed with this backbone, so torch does") == 1
    reason = "no such operation" if failure == "conversion" else "differ from torch's by"
    assert reason in caplog.text
    with pytest.raises(UsageError, match=f"OpenVINO cannot embed images of 64 x 80 pixels.*{reason}"):
        EmbeddingEngine("openvino").network(model, images, None)


@pytest.mark.parametrize("name", ["onnx", "", None, True])
def test_no_such_engine(name):
    with pytest.raises(UsageError, match=f"embedding_engine must be one of auto, torch, openvino; got {name!r}"):
        make_model(embedding_engine=name)


def test_copies_and_pickles():
    model, engine, images = make(), EmbeddingEngine("openvino"), pictures(1)
    expected = engine.network(model, images, None)(images)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other.name == "openvino"
        np.testing.assert_array_equal(other.network(model, images, None)(images), expected)


def test_a_size_that_the_backbone_refuses_is_no_failure_of_openvino(caplog):
    model = make(backbone="test_vit", layers=["blocks.3"])
    with pytest.raises(UsageError, match="The backbone takes images of"):
        EmbeddingEngine("auto").network(model, pictures(1, 50, 70), None)
    assert "OpenVINO cannot embed" not in caplog.text
