"""The steps before the network, inside the IR, against torchvision's."""

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from patchcore_plugin.bundle import Preprocessing
from patchcore_plugin.export.preprocessing_graph import with_preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def steps_alone(recipe: Preprocessing) -> ov.CompiledModel:
    images = ops.parameter([-1, 3, *recipe.size], np.float32)
    network = with_preprocessing(ov.Model([ops.result(ops.relu(ops.add(images, np.float32(100))))], [images]), recipe)
    return ov.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def expected(images: np.ndarray, recipe: Preprocessing) -> np.ndarray:
    crop = [CenterCrop(recipe.crop)] if recipe.crop else []
    transform = Compose([Resize(recipe.resize, antialias=True), *crop, Normalize(MEAN, STD)])
    return transform(torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255).numpy()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    target=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    margin=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_any_size(seed, batch, size, target, margin):
    crop = tuple(max(1, whole - less) for whole, less in zip(target, margin, strict=True))
    recipe = Preprocessing(resize=target, crop=crop, mean=MEAN, std=STD)
    images = np.random.default_rng(seed).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
    result = steps_alone(recipe)([images])[0] - 100
    np.testing.assert_allclose(result, expected(images, recipe), atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (1900, 2500), (300, 300), (256, 256), (257, 255)])
def test_real_sizes(size):
    recipe = Preprocessing(resize=(256, 256), mean=MEAN, std=STD)
    images = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    np.testing.assert_allclose(steps_alone(recipe)([images])[0] - 100, expected(images, recipe), atol=1e-4)


def test_longest_side_at_a_large_size():
    """Whole numbers of the triangles do not overflow up to the longest side that is read."""
    recipe = Preprocessing(resize=(2, 16_384), mean=MEAN, std=STD)
    images = np.random.default_rng(0).integers(0, 256, (1, 2, 32_768, 3), dtype=np.uint8)
    np.testing.assert_allclose(steps_alone(recipe)([images])[0] - 100, expected(images, recipe), atol=2e-3)


def test_sizes_in_turn():
    """A compiled network takes one size after the other, and every batch."""
    recipe = Preprocessing(resize=(32, 48), crop=(24, 24), mean=MEAN, std=STD)
    network = steps_alone(recipe)
    rng = np.random.default_rng(0)
    for shape in [(1, 40, 60), (3, 20, 30), (2, 40, 60), (1, 100, 7)]:
        images = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        np.testing.assert_allclose(network([images])[0] - 100, expected(images, recipe), atol=1e-4)
