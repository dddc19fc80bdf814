"""Bundles that earlier versions wrote give the scores of those versions, in Python and over HTTP; without torch."""

import shutil
from pathlib import Path

import pytest
from helpers.old_files import EXPECTED, IMAGES, OLD, assert_bundle_scores
from helpers.server import SERVE, bentoml_serve

from patchcore_plugin import PatchcoreRuntime


@pytest.mark.parametrize(
    ("name", "format_version", "kind", "width"),
    [("bundle-format-2", 2, "flat", 0), ("bundle-bfloat16", 3, "bfloat16", 2), ("bundle-hnsw", 3, "hnsw", None)],
)
def test_bundle(name, format_version, kind, width, tmp_path):
    bundle = Path(shutil.copytree(OLD / name, tmp_path / name))
    manifest = PatchcoreRuntime(bundle, cache=False).manifest
    assert (manifest.format_version, manifest.index.kind) == (format_version, kind)
    assert width is None or manifest.index.width == width
    assert_bundle_scores(bundle, name)


def test_bundles_are_served(tmp_path):
    names = ("bundle-format-2", "bundle-hnsw")
    for name in names:
        shutil.copytree(OLD / name, tmp_path / "bundles" / name)
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLES=str(tmp_path / "bundles"), PATCHCORE_BUNDLE="") as server:
        for name in names:
            scores = [
                server.client.post("/predict", files={"image": path.read_bytes()}, data={"model": name}).json()["score"]
                for path in IMAGES
            ]
            assert scores == pytest.approx(EXPECTED[name]["raw"], rel=1e-4)
