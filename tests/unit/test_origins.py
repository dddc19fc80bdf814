"""Where bank vectors come from: numbers to patches, and files that may be damaged or hostile."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.bundles import renew_checksums
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from patchcore_plugin.bundle import (
    ORIGINS,
    SOURCES,
    THUMBNAILS,
    BundleError,
    Preprocessing,
    read_bundle,
    read_manifest,
)
from patchcore_plugin.bundle.origins import Origins, locate_patches, make_thumbnails, read_origins
from patchcore_plugin.runtime import PatchcoreRuntime

GRID = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(grids=st.lists(GRID, min_size=1, max_size=6), data=st.data())
def test_numbers_of_rows_to_patches(grids, data):
    """Images may have grids of different sizes, where a data set has images of different sizes."""
    images = [(f"/data/{number}.png", *grid) for number, grid in enumerate(grids)]
    every = [(path, row, column) for path, rows, columns in images for row in range(rows) for column in range(columns)]
    numbers = data.draw(st.lists(st.integers(0, len(every) - 1), min_size=1, max_size=20, unique=True))
    found = locate_patches(np.array(numbers), images)
    assert [(found.images[image], row, column) for image, row, column in found.patches] == [every[n] for n in numbers]
    assert sorted(set(found.patches[:, 0])) == list(range(len(found.images)))
    others = locate_patches(np.array(numbers[::-1]), images[::-1])
    both = Origins.of_members([found, others])
    assert sorted(both.images) == sorted({*found.images, *others.images}), "each image is named once"
    places = [(both.images[image], row, column) for image, row, column in both.patches]
    assert places[: len(numbers)] == [every[n] for n in numbers]
    assert places[len(numbers) :] == [(others.images[image], row, column) for image, row, column in others.patches]
    assert Origins.of_members([found]) is found
    assert Origins.of_members([found, None]) is None


def test_bundle_keeps_folder_and_file_name_only(bundle):
    manifest = read_manifest(bundle)
    found = read_origins(read_bundle(bundle))
    assert all(name.startswith("good/") and len(Path(name).parts) == 2 for name in found.images)
    assert found.patches.shape == (manifest.bank_size, 3)
    assert found.thumbnails is None


def test_names_that_are_no_text(bundle_copy):
    """Those that a training or a stranger left in a bundle: an answer in JSON can hold what is read."""
    file = bundle_copy / SOURCES
    names = json.loads(file.read_text())
    file.write_text(json.dumps(["good/caf\udce9.png", *names[1:]]))
    renew_checksums(bundle_copy)
    found = read_origins(read_bundle(bundle_copy))
    assert found.images[0] == r"good/caf\udce9.png"
    Origins(found.patches, ["/data/good/caf\udce9.png", *names[1:]]).write(bundle_copy)
    assert json.loads(file.read_text())[0] == r"good/caf\udce9.png"


@pytest.mark.parametrize("full", [ORIGINS, SOURCES, THUMBNAILS])
def test_full_disk_is_told_with_the_file(tmp_path, full):
    (tmp_path / full).symlink_to("/dev/full")
    origins = Origins(np.zeros((2000, 3), np.int32), ["good/a.png"], np.zeros((1, 64, 64, 3), np.uint8))
    with pytest.raises(OSError, match=r"cannot be written|No space left on device") as raised:
        origins.write(tmp_path)
    assert full in str(raised.value)


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda sound: sound.astype(np.int64), "holds int64 values"),
        (lambda sound: sound[:-1], "image, row and column of each bank vector"),
        (lambda sound: sound[:, :2], "image, row and column of each bank vector"),
        (lambda sound: sound - np.int32([0, 0, 99]), "out of range"),
        (lambda sound: sound + np.int32([10_000, 0, 0]), "out of range"),
        (lambda sound: sound + np.int32([0, 32, 0]), "out of range"),
        (lambda sound: np.array([Harm()] * len(sound), object), "is damaged"),
    ],
)
def test_hostile_origins(bundle_copy, content, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(bundle_copy / ORIGINS, content(np.load(bundle_copy / ORIGINS)), allow_pickle=True)
    renew_checksums(bundle_copy)
    with pytest.raises(BundleError, match=reason) as caught:
        PatchcoreRuntime.load(bundle_copy)
    assert ORIGINS in str(caught.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"{}", b"[1]", b'[""]', b'["' + b"x" * 2000 + b'"]', b"[]"])
def test_hostile_names(bundle_copy, content):
    (bundle_copy / SOURCES).write_bytes(content)
    renew_checksums(bundle_copy)
    with pytest.raises(BundleError, match=r"sources\.json|origins\.npy names an image"):
        PatchcoreRuntime.load(bundle_copy)


def test_truncated_and_unfitting_thumbnails(bundle_copy):
    count = len(json.loads((bundle_copy / SOURCES).read_text()))
    np.save(bundle_copy / THUMBNAILS, np.zeros((count, 256, 256, 3), np.uint8))
    renew_checksums(bundle_copy)
    assert PatchcoreRuntime.load(bundle_copy).origins.thumbnails.shape == (count, 256, 256, 3)
    (bundle_copy / THUMBNAILS).write_bytes((bundle_copy / THUMBNAILS).read_bytes()[:-1])
    renew_checksums(bundle_copy)
    with pytest.raises(BundleError, match=r"thumbnails\.npy is damaged"):
        PatchcoreRuntime.load(bundle_copy)
    np.save(bundle_copy / THUMBNAILS, np.zeros((count, 255, 256, 3), np.uint8))
    renew_checksums(bundle_copy)
    with pytest.raises(BundleError, match=r"thumbnails\.npy holds uint8 values of shape \(\d+, 255"):
        PatchcoreRuntime.load(bundle_copy)


def test_files_come_together(bundle_copy):
    (bundle_copy / SOURCES).unlink()
    renew_checksums(bundle_copy)
    with pytest.raises(BundleError, match=r"origins\.npy needs sources\.json"):
        PatchcoreRuntime.load(bundle_copy)


def test_bundle_without_origins(bundle_copy, test_images):
    (bundle_copy / SOURCES).unlink()
    (bundle_copy / ORIGINS).unlink()
    renew_checksums(bundle_copy)
    runtime = PatchcoreRuntime.load(bundle_copy)
    assert runtime.origins is None
    assert runtime.predict(test_images[:1])[0].score > 0


def test_thumbnails_are_what_the_network_sees(tmp_path):
    """Resized, cropped, and then no larger than 256 pixels on a side."""
    pixels = np.zeros((300, 600, 3), np.uint8)
    pixels[100:200, 200:400] = 255
    Image.fromarray(pixels).save(tmp_path / "part.png")
    statistics = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    recipe = Preprocessing(resize=(300, 600), crop=(100, 200), **statistics)
    (picture,) = make_thumbnails([tmp_path / "part.png"], recipe)
    assert picture.shape == (100, 200, 3)
    assert picture.min() == 255
    (picture,) = make_thumbnails([tmp_path / "part.png"], Preprocessing(resize=(512, 1024), **statistics))
    assert picture.shape == (128, 256, 3)
    with pytest.raises(BundleError, match=r"no thumbnail without the image: .*absent\.png is missing"):
        make_thumbnails([tmp_path / "part.png", tmp_path / "absent.png"], recipe)


def test_origins_are_written_as_they_are_read(bundle_copy):
    before = read_origins(read_bundle(bundle_copy))
    Origins(before.patches, [f"/home/someone/secret/{name}" for name in before.images]).write(bundle_copy)
    renew_checksums(bundle_copy)
    after = read_origins(read_bundle(bundle_copy))
    assert after.images == before.images
    np.testing.assert_array_equal(after.patches, before.patches)
