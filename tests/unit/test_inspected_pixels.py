"""The region of interest: pixels, patches, scores and maps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from patchcore_plugin.bundle import Preprocessing, RegionOfInterest
from patchcore_plugin.errors import PatchcoreError, UsageError
from patchcore_plugin.memory_bank import EnsembleBank, MemoryBank
from patchcore_plugin.model.pre_processing import IMAGENET_MEAN, IMAGENET_STD
from patchcore_plugin.model.region import build_region, check_region
from patchcore_plugin.scoring import ScoreRule, anomaly_map
from patchcore_plugin.scoring.scores import map_mean

NORMALIZE = Normalize(IMAGENET_MEAN, IMAGENET_STD)
TRANSFORM = Compose([Resize((64, 96), antialias=True), NORMALIZE])
CROPPED = Compose([Resize((70, 90), antialias=True), CenterCrop((64, 80)), NORMALIZE])
LEFT = [{"rectangle": [0, 0, 0.5, 1]}]


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
def test_mask_survives_its_record(seed, height, width):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    mask.flat[seed % mask.size] = True
    region = RegionOfInterest.of(mask)
    again = RegionOfInterest.model_validate_json(region.model_dump_json())
    np.testing.assert_array_equal(again.pixels, mask)
    assert again == region
    assert hash(again) == hash(region)
    assert region.share == mask.mean()


@pytest.mark.parametrize("runs", [[6], [0, 7], [0, 3, 0, 3], [-1, 7], [1, 2, 2], [1, True, 4], ["0", 6], []])
def test_runs_that_make_no_mask(runs):
    with pytest.raises(ValidationError):
        RegionOfInterest.model_validate_json(f'{{"size": [2, 3], "runs": {runs}}}'.replace("'", '"').replace("True", "true"))


def test_region_of_another_size():
    with pytest.raises(ValidationError, match=r"region has size \(2, 3\), the network's input \(3, 2\)"):
        Preprocessing(resize=(3, 2), mean=(0, 0, 0), std=(1, 1, 1), region=RegionOfInterest.of(np.ones((2, 3), bool)))


def test_patches_are_those_whose_center_lies_inside():
    mask = np.zeros((8, 12), bool)
    mask[2:6, 6:] = True
    region = RegionOfInterest.of(mask)
    assert region.patches((4, 6)).tolist() == [6 + 3, 6 + 4, 6 + 5, 12 + 3, 12 + 4, 12 + 5]
    np.testing.assert_array_equal(region.at((8, 12)), mask)


@settings(max_examples=40)
@given(st.data())
def test_nothing_outside_reaches_a_pixel_inside(data):
    """Of images at least as large as the network's input: to the bit."""
    transform = data.draw(st.sampled_from([TRANSFORM, CROPPED]))
    height, width = data.draw(st.integers(70, 300)), data.draw(st.integers(96, 400))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    left, right = np.sort(rng.random(2)) * 0.4 + (0, 0.6)
    top, bottom = np.sort(rng.random(2)) * 0.4 + (0, 0.6)
    region = build_region(check_region([{"rectangle": [left, top, right, bottom]}]), transform)
    ys, xs = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    inside = ((ys > top) & (ys < bottom))[:, None] & ((xs > left) & (xs < right))
    image = torch.from_numpy(rng.random((3, height, width), np.float32))
    marked = torch.where(torch.from_numpy(inside), image, torch.from_numpy(rng.random((3, height, width), np.float32)))
    pixels = torch.from_numpy(region.pixels)
    assert torch.equal(transform(image[None]) * pixels, transform(marked[None]) * pixels)


@pytest.mark.parametrize("transform", [TRANSFORM, CROPPED])
def test_region_has_nearly_the_area_of_its_shape(transform):
    height, width = transform.transforms[-2].size
    region = build_region(check_region([{"rectangle": [0.3, 0.3, 0.7, 0.7]}]), transform)
    rows, columns = np.flatnonzero(region.pixels.any(1)), np.flatnonzero(region.pixels.any(0))
    resize = transform.transforms[0].size
    for found, side, whole in ((rows, height, resize[0]), (columns, width, resize[1])):
        first, last = 0.3 * whole - (whole - side) / 2, 0.7 * whole - (whole - side) / 2
        assert first <= found[0] <= first + 2.5
        assert last - 3.5 <= found[-1] <= last


def test_shapes_lie_over_each_other():
    seen = build_region(
        check_region(
            [
                {"rectangle": [0.1, 0.1, 0.9, 0.9], "ignore": True},
                {"polygon": ((0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7))},
            ]
        ),
        TRANSFORM,
    ).at((10, 10))
    assert seen[0].all()
    assert seen[:, 0].all()
    assert seen[4:6, 4:6].all()
    assert not seen[2, 2:8].any()
    assert not seen[2:8, 2].any()


def test_mask_image_is_the_region_of_its_shape(tmp_path):
    pixels = np.zeros((400, 600), np.uint8)
    pixels[100:300, 60:540] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    found = build_region(check_region(tmp_path / "mask.png"), TRANSFORM)
    drawn = build_region(check_region([{"rectangle": [0.1, 0.25, 0.9, 0.75]}]), TRANSFORM)
    assert (found.pixels != drawn.pixels).mean() < 0.03
    assert np.all(found.pixels[:, 9:87].any(1) == (np.abs(np.arange(64) - 31.5) < 15))


