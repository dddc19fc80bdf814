"""Tiles: the geometry against anomalib's tiler, in both worlds."""

import re

import numpy as np
import pytest
import torch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from helpers.training import LAYERS
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from patchcore_plugin.bundle import RegionOfInterest, Tiles
from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.arguments import check_tiles
from patchcore_plugin.model.torch_model import FaissPatchcoreModel
from patchcore_plugin.scoring import ScoreRule


@st.composite
def inputs(draw):
    """Size of an input, size and stride of its tiles, and pixels of a patch; the tiles are of whole patches."""
    patch = draw(st.integers(1, 3))
    size, tile, stride = [], [], []
    for _ in range(2):
        cells = draw(st.integers(1, 5))
        tile.append(cells * patch)
        stride.append(draw(st.integers(1, cells)) * patch)
        size.append(draw(st.integers(cells * patch, cells * patch + 20)))
    return tuple(size), tuple(tile), tuple(stride), patch


@settings(max_examples=200)
@given(inputs())
def test_put_together_as_anomalibs_tiler_does(given):
    """The values of a tile are means of its pixels, as a network's are of patches; sums in float64 are the reference."""
    size, tile, stride, patch = given
    image = np.random.default_rng(0).normal(size=size)
    tiler = Tiler(tile, stride)
    means = torch.nn.functional.avg_pool2d(tiler.tile(torch.from_numpy(image)[None, None]).double(), patch)
    expected = tiler.untile(means)[0, 0].numpy()

    tiles = Tiles(size=tile, stride=stride)
    layout = tiles.layout(size, tuple(side // patch for side in tile))
    padded = np.pad(image, [(0, after - side) for after, side in zip(tiles.padded(size), size, strict=True)])
    joined = np.zeros(layout.grid)
    for (top, left), (rows, columns) in zip(layout.places, layout.windows, strict=True):
        cut = padded[top : top + tile[0], left : left + tile[1]]
        cells = cut.reshape(tile[0] // patch, patch, tile[1] // patch, patch).mean((1, 3))
        joined[rows, columns] += cells[: rows.stop - rows.start, : columns.stop - columns.start]
    rows, columns = (-(-side // patch) for side in size)
    np.testing.assert_allclose(joined / layout.counts, expected[:rows, :columns], atol=1e-6)
    assert layout.overlap == (layout.counts.max() > 1)


@given(inputs(), st.data())
def test_tiles_without_an_inspected_pixel_are_left_out(given, data):
    size, tile, stride, patch = given
    inspected = np.zeros(size, bool)
    inspected[data.draw(st.integers(0, size[0] - 1)) :, data.draw(st.integers(0, size[1] - 1)) :] = True
    tiles = Tiles(size=tile, stride=stride)
    cells = tuple(side // patch for side in tile)
    every, some = tiles.layout(size, cells), tiles.layout(size, cells, inspected)
    assert some.places == [
        (top, left) for top, left in every.places if inspected[top : top + tile[0], left : left + tile[1]].any()
    ]
    seen = RegionOfInterest.of(inspected).at(every.grid)
    assert (some.counts[seen] == every.counts[seen]).all(), "an inspected patch is the mean of all tiles that have it"


@pytest.mark.parametrize(
    ("size", "tile", "stride", "cells", "reason"),
    [
        ((64, 64), (128, 64), (64, 64), (16, 8), "(128, 64) pixels (height, width) are larger than the input of (64, 64)"),
        ((4000, 4000), (16, 16), (8, 8), (2, 2), "499 x 499 tiles are more than 10,000"),
        ((256, 256), (100, 100), (100, 100), (13, 13), "do not lie on one grid: take multiples of 7"),
        ((256, 256), (128, 128), (100, 100), (16, 16), "do not lie on one grid: take multiples of 8"),
    ],
)
def test_tiles_that_do_not_fit(size, tile, stride, cells, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        Tiles(size=tile, stride=stride).layout(size, cells)


def test_stride_larger_than_a_tile():
    with pytest.raises(ValidationError, match="leaves pixels out"):
        Tiles(size=(64, 64), stride=(64, 65))


@pytest.mark.parametrize(
    ("tile_size", "tile_stride", "reason"),
    [
        (None, 64, "tile_stride=64 has no meaning without tile_size"),
        (0, None, "tile_size must be a height and a width in pixels"),
        ("256", None, "tile_size must be a height and a width in pixels, e.g. [256, 256], got '256'"),
        (True, None, "tile_size must be a height"),
        ([256, 256, 3], None, "tile_size must be a height"),
        (256, [256.5, 1], "tile_stride must be a height"),
        (256, 257, "tile_stride must be at most tile_size, [256, 256], got [257, 257]"),
        (20_000, None, "tile_size may have sides of up to 16,384 pixels"),
    ],
)
def test_arguments_that_cannot_be(tile_size, tile_stride, reason):
    with pytest.raises(UsageError, match=re.escape(reason)):
        check_tiles(tile_size, tile_stride)


def test_arguments():
    assert check_tiles(None, None) is None
    assert check_tiles(256, None) == Tiles(size=(256, 256), stride=(256, 256))
    assert check_tiles([256, 128], 64) == Tiles(size=(256, 128), stride=(64, 64))


@pytest.fixture(scope="module")
def model():
    return FaissPatchcoreModel(LAYERS, "efficientnet_lite0")


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 200, 328, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("tile", "stride"), [((128, 128), (128, 128)), ((128, 96), (64, 48)), ((200, 328), (200, 328))])
def test_embeddings_are_those_of_anomalibs_tiler(model, images, monkeypatch, tile, stride):
    """In parts of a few tiles too; the padded border is cut off."""
    monkeypatch.setattr("patchcore_plugin.model.torch_model._TILE_PIXELS", 3 * 2 * 128 * 128)
    tiler = Tiler(tile, stride)
    model.tiler = None
    expected = tiler.untile(model.embed(tiler.tile(images)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, :25, :41]
    model.tiler = Tiler(tile, stride)
    torch.testing.assert_close(model.embed(images), expected, atol=1e-4, rtol=1e-4)


def test_inspected_embeddings_need_no_other_tiles(model, images):
    """The embeddings of patches inside a region of interest, without the tiles that have none of it."""
    inspected = np.zeros((200, 328), bool)
    inspected[:100, 150:] = True
    region = RegionOfInterest.of(inspected)
    model.tiler, model.rule = Tiler((64, 64), (32, 32)), ScoreRule()
    try:
        expected = model.embed(images * torch.from_numpy(inspected))
        model.rule = ScoreRule(region=region)
        found, numbers = model.embed(images), region.patches((25, 41))
    finally:
        model.rule = ScoreRule()
    torch.testing.assert_close(found.flatten(1, 2)[:, numbers], expected.flatten(1, 2)[:, numbers], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("tiler", "reason"),
    [
        (Tiler((128, 128), (100, 100)), "do not lie on one grid: take multiples of 8 pixels. Set tile_size and tile_stride"),
        (Tiler((256, 256), (256, 256)), "are larger than the input of (200, 328). Set tile_size"),
        (Tiler((128, 128), (64, 64), remove_border_count=1), "remove_border_count=1 leaves patches without an embedding"),
        (Tiler((128, 128), (64, 64), mode=ImageUpscaleMode.INTERPOLATION), "use mode 'padding'"),
    ],
)
def test_tilers_that_cannot_be(model, images, tiler, reason):
    model.tiler = tiler
    with pytest.raises(UsageError, match=re.escape(reason)):
        model.embed(images)
