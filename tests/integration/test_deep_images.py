"""Images deeper than 8 bits, from the training to the answer: 8-bit cells and their deeper copies give the same."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from click.testing import CliRunner
from helpers.training import ROOT, folder_datamodule, make_engine, make_model
from PIL import Image
from torchvision.transforms.v2 import RandomHorizontalFlip

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.bundle import read_manifest
from patchcore_plugin.cli import main
from patchcore_plugin.errors import UsageError
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import ImageError, read_image
from patchcore_plugin.operations.update import update_bundle
from patchcore_plugin.operations.validation import validate_bundle

COUNTS = {"train/good": 10, "test/good": 8, "test/defective": 8}
SIDE = 96


def write_16_bits(values, path):
    Image.fromarray(values.astype(np.uint16) * 257).save(path)


def write_12_bits(values, path):
    Image.fromarray(np.rint(values * (4095 / 255)).astype(np.uint16)).save(path)


def write_floats(values, path):
    Image.fromarray((values / 255).astype(np.float32)).save(path.with_suffix(".tif"))


def copy_cells(cells: Path, root: Path, write) -> Path:
    """Some cells, small; each begins with a black and a white pixel, so that their values reach from 0 to 255."""
    for folder, count in COUNTS.items():
        (root / folder).mkdir(parents=True)
        for path in sorted((cells / folder).iterdir())[:count]:
            values = np.array(Image.open(path).convert("L").resize((SIDE, SIDE)))
            values[0, :2] = 0, 255
            write(values, root / folder / path.name)
    return root


def train(root: Path, folder: Path, **arguments):
    """Train a model; returns it, its AUROC, and its scores of the test images by name, from the checkpoint."""
    model, engine = make_model(image_size=[SIDE, SIDE], **arguments), make_engine(folder)
    metrics = engine.train(model, datamodule=folder_datamodule(root))
    again = make_model(image_size=[SIDE, SIDE])
    batches = engine.predict(again, datamodule=folder_datamodule(root), ckpt_path=engine.best_model_path)
    scores = {
        Path(path): float(score) for batch in batches for path, score in zip(batch.image_path, batch.pred_score, strict=True)
    }
    return model.eval(), metrics[0]["image_AUROC"], scores


@pytest.fixture(scope="module")
def plain(cells, tmp_path_factory):
    root = copy_cells(cells, tmp_path_factory.mktemp("plain"), lambda values, path: Image.fromarray(values).save(path))
    return train(root, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def plain_bundle(plain, tmp_path_factory):
    return export_bundle(plain[0], tmp_path_factory.mktemp("plain") / "bundle", index="flat", thumbnails=True)


@pytest.fixture(scope="module")
def deep(cells, tmp_path_factory):
    """Images of floats; model, AUROC, scores and bundle of a training that finds their range."""
    root = copy_cells(cells, tmp_path_factory.mktemp("deep"), write_floats)
    model, auroc, scores = train(root, tmp_path_factory.mktemp("results"), intensity_range="auto")
    bundle = export_bundle(model, tmp_path_factory.mktemp("export") / "bundle", index="flat", thumbnails=True)
    return root, model, auroc, scores, bundle


def assert_same(plain, model, auroc, scores, bundle):
    """Compare a model, its bundle and their answers with those of the 8-bit images."""
    assert auroc == pytest.approx(plain[1], abs=0.002)
    assert torch.equal(model.model.memory_bank, plain[0].model.memory_bank)
    assert len(set(scores.values())) > 12, "white and black images would have one score"
    assert sorted(scores.values()) == pytest.approx(sorted(plain[2].values()), abs=1e-4)
    runtime = PatchcoreRuntime.load(bundle)
    found = runtime.predict(scores)
    assert [one.normalized_score for one in found] == pytest.approx(list(scores.values()), abs=1e-3)
    for sources in ([np.asarray(Image.open(path)) for path in scores], [Image.open(path) for path in scores]):
        assert [one.score for one in runtime.predict(sources)] == [one.score for one in found]


def thumbnails(bundle):
    """Thumbnail of each training image."""
    origins = PatchcoreRuntime.load(bundle).origins
    return {Path(name).stem: picture for name, picture in zip(origins.images, origins.thumbnails, strict=True)}


def test_same_model_and_same_answers(plain, plain_bundle, deep):
    _, model, _, _, bundle = deep
    assert model.intensity_range == (0, 1)
    assert_same(plain, *deep[1:])
    shown, expected = (thumbnails(path) for path in (bundle, plain_bundle))
    np.testing.assert_equal(shown, expected)


def test_12_bits_in_16(plain, cells, tmp_path):
    root = copy_cells(cells, tmp_path / "deep", write_12_bits)
    found = train(root, tmp_path, intensity_range=[0, 4095])
    assert_same(plain, *found, export_bundle(found[0], tmp_path / "bundle", index="flat"))


def test_commands(deep, tmp_path):
    root, model, _, scores, bundle = deep
    assert read_manifest(bundle).format_version == 4
    assert f"values {model.intensity_range} become 0 to 255" in " ".join(
        CliRunner().invoke(main, ["info", str(bundle)]).output.split()
    )
    report = validate_bundle(bundle, list(scores))
    assert report.ok, report.checks
    result = CliRunner().invoke(main, ["predict", str(bundle), str(root / "test"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    heatmap = next((tmp_path / "out/heatmaps/good").iterdir())
    pixels = read_image(root / "test/good" / heatmap.stem, intensity_range=model.intensity_range)
    difference = abs(np.asarray(Image.open(heatmap)).astype(int) - pixels)
    assert np.median(difference) == 0, "the heatmap lies over the scaled image"
    result = CliRunner().invoke(main, ["explain", str(bundle), str(next(iter(scores))), "--output", str(tmp_path / "why")])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, ["benchmark", str(bundle), str(root / "test/good"), "--limit", "2"])
    assert result.exit_code == 0, result.output
    update = update_bundle(bundle, sorted((root / "test/good").iterdir()), tmp_path / "new")
    assert read_manifest(tmp_path / "new").preprocessing == read_manifest(bundle).preprocessing
    assert update.update.images == 7
    assert validate_bundle(tmp_path / "new").ok


def test_without_a_range_deep_images_are_refused(cells, plain, plain_bundle, tmp_path):
    """In training and in every use of the model, with the file's name, its type, and the argument."""
    root = copy_cells(cells, tmp_path / "deep", write_16_bits)
    reason = r"cell\d+\.png cannot be read as an image: it holds .*16.* values, and without intensity_range"
    with pytest.raises(ImageError, match=reason):
        train(root, tmp_path)
    images = sorted((root / "test/good").iterdir())
    engine = make_engine(tmp_path)
    for use in (
        lambda: engine.test(plain[0], datamodule=folder_datamodule(root)),
        lambda: engine.predict(plain[0], dataset=PredictDataset(images[0])),
        lambda: export_bundle(plain[0], tmp_path / "bundle", images=images),
    ):
        with pytest.raises(ImageError, match=reason):
            use()
    assert not (tmp_path / "bundle").exists()
    bundle = plain_bundle
    for use in (
        lambda: PatchcoreRuntime.load(bundle).predict(images),
        lambda: PatchcoreRuntime.load(bundle).explain(images[0]),
        lambda: update_bundle(bundle, images, tmp_path / "bundle"),
    ):
        with pytest.raises(ImageError, match=reason):
            use()
    assert not validate_bundle(bundle, images).ok
    assert "intensity_range" not in (bundle / "manifest.json").read_text(), "earlier versions read this bundle"


