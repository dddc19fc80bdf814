"""The nearest normal patch of each region, against brute force; with and without thumbnails."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.training import make_model
from PIL import Image

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import BundleError, Scale
from patchcore_plugin.cli import main
from patchcore_plugin.export import export_bundle
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.runtime.explain import MAX_REASONS


@pytest.fixture(scope="module")
def shown(trained, tmp_path_factory) -> PatchcoreRuntime:
    """A runtime whose bundle has thumbnails, and a graph as its index."""
    path = tmp_path_factory.mktemp("shown") / "bundle"
    export_bundle(trained.model, path, "cells", index="hnsw", thumbnails=True)
    return PatchcoreRuntime.load(path)


@pytest.mark.parametrize("which", ["runtime", "shown"])
def test_nearest_patch_is_that_of_brute_force(which, request, trained, test_images, tmp_path):
    runtime = request.getfixturevalue(which)
    bank = trained.model.model.memory_bank.double().numpy()
    explained = 0
    picture = tmp_path / "wide.png"  # of another size than the network's
    Image.open(test_images[0]).convert("RGB").resize((600, 200)).save(picture)
    for image in [*test_images[::20], picture]:
        prediction, reasons = runtime.explain(image)
        expected = runtime.predict([image])[0]
        assert prediction.score == expected.score
        embedding = runtime.embed([np.asarray(Image.open(image).convert("RGB"))])[0].astype(np.float64)
        regions = expected.regions[:MAX_REASONS] or [None]
        assert [reason.region for reason in reasons] == regions
        for reason in reasons:
            patch = embedding[reason.row, reason.column]
            distances = np.sqrt(((bank - patch) ** 2).sum(1))
            assert reason.nearest.distance == pytest.approx(distances.min(), rel=1e-4)
            assert distances[reason.nearest.vector] == pytest.approx(distances.min(), rel=1e-4)
            origin = trained.model.origins.patches[reason.nearest.vector]
            name = Path(trained.model.origins.images[origin[0]])
            assert reason.nearest.image == f"good/{name.name}"
            assert (reason.nearest.row, reason.nearest.column) == tuple(origin[1:])
            assert (reason.nearest.box.left, reason.nearest.box.top) == (8 * origin[2], 8 * origin[1])
            width, height = Image.open(image).size
            box = reason.box
            assert box.left + box.width / 2 == pytest.approx((reason.column + 0.5) * width / 32, abs=1)
            assert box.top + box.height / 2 == pytest.approx((reason.row + 0.5) * height / 32, abs=1)
            if reason.region is not None:  # its highest point is in the patch
                assert reason.region.left - 1 <= box.left + box.width
                assert box.left <= reason.region.left + reason.region.width + 1
            explained += 1
    assert explained > 5


def test_most_anomalous_patch_where_there_is_no_region(bundle_copy, test_images):
    """With a threshold above every value, without a threshold, and with a sensitivity of 0."""
    runtime = PatchcoreRuntime.load(bundle_copy)
    for pixel in (Scale(threshold=1e6), Scale(), Scale(threshold=1, minimum=0, maximum=2, sensitivity=0)):
        runtime.manifest = runtime.manifest.model_copy(update={"pixel": pixel})
        prediction, (reason,) = runtime.explain(test_images[0])
        assert reason.region is None
        farthest = np.unravel_index(prediction.patch_distances.argmax(), (32, 32))
        assert (reason.row, reason.column) == farthest
        assert reason.nearest.distance == pytest.approx(prediction.patch_distances.max(), rel=1e-5)


def test_crops_show_the_patch(shown, runtime, cells):
    """A training image's own patches are in the bank: the crop of what is nearest is that of the image itself."""
    origins = shown.origins
    assert origins.thumbnails.shape == (len(origins.images), 256, 256, 3)
    name = origins.images[0]
    pixels = np.asarray(Image.open(cells / "train" / name).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(origins.thumbnails[0], pixels)
    vector = int(np.flatnonzero(origins.patches[:, 0] == 0)[0])
    row, column = origins.patches[vector][1:]
    one = MemoryBank(shown.bank.vectors[vector][None])  # which every patch is nearest to
    from patchcore_plugin.runtime.explain import explain

    (outcome,) = shown.stream_outcomes([pixels])
    alone = type(origins)(origins.patches[vector][None], origins.images, origins.thumbnails)
    (reason, *_) = explain(outcome, one, alone)
    assert reason.crop.shape == reason.nearest.crop.shape == (224, 224, 3)
    left, top = (min(max(8 * place + 4 - 32, 0), 192) for place in (column, row))
    expected = np.asarray(
        Image.fromarray(pixels[top : top + 64, left : left + 64]).resize((224, 224), Image.Resampling.BICUBIC)
    )
    near = np.abs(reason.nearest.crop.astype(int) - expected).max(2) < 12
    assert near.mean() > 0.9, "all but the box that is drawn, and the border"
    assert runtime.explain(pixels)[1][0].nearest.crop is None


def test_command(shown, runtime, test_images, tmp_path):
    for chosen, hint, width in ((shown, None, 2 * 232 + 8), (runtime, "--thumbnails", 232 + 8)):
        result = CliRunner().invoke(main, ["explain", str(chosen.path), str(test_images[0]), "-o", str(tmp_path)])
        assert result.exit_code == 0, result.output
        reason = chosen.explain(test_images[0])[1][0]
        text = "".join(result.output.replace("│", "").split())
        assert f"{reason.nearest.distance:.4g}" in text
        assert "anomalous" in text
        assert hint is None or hint in text
        with Image.open(tmp_path / f"{test_images[0].name}.explain.png") as sheet:
            assert sheet.width == width
    result = CliRunner().invoke(main, ["explain", str(shown.path), str(tmp_path / "absent.png")])
    assert result.exit_code == 1


def test_thumbnails_need_the_training_images(trained, cells, tmp_path):
    model = make_model()
    model.load_state_dict(trained.model.state_dict())
    moved = shutil.copytree(cells / "train", tmp_path / "train")
    first = Path(trained.model.origins.images[0])
    paths = [str(moved / "good" / Path(image).name) for image in trained.model.origins.images]
    model.origins = type(trained.model.origins)(trained.model.origins.patches, paths)
    (moved / "good" / first.name).unlink()
    with pytest.raises(BundleError, match=rf"no thumbnail without the image: .*{first.name} is missing"):
        export_bundle(model.eval(), tmp_path / "bundle", index="flat", thumbnails=True)
    assert not (tmp_path / "bundle").exists()
