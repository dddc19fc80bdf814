"""Checkpoints and models that earlier versions wrote are read, and score images as those versions did.

tests/helpers/make_old_files.py wrote them.
"""

from pathlib import Path

import pytest
import torch
from anomalib.data.utils import read_image
from helpers.old_files import EXPECTED, IMAGES, OLD, assert_bundle_scores
from lightning.pytorch import Trainer

from patchcore_plugin import FaissPatchcore
from patchcore_plugin.export import export_bundle

CHECKPOINTS = ["model.ckpt", "position_weight.ckpt"]


def load(name: str | Path) -> FaissPatchcore:
    return FaissPatchcore.load_from_checkpoint(OLD / name, map_location="cpu").eval()


def assert_model_scores(model: FaissPatchcore, name: str) -> None:
    batch = torch.stack([read_image(path, as_tensor=True) for path in IMAGES])
    with torch.no_grad():
        found = {"raw": model.model(model.pre_processor(batch)), "normalized": model(batch)}
    for kind, answer in found.items():
        assert answer.pred_score.flatten().tolist() == pytest.approx(EXPECTED[name][kind], rel=1e-5)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name):
    assert_model_scores(load(name), name)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_exported(name, tmp_path):
    export_bundle(load(name), tmp_path / "bundle", "cells", index="flat")
    assert_bundle_scores(tmp_path / "bundle", name)


def test_position_weight_survives_saving(tmp_path):
    """The argument is gone, so the weight travels from checkpoint to checkpoint."""
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(load("position_weight.ckpt"))
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert_model_scores(load(tmp_path / "again.ckpt"), "position_weight.ckpt")


def test_torch_export():
    model = torch.load(OLD / "model.pt", weights_only=False)["model"].eval()
    assert_model_scores(model, "model.pt")
