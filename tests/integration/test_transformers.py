"""Vision transformers with random weights: from training to scores in the runtime, and what is refused before it."""

import numpy as np
import pytest
import timm
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data.utils import read_image
from helpers.server import SERVE, bentoml_serve
from helpers.training import folder_datamodule, make_engine, make_model

from patchcore_plugin import PatchcoreRuntime, Spade
from patchcore_plugin.errors import UsageError
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import read_image as read_pixels
from patchcore_plugin.model.backbone import Backbone
from patchcore_plugin.model.conversion import TOLERANCE
from patchcore_plugin.model.pre_processing import build_pre_processor

VIT = {"backbone": "test_vit", "layers": ["blocks.2", "blocks.3"], "pre_trained": False}
REAL = {
    "vit_small_patch14_dinov2.lvd142m": (["blocks.5", "blocks.8"], (224, 252), (16, 18, 768)),
    "vit_small_patch16_dinov3.lvd1689m": (["blocks.5", "blocks.8"], (224, 256), (14, 16, 768)),
    "swin_tiny_patch4_window7_224.ms_in1k": (["layers.1", "layers.2"], (224, 256), (28, 32, 576)),
}


def fit(few, folder, callbacks=(), **arguments):
    """A model that learned from ``few``."""
    torch.manual_seed(0)
    model = make_model(**{**VIT, **arguments})
    make_engine(folder, callbacks=list(callbacks)).fit(model, datamodule=folder_datamodule(few))
    return model.cpu().eval()


def assert_same(model, runtime, images):
    """Embeddings and scores of the runtime are the model's."""
    pictures = torch.stack([read_image(path, as_tensor=True) for path in images])
    with torch.no_grad():
        transformed = model.pre_processor.transform(pictures)
        expected, scores = model.model.embed(transformed).numpy(), model.model(transformed).pred_score.numpy()
    found = runtime.embed([read_pixels(path) for path in images])
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose([answer.score for answer in runtime.predict(images)], scores, rtol=1e-2)


@pytest.fixture(scope="module")
def fitted(few, tmp_path_factory):
    """A transformer whose position embeddings were resampled, from 10 x 10 patches to 8 x 9."""
    return fit(few, tmp_path_factory.mktemp("vit"), image_size=(128, 144))


def test_bundle_computes_what_torch_does(fitted, few, tmp_path):
    runtime = PatchcoreRuntime.load(export_bundle(fitted, tmp_path / "bundle"))
    assert runtime.manifest.grid == (8, 9)
    assert_same(fitted, runtime, sorted((few / "test").rglob("*.png")))


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_precisions(fitted, few, tmp_path, precision):
    """Scores are near those of float32, and the self-test that the export records is passed."""
    if precision == "int8":
        pytest.importorskip("nncf", reason="the extra quantize is not installed")
    runtime = PatchcoreRuntime.load(export_bundle(fitted, tmp_path / "bundle", precision=precision))
    trial = runtime.manifest.precision_trials[-1]
    assert (runtime.manifest.precision, trial.precision) == (precision, precision)
    assert trial.error < 0.1
    assert len(runtime.predict(sorted((few / "test/good").iterdir()))) == 8


@pytest.mark.parametrize("name", ["test_vit", "test_vit4", "vit_tiny_patch16_dinov3_qkvb"])
def test_features_are_the_patches_without_prefix_tokens(name):
    """Class token and registers are left out; row and column of a feature are those of its patch."""
    backbone = Backbone(name, ["blocks.1"], pre_trained=False)
    net = backbone.net.model
    tokens = []
    net.blocks[1].register_forward_hook(lambda *found: tokens.append(found[2]))
    (features,) = backbone(torch.rand(1, 3, 160, 192))
    assert features.shape[2:] == (10, 12)
    assert net.num_prefix_tokens >= 1
    assert torch.equal(features[0].flatten(1).T, tokens[0][0, net.num_prefix_tokens :])


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("vit_tiny_patch16_224", (250, 256), r"16 x 16 pixels, and got 250 x 256.*\[240, 256\] or \[256, 256\]"),
        ("eva02_tiny_patch14_224", (8, 30), r"14 x 14 pixels, and got 8 x 30.*\[14, 28\] or \[14, 42\]"),
        ("test_vit_relpos", (160, 176), r"images of 160 x 160 pixels alone, and got 160 x 176.*\[160, 160\]"),
    ],
)
def test_image_size_that_a_transformer_cannot_take(name, size, words):
    with pytest.raises(UsageError, match=words):
        Backbone(name, ["blocks.1"], pre_trained=False)(torch.zeros(1, 3, *size))


