"""``patchcore validate`` and ``patchcore info``, and the self-test that a bundle carries."""

import hashlib
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundles import change_manifest, renew_checksums

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import FEATURES, FILES, MANIFEST, WEIGHTS, read_manifest
from patchcore_plugin.cli import main
from patchcore_plugin.operations.validation import validate_bundle
from patchcore_plugin.runtime import self_test


def call(*arguments) -> tuple[int, str]:
    """Run ``patchcore``; returns its exit code, and its output or error."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.stdout or result.stderr


def validated(*arguments) -> tuple[int, dict]:
    code, output = call("validate", *arguments, "--json")
    report = json.loads(output)
    assert report["ok"] == (code == 0)
    return code, {**report, "results": {check["name"]: check["result"] for check in report["checks"]}}


def test_pictures_have_the_same_bytes_everywhere():
    """Should this fail, bundles of before can no longer be validated."""
    pictures = self_test.pictures()
    assert [picture.shape for picture in pictures] == [(240, 320, 3)] * 5
    digest = hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()
    assert digest == "fc4f97b347a8031b828f0c6084fcdfd112f0c4c42c578f6e00f6709ef05253bc"


def test_sound_bundle(bundle, cells):
    code, report = validated(bundle, "--images", cells / "test")
    assert code == 0, report
    assert set(report["results"].values()) == {"ok"}
    assert max(report["deviations"]) <= report["tolerance"]
    assert 0 < report["milliseconds"]["median"] <= report["milliseconds"]["95 % below"]
    expected = PatchcoreRuntime.load(bundle).predict([report["images"][0]["image"]])[0]
    assert (len(report["images"]), report["images"][0]["verdict"]) == (104, expected.verdict)
    assert report["images"][0]["score"] == pytest.approx(expected.score, rel=1e-6)
    code, output = call("validate", bundle)
    assert code == 0
    assert "is fit for use" in output


def test_unreadable_sample(bundle, tmp_path):
    (tmp_path / "cell.png").write_bytes(b"no image")
    code, report = validated(bundle, "--images", tmp_path)
    assert (code, report["results"]["images"]) == (1, "failed")
    assert "cannot be read as an image" in report["images"][0]["error"]


@pytest.mark.parametrize("step", ["network and bank", "images"])
def test_bundle_that_is_replaced_meanwhile(bundle_copy, test_images, step):
    """A report is of one version."""

    def replace(name, done, total):
        if name == step:
            change_manifest(bundle_copy, name="another")

    report = validate_bundle(bundle_copy, test_images[:2], replace)
    assert not report.ok
    assert "was replaced by version" in next(check.detail for check in report.checks if check.name == step)


def test_network_that_computes_something_else(bundle_copy):
    """Files that match their checksums, and fit together, but answer otherwise than when they were written."""
    weights = np.fromfile(bundle_copy / WEIGHTS, np.float32)
    of_backbone = np.where(
        np.abs(weights) < 20, np.abs(weights), 0
    )  # the mean of pixels is checked when the bundle is loaded
    largest = np.argsort(-of_backbone[1:-1])[:2000] + 1
    weights[largest] *= 1.02
    weights.tofile(bundle_copy / WEIGHTS)
    renew_checksums(bundle_copy)
    code, report = validated(bundle_copy)
    assert code == 1
    assert report["results"]["network and bank"] == "ok"
    assert report["results"]["self-test"] == "failed"
    assert max(report["deviations"]) > report["tolerance"]


@pytest.mark.parametrize(
    ("damage", "failed"),
    [
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest"),
        (lambda folder: (folder / FEATURES).write_text("<net>"), "files"),
        (lambda folder: change_manifest(folder, grid=[16, 16]), "network and bank"),
        (lambda folder: change_manifest(folder, self_test={"scores": [1.0]}), "self-test"),
    ],
)
def test_what_failed_is_named_and_the_rest_is_not_tried(bundle_copy, damage, failed):
    damage(bundle_copy)
    code, report = validated(bundle_copy)
    assert (code, report["results"][failed]) == (1, "failed")
    if failed != "self-test":
        names = list(report["results"])
        assert {report["results"][name] for name in names[names.index(failed) + 1 :]} == {"skipped"}
    code, output = call("validate", bundle_copy)
    assert code == 1
    assert "NOT fit for use" in output


def test_bundle_without_a_self_test(bundle_copy):
    content = json.loads((bundle_copy / MANIFEST).read_text())
    for name in ("self_test", "lineage"):
        del content[name]
    (bundle_copy / MANIFEST).write_text(json.dumps({**content, "format_version": 2}))
    code, report = validated(bundle_copy)
    assert (code, report["results"]["self-test"]) == (0, "skipped")
    assert any("older version wrote the bundle" in check["detail"] for check in report["checks"])


def rows(output: str) -> dict[str, str]:
    """Rows of the table that ``info`` prints, by their first cells."""
    return {name.strip(): text.strip() for name, text in re.findall(r"^│ (\S.*?)\s*│(.*)│$", output, re.MULTILINE)}


def test_info(bundle, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    manifest = read_manifest(bundle)
    code, output = call("info", bundle)
    found = rows(output)
    assert code == 0
    assert found["version"].startswith(hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()[:12])
    assert found["backbone"] == "efficientnet_lite0, layers blocks.2, blocks.4, in f32"
    assert found["input"] == "resized to 256 x 256 pixels; 32 x 32 patches"
    assert found["memory bank"].startswith(f"{manifest.bank_size:,} x 152, covering radius {manifest.covering_radius:.4g}")
    assert found["index"].startswith(f"{manifest.index.kind} in {manifest.index.storage}")
    assert found["image score"] == "largest patch distance, re-weighted by 9 neighbors"
    assert found["image threshold"].startswith(f"{manifest.image.threshold:.4g};")
    assert found["calibration"] == "none: no p-values, no drift"
    for name, file in manifest.files.items():
        assert found[name] == f"{FILES[name].content}, {file.bytes / 2**20:.2f} MiB"
    code, output = call("info", bundle / "absent")
    assert code == 1
    assert "no bundle folder" in output


def test_info_shows_the_threshold_of_verdicts(bundle_copy, monkeypatch):
    """Sensitivity included, for images and pixels, as a prediction has them; nothing is made up where there is none."""
    monkeypatch.setenv("COLUMNS", "200")
    scale = read_manifest(bundle_copy).image.model_dump()
    change_manifest(
        bundle_copy,
        name="cells [red]",
        image={**scale, "sensitivity": 0.7},
        pixel={**scale, "minimum": None, "maximum": None},
    )
    found = rows(call("info", bundle_copy)[1])
    assert found["name"] == "cells [red]"
    expected = scale["threshold"] - 0.2 * (scale["maximum"] - scale["minimum"])
    assert found["image threshold"].startswith(f"{expected:.4g}, moved from {scale['threshold']:.4g} by sensitivity 0.7;")
    assert found["pixel threshold"] == f"{scale['threshold']:.4g}"
    change_manifest(bundle_copy, image={})
    assert rows(call("info", bundle_copy)[1])["image threshold"] == "none: the model was never validated"


def test_info_of_a_calibrated_bundle(calibrated):
    found = rows(call("info", calibrated)[1])
    assert found["calibration"] == "20 normal images"
    assert found["promise"] == "Of 100 good parts, 4.76 would be stopped, on average."
