"""SPADE's arithmetic against float64, its degenerate inputs, and arguments that are refused."""

import numpy as np
import pytest
import torch
from helpers.references import nearest
from helpers.training import LAYERS
from scipy.ndimage import gaussian_filter

from patchcore_plugin import Spade
from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.spade import SpadeModel
from patchcore_plugin.model.torch_model import MemoryBankError


def make_model(neighbors=50, layers=LAYERS, image_layer="blocks.6") -> SpadeModel:
    return SpadeModel(layers, image_layer, "efficientnet_lite0", num_neighbors=neighbors).eval()


def resize_axis(values, axis, size):
    """Bilinear resize of one axis to more places, whose centers are aligned."""
    places = values.shape[axis]
    at = np.clip((np.arange(size) + 0.5) * places / size - 0.5, 0, places - 1)
    low = np.floor(at).astype(int)
    weight = np.expand_dims(at - low, tuple(range(1, values.ndim - axis)))
    return values.take(low, axis) * (1 - weight) + values.take(np.minimum(low + 1, places - 1), axis) * weight


def patches(layers):
    """Patches (h * w, D) of one image's layers (C, h, w), in float64."""
    height, width = layers[0].shape[1:]
    grids = [resize_axis(resize_axis(layer, 1, height), 2, width) for layer in layers]
    return np.concatenate(grids).reshape(-1, height * width).T


def reference(model, images, training, neighbors):
    """Image scores (B,) and maps (B, H, W) in float64, from the backbone's features."""
    net = model.feature_extractor
    found, known = ([feature.double().numpy() for feature in net(batch)] for batch in (images, training))
    distances, indices = nearest(found[-1].mean((2, 3)), known[-1].mean((2, 3)), neighbors)
    maps = []
    for image in range(len(images)):
        gallery = np.concatenate([patches([layer[index] for layer in known[:-1]]) for index in indices[image]])
        own, _ = nearest(patches([layer[image] for layer in found[:-1]]), gallery)
        grid = resize_axis(resize_axis(own.reshape(found[0].shape[2:]), 0, images.shape[2]), 1, images.shape[3])
        maps.append(gaussian_filter(grid, 4, mode="mirror", truncate=4.0))
    return distances.mean(1), np.stack(maps)


def pictures(count, seed, size=(96, 64)):
    """Random pictures (B, 3, H, W) with structure at several scales."""
    coarse = torch.randn(count, 3, 6, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") + 0.1


@pytest.mark.parametrize(("known", "neighbors"), [(7, 3), (7, 1), (4, 50), (1, 50)])
def test_against_float64(known, neighbors):
    """Several neighbors and one; fewer images than neighbors; a single training image."""
    model, training, images = make_model(neighbors), pictures(known, 0), pictures(3, 1)
    model.keep(model.extract(training))
    found = model(images)
    scores, maps = reference(model, images, training, min(known, neighbors))
    np.testing.assert_allclose(found.pred_score.numpy(), scores, rtol=1e-4)
    np.testing.assert_allclose(found.anomaly_map[:, 0].numpy(), maps, rtol=1e-3)


def test_image_layer_among_the_layers():
    model = make_model(2, ["blocks.2", "blocks.6"])
    training = pictures(3, 0)
    model.keep(model.extract(training))
    assert len(model.galleries) == 2
    assert torch.equal(model.image_bank, model.galleries[1].mean((2, 3)))


def test_equal_images():
    """An image that is known has distance 0, with copies of it in the training set too; equal images have equal scores."""
    model = make_model(5)
    same = pictures(1, 0).repeat(6, 1, 1, 1)
    model.keep(model.extract(same))
    found = model(same[:2])
    np.testing.assert_allclose(found.pred_score.numpy(), 0, atol=1e-4)
    np.testing.assert_allclose(found.anomaly_map.numpy(), 0, atol=1e-3)
    other = model(pictures(1, 9).repeat(2, 1, 1, 1))
    assert other.pred_score[0] == other.pred_score[1] > 0.1


def test_only_the_nearest_images_make_the_gallery():
    """A patch that only a far image has stays anomalous."""
    model = make_model(1)
    near, far = pictures(1, 0), pictures(1, 1) * 3
    model.keep(model.extract(torch.cat([near, far])))
    image = near.clone()
    image[..., :32, :32] = far[..., :32, :32]
    alone = make_model(1)
    alone.keep(alone.extract(near))
    expected = alone(image).anomaly_map
    torch.testing.assert_close(model(image).anomaly_map, expected, rtol=1e-4, atol=1e-3)
    model.num_neighbors = 2
    assert (model(image).anomaly_map < 0.9 * expected).any()


def test_state_travels(tmp_path):
    """The features of the training images are part of the state, whatever their number."""
    model, images = make_model(3), pictures(2, 1)
    model.keep(model.extract(pictures(5, 0)))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = make_model(3)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(images).pred_score, model(images).pred_score)
    assert torch.equal(other(images).anomaly_map, model(images).anomaly_map)


def test_nothing_known():
    with pytest.raises(MemoryBankError, match=r"Spade knows no training image.*train first"):
        make_model()(pictures(1, 0))


def test_features_that_are_not_finite():
    model = make_model()
    model.keep(model.extract(pictures(2, 0)))
    with pytest.raises(UsageError, match="NaN or infinite features"):
        model(torch.full((1, 3, 64, 64), torch.nan))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_neighbors": 0}, r"num_neighbors must be a whole number in \[1, 1000\], got 0\. .*the paper has 50"),
        ({"num_neighbors": 2.5}, "num_neighbors must be a whole number .* got 2.5"),
        ({"num_neighbors": 10**9}, "num_neighbors must be a whole number .* got 1000000000"),
        ({"num_neighbors": float("nan")}, "num_neighbors must be a whole number .* got nan"),
        ({"num_neighbors": "50"}, "num_neighbors must be a whole number .* got '50'"),
        ({"layers": []}, r"layers must be a non-empty list of layer names, got \[\]"),
        ({"layers": "blocks.2"}, "layers must be a non-empty list of layer names, got 'blocks.2'"),
        ({"layers": ["layer2"]}, r"'efficientnet_lite0' has no layer 'layer2'\. Its feature layers: blocks\.0, .*blocks\.6"),
        ({"layers": ["blocks.2", "blocks.2"]}, "names a layer twice"),
        ({"image_layer": "head"}, "has no layer 'head'"),
        ({"backbone": "wideresnet"}, "timm has no model 'wideresnet'"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises(UsageError, match=message):
        Spade(**{"backbone": "efficientnet_lite0", "layers": LAYERS, **arguments})


def test_deepest_layer_is_the_default():
    model = Spade("efficientnet_lite0", LAYERS).model
    pooled, *features = model.extract(pictures(1, 0))
    assert pooled.shape == (1, 320)
    assert [feature.shape[1] for feature in features] == [40, 112]
