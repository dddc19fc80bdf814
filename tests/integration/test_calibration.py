"""Thresholds from normal images alone: trained by the config, exported, and refused in time where images are too few."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from click.testing import CliRunner
from helpers.training import folder_datamodule, make_engine, make_model

from patchcore_plugin import ConformalPostProcessor, FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.bundle import MAX_CALIBRATION, read_manifest
from patchcore_plugin.cli import main
from patchcore_plugin.export import export_bundle
from patchcore_plugin.scoring.conformal import p_value, threshold
from patchcore_plugin.scoring.drift import DriftMonitor


@pytest.fixture(scope="module")
def model(normal_only):
    return FaissPatchcore.load_from_checkpoint(normal_only, map_location="cpu").eval()


@pytest.fixture(scope="module")
def runtime(calibrated):
    return PatchcoreRuntime.load(calibrated)


@pytest.fixture(scope="module")
def answers(model, held_back):
    """Answers for the images held back, scored again one by one."""
    with torch.no_grad():
        images = [model.pre_processor.transform(read_image(path, as_tensor=True)[None]) for path in held_back]
        return [model.model(image) for image in images]


@pytest.fixture(scope="module")
def raw(answers):
    """Their scores, and the largest and the mean value of their maps."""
    return np.array(
        [[float(a.pred_score), float(a.anomaly_map.max()), float(a.anomaly_map.double().mean())] for a in answers]
    )


def test_config_without_a_defective_image(model, answers, raw):
    """The images held back are in the checkpoint by their scores, and set both thresholds."""
    post = model.post_processor
    assert isinstance(post, ConformalPostProcessor)
    assert post.false_positive_rate == 0.05
    assert post.calibration.shape == (20, 3)
    np.testing.assert_allclose(post.calibration, raw, rtol=1e-4)
    assert float(post.image_threshold) == pytest.approx(max(raw[:, 0]), rel=1e-4), "20 images promise 5 % by the largest"
    assert float(post.pixel_threshold) == pytest.approx(max(raw[:, 1]), rel=1e-4)
    shown = [post(answer) for answer in answers]
    normalized = np.array([float(answer.pred_score) for answer in shown])
    assert normalized.min() == pytest.approx(0, abs=1e-4)
    assert normalized.max() == pytest.approx(0.5, abs=1e-4)
    assert max(float(answer.anomaly_map.max()) for answer in shown) == pytest.approx(0.5, abs=1e-4)


def test_p_values_of_a_bundle(calibrated, runtime, model, raw, test_images):
    calibration = read_manifest(calibrated).calibration
    assert calibration.false_positive_rate == 0.05
    for found, expected in zip((calibration.scores, calibration.peaks, calibration.means), raw.T, strict=True):
        np.testing.assert_allclose(found, np.sort(expected), rtol=1e-4)
    answers = runtime.predict(test_images)
    for answer in answers:
        assert answer.p_value == p_value(calibration.scores, answer.score / (1 + 1e-5))
        assert (answer.verdict == "anomalous") == (answer.p_value <= 0.05)
        assert bool(answer.regions) == (answer.anomaly_map.max() > threshold(calibration.peaks, 0.05) * (1 + 1e-5))
        assert answer.mean_distance == pytest.approx(answer.anomaly_map.mean(), rel=1e-5)
    verdicts = {kind: [a.verdict for a, p in zip(answers, test_images, strict=True) if p.parent.name == kind]
                for kind in ("good", "defective")}  # fmt: skip
    assert verdicts["defective"].count("anomalous") > 0.6 * len(verdicts["defective"])
    assert verdicts["good"].count("anomalous") < 0.1 * len(verdicts["good"]), "they trained or calibrated it"


def test_image_that_set_the_threshold(runtime, held_back, raw):
    """Its score differs in the last digits here; it is still a tie. The same holds for the largest value of its map."""
    (answer,) = runtime.predict([held_back[int(raw[:, 0].argmax())]])
    assert (answer.verdict, answer.p_value) == ("normal", 2 / 21)
    (answer,) = runtime.predict([held_back[int(raw[:, 1].argmax())]])
    assert answer.regions == []


def test_drift_of_what_the_runtime_answers(calibrated, test_images):
    """Upside down is another product."""
    runtime = PatchcoreRuntime.load(calibrated)
    monitor = DriftMonitor(runtime.manifest.calibration)
    good = [path for path in test_images if path.parent.name == "good"]
    for answer in runtime.stream(good):
        monitor.update(answer.score, answer.mean_distance)
    assert (monitor.state.images, monitor.drifted) == (len(good), False)
    turned = [np.rot90(np.asarray(read_image(path, as_tensor=False)) * 255).astype(np.uint8).copy() for path in good]
    for answer in runtime.stream(turned):
        monitor.update(answer.score, answer.mean_distance)
    assert monitor.drifted
    assert "larger" in monitor.state.what


def test_anomalibs_thresholding_stays(bundle, runtime, test_images):
    """A bundle without calibration has no p-values."""
    plain = PatchcoreRuntime.load(bundle)
    assert plain.manifest.calibration is None
    (answer,) = plain.predict(test_images[:1])
    assert answer.p_value is None
    assert answer.verdict is not None


def test_checkpoint_under_another_post_processor(normal_only, trained, cells, tmp_path):
    """A checkpoint brings its own kind of post-processor; one with anomalib's is calibrated by a validation."""
    datamodule = folder_datamodule(cells)
    default = make_model(coreset_sampling_ratio=0.1)
    make_engine(tmp_path).test(default, datamodule=datamodule, ckpt_path=str(normal_only))
    assert default.post_processor.calibration.shape == (20, 3)
    assert float(default.trainer.callback_metrics["image_AUROC"]) > 0.9
    model = make_model(post_processor=ConformalPostProcessor(0.05))
    make_engine(tmp_path).validate(model, datamodule=datamodule, ckpt_path=str(trained.checkpoint))
    post = model.post_processor
    assert len(post.calibration) == 52, "the normal ones of 104"
    assert float(post.image_threshold) == threshold(post.calibration[:, 0].sort().values.tolist(), 0.05)


