"""``patchcore update``: a bundle that knows new normal images, against a slow reference, and whole or absent."""

import json
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundles import change_manifest, renew_checksums
from helpers.windows import obey_windows
from PIL import Image, ImageEnhance

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import (
    BANK,
    BANKS,
    DEFECTS,
    FEATURES,
    FILES,
    MANIFEST,
    NEIGHBORS,
    ORIGINS,
    SOURCES,
    THUMBNAILS,
    WEIGHTS,
    BundleError,
    read_manifest,
    version_of,
)
from patchcore_plugin.bundle.manifest import FileRule
from patchcore_plugin.cli import main
from patchcore_plugin.export import export_bundle
from patchcore_plugin.memory_bank import write_defects
from patchcore_plugin.operations.update import update_bundle


@pytest.fixture(scope="module")
def bright(cells, tmp_path_factory) -> Path:
    """Normal cells under stronger light."""
    folder = tmp_path_factory.mktemp("line 2")
    for image in sorted((cells / "test/good").iterdir())[:9]:
        ImageEnhance.Brightness(Image.open(image).convert("L")).enhance(1.5).save(folder / image.name)
    return folder


@pytest.fixture(scope="module")
def thumbnailed(trained, tmp_path_factory) -> Path:
    """A bundle with every file that there is, and a graph of int8."""
    path = tmp_path_factory.mktemp("parent") / "bundle"
    return export_bundle(trained.model, path, "cells", index="hnsw", storage="int8", thumbnails=True)


@pytest.mark.parametrize("parent", ["bundle", "thumbnailed"])
def test_successor(parent, bright, tmp_path, request):
    parent = request.getfixturevalue(parent)
    before, content = read_manifest(parent), {file.name: file.read_bytes() for file in parent.iterdir()}
    report = update_bundle(parent, sorted(bright.iterdir()), tmp_path / "new", holdout=4)
    assert {file.name: file.read_bytes() for file in parent.iterdir()} == content, "never in place"
    old, new = PatchcoreRuntime.load(parent), PatchcoreRuntime.load(tmp_path / "new")
    names = sorted(image.name for image in bright.iterdir())
    held_out, added = [names[3], names[7]], [name for place, name in enumerate(names) if place not in (3, 7)]
    assert [Path(name).name for name in report.names] == held_out

    # which vectors: those of the slow reference, from all patches of the images that went in
    embeddings = old.embed([np.asarray(Image.open(bright / name).convert("RGB")) for name in added])
    patches = embeddings.reshape(-1, 152)
    bank = old.bank.vectors.astype(np.float64)
    nearest = np.concatenate([np.sqrt(((part[:, None] - bank) ** 2).sum(2).min(1)) for part in np.array_split(patches, 100)])
    far = np.flatnonzero(nearest > before.covering_radius)
    assert len(far) > 20
    picks, distances, points = [], nearest[far], patches[far].astype(np.float64)
    while distances.max() > before.covering_radius:
        picks.append(int(distances.argmax()))
        distances = np.minimum(distances, np.sqrt(((points - points[picks[-1]]) ** 2).sum(1)))
    size = len(old.bank)
    assert (report.update.images, report.update.vectors, len(new.bank)) == (7, len(picks), size + len(picks))
    step = 0 if before.index.storage == "float32" else np.ptp(new.bank.vectors, axis=0) / 255
    assert (np.abs(new.bank.vectors[:size] - old.bank.vectors) <= step + 1e-6).all()
    assert (np.abs(new.bank.vectors[size:] - patches[far[picks]]) <= step + 1e-6).all()

    # where they come from
    assert new.origins.images[: len(old.origins.images)] == old.origins.images
    for number, (image, row, column) in zip(far[picks], new.origins.patches[size:], strict=True):
        assert new.origins.images[image] == f"{bright.name}/{added[number // 1024]}"
        assert (row, column) == divmod(number % 1024, 32)
    if old.origins.thumbnails is not None:
        last = new.origins.images[-1].split("/")[1]
        pixels = Image.open(bright / last).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(new.origins.thumbnails[-1], pixels)

    # what it says of itself
    after = new.manifest
    (lineage,) = after.lineage
    assert (lineage.parent, lineage.vectors) == (version_of(parent), len(picks))
    assert (after.index.kind, after.index.storage) == (before.index.kind, before.index.storage)
    assert after.index.width >= before.index.width
    assert (after.image, after.pixel, after.covering_radius) == (before.image, before.pixel, before.covering_radius)
    assert after.self_test != before.self_test
    assert (after.name, after.backbone, after.num_neighbors) == (before.name, before.backbone, before.num_neighbors)

    # what it is for
    assert [answer.score for answer in report.after] == [
        answer.score for answer in new.predict([bright / name for name in held_out])
    ]
    assert all(after.score < before.score for before, after in zip(report.before, report.after, strict=True))
    again = update_bundle(tmp_path / "new", sorted(bright.iterdir()), tmp_path / "newer", holdout=4)
    assert again.update.vectors <= 0.05 * len(picks), "the images are covered, but for what int8 rounds away"
    assert [step.parent for step in read_manifest(tmp_path / "newer").lineage] == [
        version_of(parent),
        version_of(tmp_path / "new"),
    ]


