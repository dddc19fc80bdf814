"""Bundles: whole or absent when written, refused with a reason when damaged."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.bundles import change_manifest, renew_checksums
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchcore_plugin.bundle import (
    BANK,
    FEATURES,
    MANIFEST,
    NEIGHBORS,
    ORIGINS,
    SOURCES,
    WEIGHTS,
    BundleError,
    Manifest,
    Scale,
    atomic_folder,
    copy_files,
    describe_files,
    read_manifest,
    verify,
    version_of,
    write_manifest,
)
from patchcore_plugin.export import export_bundle
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.runtime import PatchcoreRuntime
from patchcore_plugin.scoring.thresholds import normalize

FILES = [FEATURES, WEIGHTS, BANK, NEIGHBORS, ORIGINS, SOURCES]


def test_manifest_of_an_export(bundle, fitted):
    manifest = read_manifest(bundle)
    assert manifest.name == "cells"
    assert manifest.backbone == "efficientnet_lite0"
    assert manifest.layers == ["blocks.2", "blocks.4"]
    assert manifest.preprocessing.resize == (256, 256)
    assert manifest.preprocessing.crop is None
    assert manifest.grid == (32, 32)
    assert manifest.embedding_dimension == 152
    assert manifest.bank_size == len(fitted.model.memory_bank)
    assert manifest.image.threshold == float(fitted.post_processor.image_threshold)
    assert manifest.image.minimum == float(fitted.post_processor.image_min)
    assert manifest.pixel.maximum == float(fitted.post_processor.pixel_max)
    assert {"anomalib", "torch", "openvino", "faiss-cpu", "patchcore-plugin"} <= set(manifest.versions)
    assert set(manifest.files) == set(FILES)
    assert {file.name for file in bundle.iterdir()} == {MANIFEST, *FILES}
    verify(bundle, manifest)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, its manifest says"),
        (lambda path: path.write_bytes(b""), "0 bytes, its manifest says"),
        (
            lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
            "does not match its checksum",
        ),
    ],
    ids=["missing", "truncated", "empty", "flipped"],
)
def test_damaged_files(bundle_copy, name, damage, reason):
    damage(bundle_copy / name)
    with pytest.raises(BundleError, match=reason) as caught:
        PatchcoreRuntime.load(bundle_copy)
    assert name in str(caught.value)


def test_file_of_another_model(bundle_copy):
    """A bank that is sound in itself, but not the one that the manifest describes."""
    MemoryBank(np.ones((30, 5)), num_neighbors=9).save(bundle_copy / BANK)
    with pytest.raises(BundleError, match="its manifest says"):
        PatchcoreRuntime.load(bundle_copy)
    renew_checksums(bundle_copy)
    with pytest.raises(BundleError, match=r"vectors of shape \(30, 5\), the manifest says \(\d+, 152\)"):
        PatchcoreRuntime.load(bundle_copy)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"width": 17}, r"manifest\.json: width must be a whole number in \[1, 16\], got 17\. The index is 'bfloat16'"),
        ({"kind": "ivf", "width": 128}, r"bank\.faiss is a flat index of float32, not one of the kind 'ivf'"),
        ({"storage": "int8"}, r"bank\.faiss holds vectors in float32, the manifest says int8"),
    ],
)
def test_index_of_another_kind(bundle_copy, index, message):
    change_manifest(bundle_copy, index={"kind": "flat", "storage": "float32", **index})
    with pytest.raises(BundleError, match=message):
        PatchcoreRuntime.load(bundle_copy)


def test_flat_index_with_a_width_is_read_as_bfloat16(bundle_copy):
    """Earlier versions named the bfloat16 search so, for the bank and for each trial."""
    trial = {"storage": "float32", "milliseconds": 1, "recall": 1, "error": 0, "good": True}
    trials = [{"index": "flat", "width": 0, **trial}, {"index": "flat", "width": 3, **trial}]
    change_manifest(bundle_copy, index={"kind": "flat", "storage": "float32", "width": 3, "trials": trials})
    runtime = PatchcoreRuntime.load(bundle_copy)
    assert (runtime.manifest.index.kind, runtime.bank.index, runtime.bank.width) == ("bfloat16", "bfloat16", 3)
    assert [trial.index for trial in runtime.manifest.index.trials] == ["flat", "bfloat16"]


def test_index_of_a_later_format(bundle_copy):
    trial = {"index": "reduced", "width": 16, "storage": "float32", "milliseconds": 1, "recall": 1, "error": 0, "good": True}
    change_manifest(bundle_copy, index={"kind": "flat", "storage": "float32", "trials": [trial]})
    with pytest.raises(BundleError, match="format_version 3 has no index 'reduced'"):
        PatchcoreRuntime.load(bundle_copy)
    change_manifest(bundle_copy, format_version=12)
    assert PatchcoreRuntime.load(bundle_copy).manifest.index.trials[0].index == "reduced"


def test_network_of_another_model(bundle_copy):
    change_manifest(bundle_copy, grid=[16, 16])
    with pytest.raises(BundleError, match=r"features\.xml gives embeddings .*the manifest says \(16, 16, 152\)"):
        PatchcoreRuntime.load(bundle_copy)


def test_network_that_is_not_openvinos(bundle_copy):
    (bundle_copy / FEATURES).write_text("<net>")
    renew_checksums(bundle_copy)
    with pytest.raises(BundleError, match=r"features\.xml cannot be compiled by OpenVINO"):
        PatchcoreRuntime.load(bundle_copy)


def test_absent(tmp_path):
    with pytest.raises(BundleError, match="no bundle folder"):
        PatchcoreRuntime.load(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"is not a bundle: manifest\.json is missing"):
        PatchcoreRuntime.load(tmp_path)


def test_bundle_of_format_2(bundle_copy):
    content = json.loads((bundle_copy / MANIFEST).read_text())
    del content["score_smoothing"]
    (bundle_copy / MANIFEST).write_text(json.dumps({**content, "format_version": 2}))
    manifest = read_manifest(bundle_copy)
    assert (manifest.format_version, manifest.score_smoothing) == (2, 0)


def test_intensity_range(bundle_copy):
    """Bundles with a range are of format 4, which earlier versions refuse; others stay as those versions read them."""
    content = json.loads((bundle_copy / MANIFEST).read_text())
    assert (content["format_version"], "intensity_range" in content["preprocessing"]) == (3, False)
    ranged = {**content["preprocessing"], "intensity_range": [0, 4095]}
    change_manifest(bundle_copy, format_version=4, preprocessing=ranged)
    manifest = read_manifest(bundle_copy)
    assert manifest.preprocessing.intensity_range == (0, 4095)
    assert json.loads(manifest.model_dump_json())["preprocessing"] == ranged
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    runtime = PatchcoreRuntime.load(bundle_copy)
    deep, plain = (np.random.default_rng(0).integers(0, 256, (40, 50)).astype(dtype) for dtype in (np.uint16, np.uint8))
    change_manifest(bundle_copy, format_version=3, preprocessing=content["preprocessing"])
    expected = PatchcoreRuntime.load(bundle_copy).predict([plain])[0]
    assert runtime.predict([deep * (4095 / 255)])[0].score == expected.score
    change_manifest(bundle_copy, format_version=3, preprocessing=ranged)
    with pytest.raises(BundleError, match="format_version 3 has no intensity_range"):
        read_manifest(bundle_copy)


@pytest.mark.parametrize("wrong", [[1, 1], [2, 1], [0, 1e999], [-1.7e308, 1.7e308], [0], "auto"])
def test_wrong_intensity_range(bundle_copy, wrong):
    content = json.loads((bundle_copy / MANIFEST).read_text())
    change_manifest(bundle_copy, format_version=4, preprocessing={**content["preprocessing"], "intensity_range": wrong})
    with pytest.raises(BundleError, match="intensity_range"):
        read_manifest(bundle_copy)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resize": [16384, 16384]}, "has an input of 256 x 256 pixels, the manifest says 16384 x 16384"),
        ({"resize": [16384, 16384], "crop": [256, 256]}, "otherwise than the manifest says"),
        ({"resize": [258, 256], "crop": [256, 256]}, "otherwise than the manifest says"),
        ({"mean": [0.4, 0.5, 0.5]}, "otherwise than the manifest says"),
        ({"std": [0.5, 0.2, 0.2]}, "otherwise than the manifest says"),
    ],
    ids=str,
)
def test_pre_processing_that_the_network_does_not_have(bundle_copy, change, reason):
    """Also where the network itself is in the cache."""
    PatchcoreRuntime.load(bundle_copy)
    content = json.loads((bundle_copy / MANIFEST).read_text())
    change_manifest(bundle_copy, preprocessing={**content["preprocessing"], **change})
    with pytest.raises(BundleError, match=rf"features\.xml .*{reason}"):
        PatchcoreRuntime.load(bundle_copy)


@pytest.mark.parametrize("version", [0, 1, 13, "2.0", None, [2]])
def test_other_format_version(bundle_copy, version):
    change_manifest(bundle_copy, format_version=version)
    with pytest.raises(BundleError, match="this patchcore-plugin reads formats 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"):
        PatchcoreRuntime.load(bundle_copy)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_manifest_that_is_not_json(bundle_copy, content):
    (bundle_copy / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        PatchcoreRuntime.load(bundle_copy)


def test_huge_manifest(bundle_copy):
    (bundle_copy / MANIFEST).write_bytes(b" " * (2 << 20))
    with pytest.raises(BundleError, match="larger than 1048576 bytes"):
        PatchcoreRuntime.load(bundle_copy)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_neighbors": 0}, "num_neighbors"),
        ({"num_neighbors": "many"}, "num_neighbors"),
        ({"num_neighbors": 1001}, "num_neighbors: Input should be less than or equal to 1000"),
        ({"score_smoothing": 1e6}, "score_smoothing: Input should be less than or equal to 1000"),
        ({"covering_radius": 1e300}, "covering_radius: Input should be less than or equal to 1"),
        ({"image": {"threshold": 1.7e308}}, "image.threshold"),
        ({"image": {"minimum": -1.7e308, "maximum": 1.7e308}}, "image.minimum"),
        ({"pixel": {"minimum": 2, "maximum": 1}}, "pixel: Value error, minimum 2 is above maximum 1"),
        ({"bank_size": 10**400}, "bank_size: Input should be less than"),
        ({"name": "cells\x1b[2J"}, "name: Value error, must have printable characters alone"),
        ({"backbone": "x" * 1001}, "backbone: String should have at most 1000 characters"),
        ({"x\x1b" * 100_000: 1}, r"not valid: '[^']{,40}': Extra inputs are not permitted$"),
        ({"format_version": [2] * 100_000}, r"has bundle format \[2, 2, .{,30}\]; this"),
        ({"grid": [32]}, "grid"),
        ({"image": {"threshold": "high"}}, "image.threshold"),
        ({"image": {"sensitivity": 7}}, "image.sensitivity"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "files"),
        ({"files": {}}, "files lists"),
        ({"self_test": {"scores": []}}, "self_test.scores"),
        ({"lineage": [{"parent": "../x", "date": "2026-01-01", "images": 1, "vectors": 1}]}, r"lineage\.0\.parent"),
        (
            {"preprocessing": {"resize": [64, 64], "crop": [65, 64], "mean": [0, 0, 0], "std": [1, 1, 1]}},
            "crop .* is larger",
        ),
    ],
)
def test_wrong_fields_are_named(bundle_copy, changes, field):
    change_manifest(bundle_copy, **changes)
    with pytest.raises(BundleError, match=field):
        PatchcoreRuntime.load(bundle_copy)


def test_infinite_threshold(bundle_copy):
    text = (bundle_copy / MANIFEST).read_text()
    (bundle_copy / MANIFEST).write_text(text.replace('"threshold": ', '"threshold": Infinity, "was": ', 1))
    with pytest.raises(BundleError, match=r"image\.threshold"):
        PatchcoreRuntime.load(bundle_copy)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_manifest_is_a_bundle_error_or_harmless(bundle, data):
    content = bytearray((bundle / MANIFEST).read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    copy = bundle.with_name("fuzzed")
    copy.mkdir(exist_ok=True)
    (copy / MANIFEST).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(BundleError):
        read_manifest(copy)


def test_atomic_folder(tmp_path):
    target = tmp_path / "deep" / "bundle"
    with atomic_folder(target) as draft:
        (draft / MANIFEST).write_text("first")
        assert not target.exists()
    assert (target / MANIFEST).read_text() == "first"
    with pytest.raises(BundleError, match="exists already"), atomic_folder(target):
        pytest.fail("the folder must not be given")
    with atomic_folder(target, overwrite=True) as draft:
        (draft / MANIFEST).write_text("second")
        assert (target / MANIFEST).read_text() == "first"
    assert (target / MANIFEST).read_text() == "second"
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_failed_write_leaves_nothing_and_keeps_the_old(tmp_path):
    target = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt), atomic_folder(target):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with atomic_folder(target) as draft:
        (draft / MANIFEST).write_text("old")

    def fail():
        with atomic_folder(target, overwrite=True) as draft:
            (draft / MANIFEST).write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (target / MANIFEST).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_never_overwrites_what_is_not_a_bundle(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"dear")
    with (
        pytest.raises(BundleError, match="it is not overwritten"),
        atomic_folder(tmp_path / "photos", overwrite=True),
    ):
        pytest.fail("the folder must not be given")
    assert (tmp_path / "photos" / "holiday.jpg").read_bytes() == b"dear"


def test_read_only_bundle(bundle_copy, test_images):
    for file in bundle_copy.iterdir():
        file.chmod(0o444)
    bundle_copy.chmod(0o555)
    try:
        assert PatchcoreRuntime.load(bundle_copy).predict(test_images[:1])[0].verdict in {"normal", "anomalous"}
    finally:
        bundle_copy.chmod(0o755)


def test_bundle_is_one_folder_to_copy(bundle, tmp_path, test_images):
    copy = shutil.copytree(bundle, tmp_path / "Förderband 3")
    one, other = (PatchcoreRuntime.load(path).predict(test_images[:2]) for path in (bundle, copy))
    assert [answer.score for answer in one] == [answer.score for answer in other]


def test_bank_too_large_for_neighbors(bundle, tmp_path, test_images):
    """A bundle without the file of neighbors, as a huge flat bank writes it, finds them when it needs them."""
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / NEIGHBORS).unlink()
    renew_checksums(copy)
    assert NEIGHBORS not in read_manifest(copy).files
    (copy / NEIGHBORS).write_bytes(b"of which the manifest says nothing")
    one, other = (PatchcoreRuntime.load(path).predict(test_images[:2]) for path in (bundle, copy))
    assert [answer.score for answer in other] == pytest.approx([answer.score for answer in one], rel=1e-6)


def test_paths_may_be_strings(bundle, tmp_path):
    manifest = read_manifest(str(bundle))
    verify(str(bundle), manifest)
    with atomic_folder(str(tmp_path / "copy")) as draft:
        copy_files(str(bundle), manifest, str(draft))
        write_manifest(str(draft), manifest.model_copy(update={"files": describe_files(str(draft))}))
    assert read_manifest(tmp_path / "copy") == manifest
    assert version_of(str(tmp_path / "copy")) == version_of(bundle)


def test_copy_files(bundle, tmp_path):
    """A copy has every file that the manifest lists, byte for byte."""
    copy_files(str(bundle), read_manifest(bundle), str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == set(FILES)
    assert all((tmp_path / name).read_bytes() == (bundle / name).read_bytes() for name in FILES)


def fill(target, text, **arguments):
    with atomic_folder(target, **arguments) as draft:
        (draft / MANIFEST).write_text(text)


@pytest.mark.parametrize("failing", ["first", "second"])
def test_failed_move_keeps_the_old(tmp_path, monkeypatch, failing):
    """A file in use makes a rename fail on Windows, the first or the second of the two."""
    target = tmp_path / "bundle"
    fill(target, "old")
    rename, calls = Path.rename, []

    def sometimes(self, other):
        calls.append(self.suffix)
        if len(calls) == {"first": 1, "second": 2}[failing]:
            raise PermissionError("in use")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", sometimes)
    with pytest.raises(BundleError, match=r"cannot be moved to .*bundle: in use"):
        fill(target, "new", overwrite=True)
    assert (target / MANIFEST).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_overwriting_through_a_link_keeps_the_link(tmp_path):
    fill(tmp_path / "v1", "old")
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    fill(tmp_path / "current", "new", overwrite=True)
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "v1" / MANIFEST).read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]


def test_folder_with_more_than_a_bundle_is_not_overwritten(tmp_path):
    fill(tmp_path / "app", "a web app's manifest")
    (tmp_path / "app" / "index.html").write_text("precious")
    with pytest.raises(BundleError, match="it is not overwritten"):
        fill(tmp_path / "app", "new", overwrite=True)
    assert (tmp_path / "app" / "index.html").read_text() == "precious"


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        fill(tmp_path / "file" / "bundle", "new")


def test_manifest_that_is_a_folder(bundle_copy):
    (bundle_copy / MANIFEST).unlink()
    (bundle_copy / MANIFEST).mkdir()
    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        read_manifest(bundle_copy)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": [2.0, 1.0]}, "calibration.scores: Value error, must be in ascending order"),
        ({"peaks": [1.0]}, "2 scores, 1 peaks and 2 means are not of the same images"),
        ({"scores": [], "peaks": [], "means": []}, "calibration.scores: List should have at least 1 item"),
        ({"false_positive_rate": 0}, "calibration.false_positive_rate: Input should be greater than 0"),
        ({"means": [1.0, float("nan")]}, "calibration.means.1: Input should be a finite number"),
    ],
)
def test_calibration_that_cannot_be(bundle_copy, change, reason):
    values = [1.0, 2.0]
    sound = {"false_positive_rate": 0.5, "scores": values, "peaks": values, "means": values}
    change_manifest(bundle_copy, calibration=sound)
    assert read_manifest(bundle_copy).calibration.means == values
    change_manifest(bundle_copy, calibration={**sound, **change})
    with pytest.raises(BundleError, match=reason):
        read_manifest(bundle_copy)


def test_review_band(bundle_copy):
    """Bundles with a review band are of format 8; a band that cannot be is refused."""
    values = [1.0, 2.0, 3.0]
    calibration = {"false_positive_rate": 0.25, "scores": values, "peaks": values, "means": values, "review_rate": 0.5}
    image = {"threshold": 3.0, "minimum": 1.0, "maximum": 5.0, "sensitivity": 0.5, "review": 0.0}
    change_manifest(bundle_copy, image=image)
    with pytest.raises(BundleError, match="format_version 3 has no review"):
        read_manifest(bundle_copy)
    change_manifest(bundle_copy, format_version=8, calibration=calibration)
    manifest = read_manifest(bundle_copy)
    assert json.loads(manifest.model_dump_json())["image"] == image
    assert manifest.calibration.format_version == 8
    for wrong, reason in {3.5: "review 3.5 is above threshold 3", float("inf"): "finite", "x": "valid number"}.items():
        change_manifest(bundle_copy, image={**image, "review": wrong})
        with pytest.raises(BundleError, match=reason):
            read_manifest(bundle_copy)
    change_manifest(bundle_copy, image=image, calibration={**calibration, "review_rate": 0.25})
    with pytest.raises(BundleError, match=r"review_rate 0\.25 is not above false_positive_rate 0\.25"):
        read_manifest(bundle_copy)


def test_largest_calibration_fits(bundle_copy):
    values, sessions = [100 / 3 + number / 7e5 for number in range(10_000)], [number % 1000 for number in range(10_000)]
    calibration = {"false_positive_rate": 0.5, "scores": values, "peaks": values, "means": values,
                   "sessions": {"scores": sessions, "peaks": sessions}}  # fmt: skip
    content = {**json.loads((bundle_copy / MANIFEST).read_text()), "format_version": 5, "calibration": calibration}
    (bundle_copy / MANIFEST).write_text(Manifest.model_validate(content).model_dump_json(indent=2))
    assert read_manifest(bundle_copy).calibration.scores == values


def test_sessions_of_a_calibration(bundle_copy):
    """Bundles with sessions are of format 5, which earlier versions refuse; others stay as those versions read them."""
    values = [1.0, 2.0, 3.0]
    plain = {"false_positive_rate": 0.5, "scores": values, "peaks": values, "means": values}
    change_manifest(bundle_copy, calibration=plain)
    manifest = read_manifest(bundle_copy)
    assert json.loads(manifest.model_dump_json())["calibration"] == plain
    assert manifest.calibration.format_version == 3
    sessions = {"scores": [0, 1, 1], "peaks": [1, 0, 1]}
    change_manifest(bundle_copy, calibration={**plain, "sessions": sessions})
    with pytest.raises(BundleError, match="format_version 3 has no sessions"):
        read_manifest(bundle_copy)
    change_manifest(bundle_copy, format_version=5)
    manifest = read_manifest(bundle_copy)
    assert manifest.calibration.sessions.peaks == [1, 0, 1]
    assert manifest.calibration.format_version == 5
    assert json.loads(manifest.model_dump_json())["calibration"]["sessions"] == sessions
    wrong = ({"scores": [0, 1, 1], "peaks": [0, 0, 1]}, {"scores": [0, 2, 2], "peaks": [2, 0, 2]},
             {"scores": [0, 1], "peaks": [1, 0]}, {"scores": [], "peaks": []})  # fmt: skip
    for one in wrong:
        change_manifest(bundle_copy, calibration={**plain, "sessions": one})
        with pytest.raises(BundleError, match="sessions do not fit"):
            read_manifest(bundle_copy)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_file_that_would_never_end(bundle_copy, name, kind):
    (bundle_copy / name).unlink()
    if kind == "pipe":
        os.mkfifo(bundle_copy / name)
    else:
        (bundle_copy / name).symlink_to("/dev/zero")
    for read in (PatchcoreRuntime.load, read_manifest if name == MANIFEST else describe_files):
        with pytest.raises(BundleError, match=rf"{name} is damaged: it is not a regular file"):
            read(bundle_copy)


def test_tiny_range_of_normalization():
    """The length of a range may be 0 in float32 though it is not in float64."""
    scale = Scale(threshold=0, minimum=0, maximum=1e-300)
    assert normalize(np.float32([-1, 0, 1]), scale).tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("name", ["", "x" * 201, "cells\x1b[2J", "cells\udcff"])
def test_name_that_no_manifest_takes(fitted, tmp_path, name):
    with pytest.raises(BundleError, match="The name of a model has 1 to 200 printable characters"):
        export_bundle(fitted, tmp_path / "x" / (name or "\n"), name)
    assert list(tmp_path.iterdir()) == []


def test_network_that_is_another_format(bundle_copy):
    """OpenVINO reads ONNX too, which names further files to open."""
    (bundle_copy / FEATURES).write_bytes(b"\x08\x08:\x00")
    renew_checksums(bundle_copy)
    with pytest.raises(BundleError, match=r"features\.xml cannot be compiled by OpenVINO: the file is no XML"):
        PatchcoreRuntime.load(bundle_copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('offset="0"', f'offset="{2**62}"', 1),
        lambda text: text.replace("<layers>", "<layers>" + "<layer>" * 10_000, 1),
        lambda text: text.replace('type="Const"', 'type="Surprise"', 1),
        lambda text: text[: len(text) // 2],
        lambda text: '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + text.replace('name="images"', 'name="&b;"'),
    ],
)
def test_damaged_network(bundle_copy, change):
    """Whatever OpenVINO makes of a network file, it is an error of the bundle, or does no harm."""
    text = (bundle_copy / FEATURES).read_text()
    (bundle_copy / FEATURES).write_text(change(text))
    renew_checksums(bundle_copy)
    with contextlib.suppress(BundleError):
        PatchcoreRuntime.load(bundle_copy, cache=False)


def test_bundle_that_is_replaced_while_it_is_copied(bundle, bundle_copy, tmp_path):
    manifest = read_manifest(bundle)
    weights = bytearray((bundle_copy / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (bundle_copy / WEIGHTS).write_bytes(weights)
    (tmp_path / "target").mkdir()
    with pytest.raises(BundleError, match=r"features\.bin does not match its checksum"):
        copy_files(bundle_copy, manifest, tmp_path / "target")
