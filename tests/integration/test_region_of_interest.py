"""A region of interest from training to HTTP, on cells with a random stamp in a corner."""

import copy
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.data.utils.tiler import Tiler
from click.testing import CliRunner
from helpers.bundles import change_manifest
from helpers.server import app_server
from helpers.training import assert_scores_alike, folder_datamodule, make_engine, make_model
from PIL import Image

from patchcore_plugin import ConformalPostProcessor, FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.bundle import BundleError, RegionOfInterest, read_manifest
from patchcore_plugin.cli import main
from patchcore_plugin.cli.bundles import _parts
from patchcore_plugin.errors import UsageError
from patchcore_plugin.export import export_bundle
from patchcore_plugin.operations.update import update_bundle
from patchcore_plugin.operations.validation import validate_bundle

STAMP = 90, 70  # pixels of the 300 x 300 of a cell
IGNORED = [{"rectangle": [0, 0, 0.3, 0.25], "ignore": True}]


def stamped(path: Path, seed: int) -> Image.Image:
    """A cell with random pixels in its upper left corner."""
    pixels = np.array(Image.open(path))
    height, width = STAMP[1], STAMP[0]
    pixels[:height, :width] = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def stamped_cells(cells, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stamped")
    for number, path in enumerate(sorted(cells.rglob("*.png"))):
        target = root / path.relative_to(cells)
        target.parent.mkdir(parents=True, exist_ok=True)
        stamped(path, number).save(target)
    return root


@pytest.fixture(scope="module")
def fitted(stamped_cells, tmp_path_factory) -> tuple[FaissPatchcore, Path]:
    """A model of the stamped cells that looks beside the stamp, and its checkpoint; the mask image is gone."""
    folder = tmp_path_factory.mktemp("region")
    mask = np.full((300, 300), 255, np.uint8)
    mask[: STAMP[1] + 5, : STAMP[0]] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    model = make_model(
        region_of_interest=folder / "mask.png",
        score_smoothing=1,
        post_processor=ConformalPostProcessor(0.05),
    )
    engine = make_engine(folder)
    engine.fit(model, datamodule=folder_datamodule(stamped_cells))
    (folder / "mask.png").unlink()
    return model.eval(), Path(engine.best_model_path)


@pytest.fixture(scope="module")
def region_bundle(fitted, tmp_path_factory) -> Path:
    return export_bundle(fitted[0], tmp_path_factory.mktemp("export") / "bundle", thumbnails=True)


@pytest.fixture(scope="module")
def region_runtime(region_bundle) -> PatchcoreRuntime:
    return PatchcoreRuntime.load(region_bundle)


def test_no_vector_comes_from_outside(fitted):
    model, _ = fitted
    region = model.model.rule.region
    inspected = region.at((32, 32))
    assert 0.9 < region.share < 0.93
    assert len(model.model.memory_bank) == 24 * int(inspected.sum()) * 2 // 100
    _, rows, columns = model.origins.patches.T
    assert inspected[rows, columns].all()
    embedding = model.model.embed(model.pre_processor.transform(_pixels(Path(model.origins.images[0]))))[0]
    mine = model.origins.patches[:, 0] == 0
    distances = torch.linalg.norm(model.model.memory_bank[mine] - embedding[rows[mine], columns[mine]], dim=1)
    assert mine.any()
    assert (distances < 1e-2).all()


def _pixels(path: Path) -> torch.Tensor:
    return read_image(path, as_tensor=True)[None]


def test_marks_outside_change_nothing(fitted, region_runtime, stamped_cells):
    """To the bit, by torch and by the bundle."""
    for path in sorted((stamped_cells / "test/defective").iterdir())[:3]:
        images = [np.asarray(stamped(path, seed).convert("RGB")) for seed in (1000, 1001)]
        first, second = region_runtime.predict(images)
        assert first.score == second.score
        np.testing.assert_array_equal(first.anomaly_map, second.anomaly_map)
        with torch.no_grad():
            found = [
                fitted[0].model(fitted[0].pre_processor.transform(torch.tensor(image).permute(2, 0, 1)[None] / 255))
                for image in images
            ]
        assert torch.equal(found[0].pred_score, found[1].pred_score)
        assert torch.equal(found[0].anomaly_map, found[1].anomaly_map)


def test_bundle_scores_as_torch(fitted, region_runtime, stamped_cells):
    paths = sorted((stamped_cells / "test").rglob("*.png"))[::5]
    for path, found in zip(paths, region_runtime.predict(paths), strict=True):
        with torch.no_grad():
            expected = fitted[0].model(fitted[0].pre_processor.transform(_pixels(path)))
        assert found.score == pytest.approx(float(expected.pred_score), rel=1e-3)
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map[0, 0], atol=0.02)
        assert found.mean_distance == pytest.approx(float(expected.anomaly_map.mean()), rel=1e-3)
        assert not found.anomaly_map[~fitted[0].model.rule.region.pixels].any()


