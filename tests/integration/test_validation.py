"""``patchcore validate`` and ``patchcore info``, and the self-test that a bundle carries."""

import hashlib
import json

import numpy as np
import pytest
from click.testing import CliRunner

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import FEATURES, MANIFEST, WEIGHTS, describe_files, read_manifest
from patchcore_plugin.cli import main
from patchcore_plugin.runtime import self_test


def call(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.stdout + result.stderr


def validated(*arguments) -> tuple[int, dict]:
    code, output = call("validate", *arguments, "--json")
    report = json.loads(output)
    assert report["ok"] == (code == 0)
    return code, {**report, "results": {check["name"]: check["result"] for check in report["checks"]}}


def change_manifest(folder, **changes):
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, **changes}))


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


def test_network_that_computes_something_else(bundle_copy):
    """Files that match their checksums, and fit together, but answer otherwise than when they were written."""
    weights = np.fromfile(bundle_copy / WEIGHTS, np.float32)
    largest = np.argsort(-np.abs(weights[1:-1]))[:2000] + 1
    weights[largest] *= 1.02
    weights.tofile(bundle_copy / WEIGHTS)
    change_manifest(bundle_copy, files={name: file.model_dump() for name, file in describe_files(bundle_copy).items()})
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


def test_info(bundle):
    code, output = call("info", bundle)
    manifest = read_manifest(bundle)
    assert code == 0
    for text in (
        "efficientnet_lite0",
        f"{manifest.bank_size:,} x 152",
        manifest.index.kind,
        f"{manifest.image.threshold:.4g}",
        "largest patch distance, re-weighted by 9 neighbors",
        "none: no p-values, no drift",
    ):
        assert text in output
    assert hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()[:12] in output
    code, output = call("info", bundle / "absent")
    assert code == 1
    assert "no bundle folder" in output


def test_info_of_a_calibrated_bundle(calibrated):
    assert "20 normal images, for 5.00% of false alarms at most" in call("info", calibrated)[1]