def test_sizes_of_crops_and_tiles_count(few, tmp_path):
    with pytest.raises(UsageError, match=r"got 124 x 128.*With a center crop, its size counts"):
        fit(few, tmp_path, pre_processor=build_pre_processor((160, 160), (124, 128)))
    tiler = TilerConfigurationCallback(enable=True, tile_size=72, stride=72)
    with pytest.raises(UsageError, match=r"got 72 x 72.*with tiles, that of a tile"):
        fit(few, tmp_path, [tiler], image_size=(144, 144))
    tiler = TilerConfigurationCallback(enable=True, tile_size=64, stride=64)
    model = fit(few, tmp_path, [tiler], image_size=(140, 140))  # whose last tiles are padded
    assert model.model.embed(torch.zeros(1, 3, 140, 140)).shape == (1, 9, 9, 128)


def test_default_layers_are_those_of_a_resnet():
    with pytest.raises(UsageError, match=r"no layer 'layer2', 'layer3'.*Begin with .*: layers: \[blocks\.2, blocks\.4\]"):
        make_model(backbone="test_vit", layers=["layer2", "layer3"], pre_trained=False)


def test_spade(few, tmp_path):
    model = Spade("test_vit", ["blocks.1", "blocks.3"], pre_trained=False, pre_processor=build_pre_processor((128, 144)))
    metrics = make_engine(tmp_path).train(model, datamodule=folder_datamodule(few))
    assert model.model.image_bank.shape == (8, 64)
    assert metrics[0]["image_AUROC"] > 0


def test_member_of_an_ensemble(few, tmp_path):
    """A transformer beside a convnet whose patch grid is the same."""
    member = {"backbone": "efficientnet_lite0", "layers": ["blocks.4"]}
    model = fit(few, tmp_path, ensemble=[member], image_size=(128, 144))
    runtime = PatchcoreRuntime.load(export_bundle(model, tmp_path / "bundle"))
    assert_same(model, runtime, sorted((few / "test/good").iterdir()))


class BesselFunction(torch.nn.Module):
    """An operation that OpenVINO does not know."""

    def forward(self, tokens):
        return torch.special.bessel_j0(tokens)


class Branch(torch.nn.Module):
    """Two ways of computing; a trace of an image of zeros sees only one."""

    def forward(self, tokens):
        return tokens * 2 if tokens.mean() > 0 else -tokens


def vit_with_a_step(step, **arguments):
    net = timm.create_model("test_vit", **arguments)
    getattr(net, "model", net).patch_embed.norm = step
    return net


@timm.models.register_model
def vit_with_a_bessel_function(**arguments):
    return vit_with_a_step(BesselFunction(), **arguments)


@timm.models.register_model
def vit_with_a_branch(**arguments):
    return vit_with_a_step(Branch(), **arguments)


@pytest.mark.parametrize(
    ("backbone", "reason"), [("vit_with_a_bessel_function", "bessel_j0"), ("vit_with_a_branch", "differ from torch's by")]
)
def test_backbone_that_cannot_be_exported_is_refused_at_the_first_images(few, tmp_path, backbone, reason):
    """Because OpenVINO does not know an operation, or because it would compute other features."""
    with pytest.raises(UsageError, match=f"could be trained, but not exported: .* of 128 x 128 pixels .*{reason}"):
        fit(few, tmp_path, backbone=backbone, image_size=(128, 128))


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_names_are_served(few, tmp_path, name):
    """DINOv2, DINOv3 and Swin, at a size that is not their own, over HTTP."""
    layers, size, grid = REAL[name]
    model = fit(few, tmp_path, backbone=name, layers=layers, image_size=size)
    bundle = export_bundle(model, tmp_path / "bundle")
    images = sorted((few / "test").rglob("*.png"))[::4]
    runtime = PatchcoreRuntime.load(bundle)
    assert (*runtime.manifest.grid, runtime.manifest.embedding_dimension) == grid
    assert_same(model, runtime, images)
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle)) as server:
        for path, expected in zip(images, runtime.predict(images), strict=True):
            answer = server.client.post("/predict", files={"image": path.read_bytes()}).raise_for_status().json()
            assert answer["score"] == pytest.approx(expected.score, rel=1e-4)