def test_checkpoint_keeps_the_region(fitted, stamped_cells, tmp_path):
    """Though the mask image is not there any more."""
    model, checkpoint = fitted
    loaded = FaissPatchcore.load_from_checkpoint(checkpoint).eval()
    assert loaded.model.rule == model.model.rule
    assert loaded.region_of_interest.endswith("mask.png")
    other = make_model(score_smoothing=1, post_processor=ConformalPostProcessor(0.05))
    metrics = make_engine(tmp_path).test(other, datamodule=folder_datamodule(stamped_cells), ckpt_path=checkpoint)
    assert other.model.rule.region == model.model.rule.region
    assert metrics[0]["image_AUROC"] > 0.85


def test_info_tells_the_region(region_bundle, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(main, ["info", str(region_bundle)])
    assert re.search(r"9\d% of the input, 9\d% of the patches; leaves out \[0, 0, 0\.3\d?, 0\.2\d?\] \(left,", result.stdout)


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        ([], "inspects [0, 0, 1, 1]"),
        ([(0, 0, 30, 10), (90, 40, 100, 50)], "leaves out [0, 0, 0.3, 0.2], [0.9, 0.8, 1, 1]"),
        ([(0, 0, 100, 20), (0, 20, 80, 50)], "inspects [0.8, 0.4, 1, 1]"),
        ([(10 * n, 10, 10 * n + 5 + n, 20) for n in range(6)], "leaves out [0.5, 0.2, 0.6, 0.4], "),
    ],
)
def test_parts_of_a_region(boxes, text):
    """The largest first, four at most."""
    inspected = np.ones((50, 100), bool)
    for left, top, right, bottom in boxes:
        inspected[top:bottom, left:right] = False
    shown = _parts(inspected)
    assert shown.startswith(text)
    assert shown.endswith(("and 2 more" if len(boxes) > 4 else "") + " (left, top, right, bottom)")


def test_update_learns_nothing_outside(region_bundle, region_runtime, stamped_cells, tmp_path):
    images = sorted((stamped_cells / "test/good").iterdir())
    update_bundle(region_bundle, images, tmp_path / "new")
    new = PatchcoreRuntime.load(tmp_path / "new")
    assert new.manifest.preprocessing == region_runtime.manifest.preprocessing
    gained = new.origins.patches[len(region_runtime.origins.patches) :]
    assert len(gained)
    assert new.manifest.preprocessing.region.at((32, 32))[gained[:, 1], gained[:, 2]].all()
    assert validate_bundle(tmp_path / "new").ok


def test_reasons_lie_inside(region_runtime, stamped_cells):
    region = region_runtime.manifest.preprocessing.region
    for path in sorted((stamped_cells / "test/defective").iterdir())[:3]:
        prediction, reasons = region_runtime.explain(path)
        assert reasons
        assert all(region.at((32, 32))[reason.row, reason.column] for reason in reasons)
        assert all(region.at((32, 32))[reason.nearest.row, reason.nearest.column] for reason in reasons)
        picture = np.asarray(region_runtime.heatmap(path, prediction))
        original = np.asarray(Image.open(path).convert("RGB"))
        assert (picture[:60, :75].astype(int) <= original[:60, :75]).all()  # shaded
        assert picture[:60, :75].mean() < 0.7 * original[:60, :75].mean()