def test_review_band(trained, cells, test_images, tmp_path):
    """Three answers, from a validation to the bundle; p-values agree with them, and the checkpoint keeps the rate."""
    model = make_model(post_processor=ConformalPostProcessor(0.05, review_rate=0.3))
    engine = make_engine(tmp_path)
    engine.validate(model, datamodule=folder_datamodule(cells), ckpt_path=str(trained.checkpoint))
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = FaissPatchcore.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu").eval()
    bundle = export_bundle(loaded, tmp_path / "bundle", index="flat")
    manifest = read_manifest(bundle)
    scores = model.post_processor.calibration[:, 0].sort().values.tolist()
    assert (manifest.format_version, manifest.calibration.review_rate) == (8, 0.3)
    assert (manifest.image.threshold, manifest.image.review) == (threshold(scores, 0.05), threshold(scores, 0.3))
    answers = PatchcoreRuntime.load(bundle).predict(test_images)
    for answer in answers:
        assert (answer.verdict == "anomalous") == (answer.p_value <= 0.05)
        assert (answer.verdict == "normal") == (answer.p_value > 0.3)
        assert answer.review_threshold == manifest.image.review
    assert {answer.verdict for answer in answers} == {"normal", "review", "anomalous"}
    for command, expected in {
        ("info", bundle): "Of 100 good parts, 3.77 would be stopped, and 24.5 more looked at",
        ("validate", bundle, "--images", cells / "test"): f"{len(list((cells / 'test').rglob('*.png')))} images:",
    }.items():
        result = CliRunner().invoke(main, [*map(str, command)], catch_exceptions=False, env={"COLUMNS": "200"})
        assert expected in result.output
    assert " to review, 0 unreadable" in result.output


def test_recording_sessions(cells, test_images, tmp_path):
    """Two of four sessions are held back whole, in training, in a later validation, and as the bundle's p-values."""
    for number, cell in enumerate(sorted((cells / "train" / "good").iterdir())):
        (tmp_path / "good" / f"day{number % 4}").mkdir(parents=True, exist_ok=True)
        shutil.copy(cell, tmp_path / "good" / f"day{number % 4}")

    def datamodule():
        settings = {"normal_dir": "good", "normal_test_dir": None, "abnormal_dir": None, "test_split_mode": "none"}
        return folder_datamodule(tmp_path, **settings, val_split_mode="from_train", val_split_ratio=0.5, seed=0)

    model, engine = make_model(post_processor=ConformalPostProcessor(0.2, "folder")), make_engine(tmp_path / "results")
    engine.train(model=model, datamodule=datamodule())
    calibration = model.post_processor.record()
    learned = {Path(image).parent.name for image in model.origins.images}
    assert (len(learned), len(calibration.scores), set(calibration.sessions.scores)) == (2, 12, {0, 1})
    later = make_model()
    make_engine(tmp_path / "later").validate(later, datamodule=datamodule(), ckpt_path=engine.best_model_path)
    assert later.post_processor.groups == "folder"
    torch.testing.assert_close(later.post_processor.calibration, model.post_processor.calibration)
    loaded = FaissPatchcore.load_from_checkpoint(engine.best_model_path, map_location="cpu").eval()
    bundle = export_bundle(loaded, tmp_path / "bundle", index="flat")
    manifest = read_manifest(bundle)
    assert (manifest.format_version, manifest.calibration) == (5, calibration)
    for answer in PatchcoreRuntime.load(bundle).predict([*test_images[:4], *test_images[-4:]]):
        parts = [
            [s for s, n in zip(calibration.scores, calibration.sessions.scores, strict=True) if n == one] for one in (0, 1)
        ]
        assert answer.p_value == max(p_value(part, answer.score / (1 + 1e-5)) for part in parts)
        assert (answer.verdict == "anomalous") == (answer.p_value <= 0.2)