@pytest.mark.parametrize(
    "value",
    [
        3,
        [],
        [3],
        {"rectangle": [0, 0, 1, 1]},
        [{"rectangle": [0, 0, 1]}],
        [{"rectangle": [0.5, 0, 0.5, 1]}],
        [{"rectangle": [0, 0, 1, 1.01]}],
        [{"rectangle": [0, 0, 1, float("nan")]}],
        [{"rectangle": [0, 0, 1, True]}],
        [{"rectangle": "0011"}],
        [{"rectangle": [0, 0, 1, 1], "polygon": [[0, 0], [1, 0], [1, 1]]}],
        [{"rectangle": [0, 0, 1, 1], "ignore": 1}],
        [{"polygon": [[0, 0], [1, 0]]}],
        [{"polygon": [[0, 0], [1, 0], [1, 1, 1]]}],
        [{"polygon": "abc"}],
        [{"circle": [0, 0, 1, 1]}],
        [{"ignore": True}],
    ],
)
def test_no_shape(value):
    with pytest.raises(UsageError, match="region_of_interest"):
        check_region(value)


def test_nothing_is_left(tmp_path):
    Image.new("L", (40, 40)).save(tmp_path / "black.png")
    for value in (
        str(tmp_path / "black.png"),
        [{"rectangle": [0, 0, 0.01, 0.01]}],
        [{"rectangle": [0, 0, 1, 1], "ignore": True}],
    ):
        with pytest.raises(UsageError, match="leaves nothing to inspect"):
            build_region(check_region(value), TRANSFORM)


def test_mask_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="absent"):
        build_region(check_region(tmp_path / "absent.png"), TRANSFORM)
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(PatchcoreError, match=r"no\.png"):
        build_region(check_region(tmp_path / "no.png"), TRANSFORM)


@pytest.mark.parametrize("transform", [None, NORMALIZE, Compose([Resize(64), NORMALIZE])])
def test_pre_processor_without_a_size(transform):
    with pytest.raises(UsageError, match="fixed height and width"):
        build_region(check_region(LEFT), transform)


@pytest.fixture
def region():
    """Of 64 x 96 pixels: a part with a straight edge, and a small one."""
    mask = np.zeros((64, 96), bool)
    mask[:, 40:] = True
    mask[10:30, 8:24] = True
    return RegionOfInterest.of(mask)


def test_map_is_the_mean_of_the_inspected_patches(region):
    """Against the definition in float64: every pixel's weights, those outside left out, scaled to a sum of 1."""
    patch = np.random.default_rng(0).random((2, 8, 12), np.float32) * region.at((8, 12))
    found = anomaly_map(patch, (64, 96), region=region)
    kernels = anomaly_map(np.eye(96, dtype=np.float32).reshape(96, 8, 12), (64, 96)).astype(np.float64)
    kernels *= region.at((8, 12)).reshape(96, 1, 1)
    expected = np.einsum("np,pyx->nyx", patch.reshape(2, 96), kernels) / np.maximum(kernels.sum(0), 1e-3) * region.pixels
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert not found[:, ~region.pixels].any()
    assert found.max() <= patch.max() * (1 + 1e-5)
    np.testing.assert_allclose(anomaly_map(torch.from_numpy(patch), (64, 96), region=region), found, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(map_mean(patch, (64, 96), region), found.mean((1, 2)), rtol=1e-4)


def test_map_of_equal_distances_is_equal_up_to_the_edge(region):
    patch = np.full((1, 8, 12), 3, np.float32) * region.at((8, 12))
    np.testing.assert_allclose(anomaly_map(patch, (64, 96), region=region)[0][region.pixels], 3, rtol=1e-5)


@pytest.mark.parametrize("rule", [ScoreRule(), ScoreRule(1, 1.0)])
@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_scores_of_a_region(region, rule, index):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 5)).astype(np.float32)
    embedding = rng.normal(size=(3, 8, 12, 5)).astype(np.float32)
    embedding[:, 0, 0] = 100  # outside
    rule = ScoreRule(rule.num_neighbors, rule.score_smoothing, region)
    inside = region.at((8, 12))
    banks = [
        MemoryBank(vectors, index),
        EnsembleBank([MemoryBank(vectors[:, :2], index), MemoryBank(vectors[:, 2:])], [1, 2.0]),
    ]
    for bank in banks:
        found = bank.score(embedding, rule)
        whole = bank.score(embedding, ScoreRule(rule.num_neighbors, rule.score_smoothing))
        np.testing.assert_allclose(found.patch[:, inside], whole.patch[:, inside], rtol=1e-6)
        assert not found.patch[:, ~inside].any()
        other = embedding.copy()
        other[:, ~inside] = rng.normal(size=(3, int((~inside).sum()), 5))
        again = bank.score(other, rule)
        assert np.array_equal(again.image, found.image)
        assert np.array_equal(again.patch, found.patch)
        if rule.num_neighbors == 1:
            smoothed = anomaly_map(found.patch, (8, 12), sigma=1, region=region)
            np.testing.assert_allclose(found.image, smoothed.max((1, 2)), rtol=1e-6)
            assert (found.image < 10).all()


def test_torch_selects_and_spreads_as_numpy(region):
    rule, embedding = ScoreRule(region=region), np.random.default_rng(0).random((2, 8, 12, 3), np.float32)
    inside = rule.inspected(embedding)
    assert inside.shape == (2, 1, len(region.patches((8, 12))), 3)
    np.testing.assert_array_equal(rule.inspected(torch.from_numpy(embedding)), inside)
    spread = rule.on_grid(inside[..., 0], (8, 12))
    np.testing.assert_array_equal(spread, embedding[..., 0] * region.at((8, 12)))
    np.testing.assert_array_equal(rule.on_grid(torch.from_numpy(inside[..., 0]), (8, 12)), spread)