def test_one_image_among_others(deep, tmp_path):
    """PredictDataset gives images of their own size; an 8-bit image is refused."""
    _, model, _, scores, _ = deep
    path = next(iter(scores))
    engine = make_engine(tmp_path)
    (batch,) = engine.predict(model, dataset=PredictDataset(path))
    assert float(batch.pred_score) == pytest.approx(scores[path], abs=1e-5)
    Image.new("L", (SIDE, SIDE), 90).save(tmp_path / "preview.png")
    with pytest.raises(ImageError, match=r"preview\.png cannot be read as an image: it holds 8 bits"):
        engine.predict(model, dataset=PredictDataset(tmp_path / "preview.png"))


def test_what_a_range_does_not_go_with(cells, tmp_path):
    root = copy_cells(cells, tmp_path / "deep", write_16_bits)
    for arguments, reason in (
        ({"augmentations": RandomHorizontalFlip()}, "leave RandomHorizontalFlip out"),
        ({"val_split_mode": "synthetic"}, "The split mode 'synthetic' makes images of 8 bits"),
    ):
        with pytest.raises(UsageError, match=reason):
            make_engine(tmp_path).fit(
                make_model(intensity_range=[0, 65535]), datamodule=folder_datamodule(root, **arguments)
            )
    for path in (root / "train/good").iterdir():
        Image.fromarray(np.full((SIDE, SIDE), 9, np.uint16)).save(path)
    with pytest.raises(UsageError, match="intensity_range 'auto' found no range: every value of the training images is 9"):
        train(root, tmp_path, intensity_range="auto")
    Image.new("L", (SIDE, SIDE)).save(path)
    with pytest.raises(ImageError, match=rf"{path.name} holds 8 bits"):
        train(root, tmp_path, intensity_range="auto")


def test_stock_command(cells, plain, tmp_path):
    """`anomalib train` with workers, `auto`, and anomalib's own export of the model."""
    root = copy_cells(cells, tmp_path / "deep", write_16_bits)
    command = [
        Path(sys.executable).parent / "anomalib", "train", "--config", ROOT / "configs" / "elpv.yaml",
        "--data.init_args.root", root, "--data.init_args.num_workers", "1", "--model.init_args.intensity_range", "auto",
        "--model.init_args.image_size", f"[{SIDE},{SIDE}]", "--model.init_args.coreset_sampling_ratio", "0.02",
    ]  # fmt: skip
    result = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (checkpoint,) = tmp_path.glob("results/**/v0/weights/lightning/model.ckpt")
    model = FaissPatchcore.load_from_checkpoint(checkpoint, map_location="cpu")
    assert model.intensity_range == (0, 65535)
    assert torch.equal(model.model.memory_bank, plain[0].model.memory_bank)
    shutil.rmtree(tmp_path / "results")
