"""The network in other precisions, and the measured choice among them."""

import numpy as np
import pytest
from helpers.windows import obey_windows

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.bundle import BundleError
from patchcore_plugin.cpu import has_bfloat16
from patchcore_plugin.export import export_bundle
from patchcore_plugin.export.precision import LARGEST_MEAN_ERROR, LEAST_RANK_CORRELATION, check_precision
from patchcore_plugin.images import read_image

nncf = pytest.importorskip("nncf", reason="the extra quantize is not installed")


def test_auto(trained, runtime, test_images, tmp_path):
    """The one taken is the fastest whose scores are near f32's; what was measured is on record."""
    bundle = PatchcoreRuntime.load(export_bundle(trained.model, tmp_path / "bundle", precision="auto"))
    trials = {trial.precision: trial for trial in bundle.manifest.precision_trials}
    assert set(trials) == {"f32", "int8"} | ({"bf16"} if has_bfloat16() else set())
    assert (trials["f32"].correlation, trials["f32"].error) == (1, 0)
    for trial in trials.values():
        assert trial.good == (trial.correlation >= LEAST_RANK_CORRELATION and trial.error <= LARGEST_MEAN_ERROR)
    taken = trials[bundle.manifest.precision]
    assert taken.good
    assert taken.milliseconds == min(trial.milliseconds for trial in trials.values() if trial.good)
    expected = np.array([answer.score for answer in runtime.predict(test_images[:10])])
    scores = np.array([answer.score for answer in bundle.predict(test_images[:10])])
    assert np.mean(np.abs(scores - expected) / expected) < 2 * LARGEST_MEAN_ERROR


def test_bfloat16(trained, runtime, test_images, tmp_path):
    """The resize keeps its digits: only the backbone is computed in bfloat16, where the CPU has it."""
    bundle = PatchcoreRuntime.load(export_bundle(trained.model, tmp_path / "bundle", precision="bf16"))
    assert bundle.manifest.precision == "bf16"
    expected = np.array([answer.score for answer in runtime.predict(test_images[::5])])
    scores = np.array([answer.score for answer in bundle.predict(test_images[::5])])
    assert np.mean(np.abs(scores - expected) / expected) < 0.01
    if has_bfloat16():
        assert (scores != expected).any()


def test_int8(trained, runtime, test_images, tmp_path, monkeypatch):
    """A quarter of the weights; embeddings near f32's, at the image's border as within. It is written on Windows too."""
    obey_windows(monkeypatch)
    path = export_bundle(trained.model, tmp_path / "bundle", precision="int8")
    plain = export_bundle(trained.model, tmp_path / "plain", index="flat")
    assert (path / "features.bin").stat().st_size < 0.5 * (plain / "features.bin").stat().st_size
    images = [read_image(image) for image in test_images[::10]]
    expected, found = runtime.embed(images), PatchcoreRuntime.load(path).embed(images)
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(error) < 0.45  # below 0.3 on CPUs with 8-bit products (VNNI), 0.37 on one without
    assert error[:, [0, -1]].mean() < 2 * error[:, 1:-1, 1:-1].mean()
    assert error[:, :, [0, -1]].mean() < 2 * error[:, 1:-1, 1:-1].mean()


def test_without_images(trained, tmp_path, caplog):
    model = FaissPatchcore.load_from_checkpoint(trained.checkpoint)
    model.held_out = None
    with pytest.raises(BundleError, match=r"the checkpoint keeps none. Give some \(--images\)"):
        export_bundle(model, tmp_path / "bundle", precision="auto")
    with pytest.MonkeyPatch.context() as context:
        context.setattr("patchcore_plugin.export.precision.find_spec", lambda name: None)
        with pytest.raises(BundleError, match="NNCF, which is not installed"):
            check_precision("int8", 5)
    assert not list(tmp_path.iterdir())
    runtime = PatchcoreRuntime.load(export_bundle(model, tmp_path / "bundle"))
    assert "No held-out normal images" in caplog.text
    assert (runtime.bank.index, runtime.manifest.index.trials) == ("flat", [])
    for index, version in (("hnsw", 3), ("reduced", 12)):
        runtime = PatchcoreRuntime.load(export_bundle(model, tmp_path / index, index=index))
        assert (runtime.bank.index, runtime.manifest.format_version) == (index, version)