def test_too_few_images(cells, tmp_path):
    """Refused before training where the data module knows the number of images, else after validation."""
    few = {"val_split_mode": "from_train", "val_split_ratio": 0.25, "normal_test_dir": None, "abnormal_dir": None}
    datamodule = folder_datamodule(cells, **few, test_split_mode="none")
    expected = (
        r"needs at least 99 normal images in the validation set, which has 6\. .*val_split_ratio.* 0\.143 is the lowest"
    )
    model = make_model(post_processor=ConformalPostProcessor(0.01))
    with pytest.raises(ValueError, match=expected):
        make_engine(tmp_path).fit(model, datamodule=datamodule)
    assert not model.model.memory_bank.numel(), "nothing was trained yet"
    with pytest.raises(ValueError, match="has no validation set"):
        make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells, val_split_mode="none"))
    datamodule.setup()
    with pytest.raises(ValueError, match=expected):
        make_engine(tmp_path).fit(model, datamodule.train_dataloader(), datamodule.val_dataloader())
    with pytest.raises(ValueError, match=r"false_positive_rate must be a number in \(0, 1\), got 1\."):
        ConformalPostProcessor(1)
    with pytest.raises(ValueError, match=r"at least 0\.0001, got 1e-05: a calibration keeps 10,000 images"):
        ConformalPostProcessor(1e-5)


def test_unlabelled_and_repeated_images_and_the_limit():
    """Without labels all images are normal; a repeated image counts once; of too many images, some are drawn."""
    from types import SimpleNamespace

    from anomalib.data import ImageBatch, InferenceBatch

    trainer = SimpleNamespace(world_size=1, global_rank=0)
    rng = torch.Generator().manual_seed(0)

    def batch(names, labels):
        maps = torch.rand(len(names), 1, 8, 8, generator=rng)
        return ImageBatch(
            image=torch.zeros(len(names), 3, 8, 8), pred_score=maps.amax((1, 2, 3)) + 1, anomaly_map=maps,
            gt_label=labels, image_path=names if names[0] else None,
        )  # fmt: skip

    post = ConformalPostProcessor(0.2)
    post.on_validation_batch_end(trainer, None, batch(list("abcd"), None))
    post.on_validation_batch_end(trainer, None, batch(list("defg"), torch.tensor([0, 0, 1, 0])))
    post.on_validation_batch_end(trainer, None, batch(["a"], None))
    post.on_validation_epoch_end(trainer, None)
    assert len(post.calibration) == 6  # a b c d e g
    for _ in range(2):
        post.on_validation_batch_end(trainer, None, batch([None] * 4, torch.tensor([1, 0, 0, 0])))
    post.on_validation_epoch_end(trainer, None)
    assert len(post.calibration) == 6, "without names, all are different ones"
    many = batch([str(number) for number in range(MAX_CALIBRATION + 100)], None)
    post.on_validation_batch_end(trainer, None, many)
    post.on_validation_epoch_end(trainer, None)
    assert len(post.calibration) == MAX_CALIBRATION
    assert set(post.calibration[:, 0].tolist()) < set(many.pred_score.tolist())
    # with a range of length 0, scores are still below, at or above the threshold
    post.on_validation_batch_end(trainer, None, ImageBatch(
        image=torch.zeros(9, 3, 8, 8), pred_score=torch.ones(9), anomaly_map=torch.ones(9, 1, 8, 8),
        image_path=[str(i) for i in range(9)],
    ))  # fmt: skip
    post.on_validation_epoch_end(trainer, None)
    scores = torch.tensor([0.9, 1.0, 1.1])
    normalized = post(InferenceBatch(pred_score=scores, anomaly_map=scores.reshape(3, 1, 1, 1)))
    assert normalized.pred_score.tolist() == normalized.anomaly_map.flatten().tolist() == [0, 0.5, 1]


def test_warns_of_another_arithmetic(model, tmp_path, caplog):
    export_bundle(model, tmp_path / "bundle", precision="bf16")
    assert "calibrated in float32" in caplog.text
