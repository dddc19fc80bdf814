"""Tiled models from the arguments, and from anomalib's callback, to the bundle and its answers."""

import json
import shutil

import numpy as np
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data.utils import read_image
from helpers.bundles import change_manifest
from helpers.training import folder_datamodule, make_engine, make_model

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.bundle import MANIFEST, BundleError, Tiles, read_manifest
from patchcore_plugin.cpu import instruction_sets
from patchcore_plugin.errors import UsageError
from patchcore_plugin.export import export_bundle
from patchcore_plugin.operations.update import update_bundle

TILES = Tiles(size=(128, 96), stride=(96, 64))
REGION = [{"rectangle": [0, 0, 1, 1]}, {"rectangle": [0.75, 0, 1, 1], "ignore": True}]


@pytest.fixture(scope="module")
def trained_tiles(few, tmp_path_factory):
    """A checkpoint of a model with overlapping tiles, a region of interest, and an input that they do not fill evenly."""
    model = make_model(
        image_size=(264, 232), tile_size=(128, 96), tile_stride=(96, 64), region_of_interest=REGION, num_neighbors=2
    )
    engine = make_engine(tmp_path_factory.mktemp("tiles"))
    engine.fit(model, datamodule=folder_datamodule(few))
    return engine.best_model_path


@pytest.fixture(scope="module")
def tiled(trained_tiles):
    return FaissPatchcore.load_from_checkpoint(trained_tiles, map_location="cpu").eval()


@pytest.fixture(scope="module")
def tiled_bundle(tiled, tmp_path_factory):
    return export_bundle(tiled, tmp_path_factory.mktemp("tiled") / "bundle", index="flat")


def test_bundle_is_the_model(tiled, tiled_bundle, test_images):
    """Scores, maps and embeddings, for images of several sizes."""
    manifest = read_manifest(tiled_bundle)
    assert (manifest.format_version, manifest.preprocessing.tiles, manifest.grid) == (9, TILES, (33, 29))
    runtime = PatchcoreRuntime.load(tiled_bundle)
    random = np.random.default_rng(0).integers(0, 256, (517, 199, 3), dtype=np.uint8)
    for image in [*test_images[::25], random]:
        pixels = torch.from_numpy(random).permute(2, 0, 1) / 255 if image is random else read_image(image, as_tensor=True)
        with torch.no_grad():
            expected = tiled.model(tiled.pre_processor.transform(pixels[None]))
        (found,) = runtime.predict([image])
        assert found.score == pytest.approx(float(expected.pred_score), rel=1e-3)
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map[0, 0].numpy(), atol=1e-3 * found.score)
        assert not found.patch_distances[:, 22:].any()
    (found,) = PatchcoreRuntime.load(tiled_bundle, device="HETERO:CPU").predict([random])
    assert found.score == pytest.approx(runtime.predict([random])[0].score, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("int8", marks=pytest.mark.slow)])
def test_bundle_in_other_precisions(tiled, tiled_bundle, test_images, tmp_path, precision):
    if precision == "int8":
        pytest.importorskip("nncf", reason="the extra quantize is not installed")
    bundle = export_bundle(tiled, tmp_path / "bundle", index="flat", precision=precision, images=test_images[:4])
    for found, expected in zip(*(PatchcoreRuntime.load(path).predict(test_images[:3]) for path in (bundle, tiled_bundle)),
                               strict=True):  # fmt: skip
        coarse = precision == "int8" and not instruction_sets()["VNNI"]  # off by a tenth without 8-bit products
        assert found.score == pytest.approx(expected.score, rel=0.2 if coarse else 0.1)


def test_explained_and_updated(tiled_bundle, test_images, tmp_path):
    """A reason lies in the region of interest; an update keeps the tiles."""
    good, bad = test_images[-5:], test_images[0]
    _, reasons = PatchcoreRuntime.load(tiled_bundle).explain(bad)
    assert all(reason.column < 22 for reason in reasons)
    update_bundle(tiled_bundle, good, tmp_path / "updated")
    manifest = read_manifest(tmp_path / "updated")
    assert (manifest.format_version, manifest.preprocessing.tiles) == (9, TILES)
    assert manifest.lineage[0].images == 4


@pytest.mark.parametrize(
    ("change", "version", "reason"),
    [
        ({}, 8, "format_version 8 has no tiles"),
        ({"size": [256, 256], "stride": [256, 256]}, 9, "are larger than the input"),
        ({"stride": [200, 64]}, 9, "leaves pixels out"),
        ({"size": [96, 96]}, 9, r"has an input of 96 x 128 pixels, the manifest says 96 x 96"),
        ({"stride": [96, 60]}, 9, "do not lie on one grid"),
    ],
)
def test_manifest_with_other_tiles(tiled_bundle, tmp_path, change, version, reason):
    folder = tmp_path / "bundle"
    shutil.copytree(tiled_bundle, folder)
    preprocessing = json.loads((folder / MANIFEST).read_text())["preprocessing"]
    tiles = {**preprocessing["tiles"], **change}
    change_manifest(folder, format_version=version, preprocessing={**preprocessing, "tiles": tiles})
    with pytest.raises(BundleError, match=reason):
        PatchcoreRuntime.load(folder)


def test_checkpoint_keeps_the_tiles_of_anomalibs_callback(few, tmp_path):
    """An export from the checkpoint, where there is no callback, embeds as the training did."""
    callback = TilerConfigurationCallback(enable=True, tile_size=128, stride=64)
    model, engine = make_model(), make_engine(tmp_path, callbacks=[callback])
    engine.fit(model, datamodule=folder_datamodule(few))
    loaded = FaissPatchcore.load_from_checkpoint(engine.best_model_path, map_location="cpu").eval()
    assert export_bundle(loaded, tmp_path / "bundle", index="flat")
    assert read_manifest(tmp_path / "bundle").preprocessing.tiles == Tiles(size=(128, 128), stride=(64, 64))
    other = make_model(tile_size=64)
    with pytest.raises(UsageError, match=r"tiling callback sets .*: leave one of them out"):
        make_engine(tmp_path, callbacks=[callback]).fit(other, datamodule=folder_datamodule(few))