def test_command(bundle, bright, cells, tmp_path, monkeypatch):
    obey_windows(monkeypatch)
    new = tmp_path / "new"
    arguments = ["update", str(bundle), str(bright), "--output", str(new), "--test", str(cells / "test")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    for text in ("held-out image", "False alarms among the 1 held-out images", "Image AUROC", "after ("):
        assert text in result.output
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "exists already" in result.output
    assert "overwrite" not in result.output, "update has no such option"
    assert "update" in CliRunner().invoke(main, ["info", str(new)]).output
    assert CliRunner().invoke(main, ["validate", str(new)]).exit_code == 0
    result = CliRunner().invoke(main, ["update", str(bundle), str(bright), "--output", str(bright / "new")])
    assert result.exit_code == 1
    assert f"{bright}, which stays as it is" in " ".join(result.output.split())
    result = CliRunner().invoke(main, [*arguments[:-1], str(bright)])
    assert result.exit_code == 1
    assert "must hold the folder good, and others with defective images" in result.output


def test_files_are_written_anew_or_carried_over(thumbnailed, bright, tmp_path, monkeypatch):
    """Every row of the table of files; the last one stands for those that update has never heard of."""
    monkeypatch.setitem(FILES, "notes.txt", FileRule("notes", required=False))
    parent = Path(shutil.copytree(thumbnailed, tmp_path / "parent"))
    (parent / "notes.txt").write_text("line 2")
    write_defects(PatchcoreRuntime.load(parent).bank.vectors[:3], parent)
    renew_checksums(parent)
    change_manifest(parent, format_version=11)
    update_bundle(parent, sorted(bright.iterdir())[:2], tmp_path / "new")
    before, after = (read_manifest(path).files for path in (parent, tmp_path / "new"))
    single = FILES.keys() - set(chain(*BANKS[1:]))
    assert before.keys() == after.keys() == single
    assert {file.name for file in (tmp_path / "new").iterdir()} == {MANIFEST, *single}
    assert {name for name in single if before[name] != after[name]} == {BANK, NEIGHBORS, ORIGINS, SOURCES, THUMBNAILS}
    assert {FEATURES, WEIGHTS, DEFECTS, "notes.txt"} == {name for name in single if before[name] == after[name]}


def test_each_image_is_decoded_once(thumbnailed, bright, tmp_path, monkeypatch):
    """For the bank, its thumbnail, the index, the calibration and both predictions together."""
    opened, original = Counter(), Image.open

    def count(source, *arguments, **options):
        opened[Path(source)] += 1
        return original(source, *arguments, **options)

    monkeypatch.setattr(Image, "open", count)
    images = sorted(bright.iterdir())[:4]
    update_bundle(thumbnailed, images, tmp_path / "new", holdout=2)
    assert opened == dict.fromkeys(images, 1)


@pytest.mark.parametrize("step", ["embed", "cover", "score", "index", "self-test"])
def test_interrupted_update_leaves_nothing(bundle, bright, tmp_path, step):
    def interrupt(name, done, total):
        if name.startswith(step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_bundle(bundle, sorted(bright.iterdir())[:2], tmp_path / "new", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_refusals(bundle_copy, bright, tmp_path):
    images = sorted(bright.iterdir())
    for few, message in ((images[:1], "at least two"), ([images[0], tmp_path / "absent.png"], "absent")):
        with pytest.raises((ValueError, OSError), match=message):
            update_bundle(bundle_copy, few, tmp_path / "new")
    with pytest.raises(ValueError, match="holdout must be None or a whole number of at least 2, got 1"):
        update_bundle(bundle_copy, images, tmp_path / "new", holdout=1)
    with pytest.raises(BundleError, match="exists already"):
        update_bundle(bundle_copy, images, bundle_copy)
    (tmp_path / "link").symlink_to(bundle_copy)
    for inside in (bundle_copy / "new", tmp_path / "link/deep/new", bundle_copy.parent / "other/../bundle/new"):
        with pytest.raises(BundleError, match=r"lies in .*bundle, which stays as it is"):
            update_bundle(bundle_copy, images, inside)
    assert {file.name for file in bundle_copy.iterdir()} == {MANIFEST, *read_manifest(bundle_copy).files}
    content = json.loads((bundle_copy / MANIFEST).read_text())
    (bundle_copy / MANIFEST).write_text(json.dumps({**content, "covering_radius": None}))
    with pytest.raises(BundleError, match=r"does not record the covering radius .* Train again"):
        update_bundle(bundle_copy, images, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_calibration_is_extended(calibrated, bright, tmp_path):
    """By the held-out images' scores with the new bank; the thresholds follow."""
    report = update_bundle(calibrated, sorted(bright.iterdir()), tmp_path / "new", holdout=2)
    old, new = read_manifest(calibrated), read_manifest(tmp_path / "new")
    assert len(report.after) == 4
    for name, values in {
        "scores": [answer.score for answer in report.after],
        "peaks": [answer.anomaly_map.max() for answer in report.after],
        "means": [answer.anomaly_map.mean() for answer in report.after],
    }.items():
        expected = np.sort([*getattr(old.calibration, name), *values])
        np.testing.assert_allclose(getattr(new.calibration, name), expected, rtol=1e-4)
    rank = int(np.ceil(25 * (1 - old.calibration.false_positive_rate)))
    assert new.image.threshold == new.calibration.scores[rank - 1]
    assert new.pixel.threshold == new.calibration.peaks[rank - 1]
    assert report.after[0].p_value is not None


def test_bundle_without_origins_gets_none(bundle, bright, tmp_path):
    """Those of its own vectors are not known."""
    old = Path(shutil.copytree(bundle, tmp_path / "old"))
    content = json.loads((old / MANIFEST).read_text())
    for name in ("origins.npy", "sources.json"):
        (old / name).unlink()
        del content["files"][name]
    (old / MANIFEST).write_text(json.dumps(content))
    update_bundle(old, sorted(bright.iterdir())[:3], tmp_path / "new")
    assert PatchcoreRuntime.load(tmp_path / "new").origins is None
