"""Trainings with 1 to 8 normal images by the configs: each ends in a model that scores, or says what to do instead."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.training import ROOT

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.export import export_bundle

CONFIG = ROOT / "configs/few_images.yaml"


def part(cells, tmp_path, count) -> Path:
    """A folder ``good`` with a few of the cells."""
    (tmp_path / "part/good").mkdir(parents=True)
    for image in sorted((cells / "train/good").iterdir())[:count]:
        shutil.copy(image, tmp_path / "part/good")
    return tmp_path / "part"


def train(config, root, tmp_path, *more) -> tuple[Path | None, str]:
    """The checkpoint of the stock ``anomalib``, None where it fails, and what it says."""
    command = [Path(sys.executable).parent / "anomalib", "train", "--config", config, "--data.init_args.root", root]
    command += ["--data.init_args.num_workers", "0", *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    found = list(tmp_path.glob("results/**/model.ckpt"))
    assert (done.returncode == 0) == bool(found), done.stderr
    said = " ".join(re.sub("[│╭╰─]", " ", done.stdout + done.stderr).split())
    return (found[0] if found else None), said


def thresholds_of_the_config() -> list[str]:
    """The arguments for thresholds that the config's head shows."""
    (shown,) = re.findall(r"^#   patchcore train .*\\\n((?:#     .*\n)+)", CONFIG.read_text("utf-8"), re.MULTILINE)
    return shlex.split(shown.replace("#", "").replace("\\\n", ""))


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_model_without_thresholds(cells, tmp_path, test_images, count):
    checkpoint, _ = train(CONFIG, part(cells, tmp_path, count), tmp_path)
    model = FaissPatchcore.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    assert len(model.model.memory_bank) == count * 1024 * 3 // 10
    assert len(model.origins.images) == count
    answers = PatchcoreRuntime.load(export_bundle(model, tmp_path / "bundle")).predict(test_images)
    assert {(answer.verdict, answer.threshold, answer.normalized_score) for answer in answers} == {(None, None, None)}
    by_kind = {kind: [a.score for a, p in zip(answers, test_images, strict=True) if p.parent.name == kind]
               for kind in ("good", "defective")}  # fmt: skip
    above = sum(bad > good for bad in by_kind["defective"] for good in by_kind["good"])
    assert above > 0.6 * len(by_kind["good"]) * len(by_kind["defective"])


def test_thresholds_as_the_config_shows(cells, tmp_path, test_images):
    checkpoint, _ = train(CONFIG, part(cells, tmp_path, 8), tmp_path, *thresholds_of_the_config())
    model = FaissPatchcore.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    assert model.post_processor.calibration.shape == (4, 3)
    assert float(model.post_processor.image_threshold) == float(model.post_processor.calibration[:, 0].max())
    assert len(model.origins.images) == 4
    answers = PatchcoreRuntime.load(export_bundle(model, tmp_path / "bundle", index="flat")).predict(test_images)
    assert {answer.verdict for answer in answers} == {"normal", "anomalous"}


@pytest.mark.parametrize(
    ("config", "count", "held"),
    [
        ("few_images.yaml", 1, 0),
        pytest.param("few_images.yaml", 4, 2, marks=pytest.mark.slow),
        ("normal_only.yaml", 1, 0),
        pytest.param("normal_only.yaml", 2, 0, marks=pytest.mark.slow),
        pytest.param("normal_only.yaml", 4, 1, marks=pytest.mark.slow),
    ],
)
def test_too_few_for_thresholds(cells, tmp_path, config, count, held):
    """Nothing is trained, and the message names what trains with so few."""
    arguments = thresholds_of_the_config() if config == CONFIG.name else []
    checkpoint, said = train(CONFIG.with_name(config), part(cells, tmp_path, count), tmp_path, *arguments)
    assert checkpoint is None
    assert f"normal images in the validation set, which has {held}" in said
    assert "train without thresholds, as configs/few_images.yaml does (val_split_mode: none, and the trainer's limit" in said