def test_http(region_bundle, stamped_cells):
    path = sorted((stamped_cells / "test/defective").iterdir())[0]
    with app_server(bundle=str(region_bundle)) as server:
        contents = [_encoded(stamped(path, seed)) for seed in (1, 2)]
        first, second = (server.client.post("/predict", files={"image": content}).json() for content in contents)
        assert first["score"] == second["score"]
        (described,) = server.client.get("/models").json()["models"]
        assert described["inspected_share"] == pytest.approx(0.92, abs=0.02)


def _encoded(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_manifest_of_an_older_format(region_bundle, tmp_path):
    folder = Path(shutil.copytree(region_bundle, tmp_path / "bundle"))
    assert read_manifest(folder).format_version == 7
    change_manifest(folder, format_version=6)
    with pytest.raises(BundleError, match="format_version 6 has no region"):
        PatchcoreRuntime.load(folder)


def test_network_with_another_region(region_bundle, tmp_path):
    """A manifest that shows another region than the network has is refused."""
    folder = Path(shutil.copytree(region_bundle, tmp_path / "bundle"))
    recipe = read_manifest(folder).preprocessing
    pixels = recipe.region.pixels.copy()
    pixels[:10] = False
    changed = recipe.model_copy(update={"region": RegionOfInterest.of(pixels)})
    change_manifest(folder, preprocessing=changed.model_dump(mode="json"))
    with pytest.raises(BundleError, match="otherwise than the manifest says"):
        PatchcoreRuntime.load(folder)


def test_augmentations_that_move_pixels():
    with pytest.raises(UsageError, match="only brightness goes with it"):
        make_model(region_of_interest=IGNORED, augmentations=["brightness", "mirror"])


def test_mask_of_other_proportions(cells, tmp_path):
    Image.new("L", (400, 300), 255).save(tmp_path / "mask.png")
    model = make_model(region_of_interest=tmp_path / "mask.png")
    with pytest.raises(UsageError, match=r"400 x 300 pixels, .* 300 x\s+300"):
        make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells))


def test_region_between_the_patches(cells, tmp_path):
    model = make_model(region_of_interest=[{"rectangle": [0, 0, 0.015, 1]}])
    with pytest.raises(UsageError, match="the center of no patch"):
        make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells))


def test_streamed_without_outliers_in_an_ensemble(stamped_cells, tmp_path):
    budget = 24 * 1024 * 304 * 2 * 1.25 / 4 / 2**30
    model = make_model(
        ensemble=[{"backbone": "efficientnet_lite1"}],
        region_of_interest=IGNORED,
        embedding_dtype="float16",
        memory_budget=budget,
        outlier_rejection=2,
    )
    make_engine(tmp_path, limit_val_batches=0).fit(model, datamodule=folder_datamodule(stamped_cells))
    _, rows, columns = model.origins.patches.T
    assert model.model.rule.region.at((32, 32))[rows, columns].all()
    assert len(rows) == sum(model.model.bank_sizes)


def test_tiles_see_nothing_outside(fitted, stamped_cells):
    model = copy.deepcopy(fitted[0].model)
    model.tiler = Tiler(tile_size=128, stride=128)
    path = sorted((stamped_cells / "test/good").iterdir())[0]
    first, second = (
        model.embed(
            fitted[0].pre_processor.transform(torch.tensor(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255)
        )
        for image in (stamped(path, 1), stamped(path, 2))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, fitted[0].model.embed(fitted[0].pre_processor.transform(_pixels(path))))


@pytest.mark.slow  # test_training.py's twin exports a model without a region
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_self_contained_export(fitted, stamped_cells, tmp_path, kind):
    path = make_engine(tmp_path).export(fitted[0], kind, export_root=tmp_path, input_size=(300, 300))
    images = torch.cat([_pixels(image) for image in sorted((stamped_cells / "test").rglob("*.png"))[::25]])
    assert_scores_alike(path, fitted[0], images)
