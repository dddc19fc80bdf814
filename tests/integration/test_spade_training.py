"""Spade through anomalib's Engine on real cells, and every way to export it, which is refused."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from anomalib.models import get_model
from helpers.training import LAYERS, folder_datamodule, make_engine

from patchcore_plugin import FaissPatchcore, Spade, register
from patchcore_plugin.bundle import BundleError
from patchcore_plugin.errors import UsageError
from patchcore_plugin.export import export_bundle
from patchcore_plugin.model.torch_model import MemoryBankError

BACKBONE = {"backbone": "efficientnet_lite0", "layers": LAYERS}


@pytest.fixture(scope="module")
def fitted(few, tmp_path_factory):
    model, engine = Spade(**BACKBONE, visualizer=False), make_engine(tmp_path_factory.mktemp("spade"))
    metrics = engine.train(model=model, datamodule=folder_datamodule(few))
    return model, engine, metrics[0]


def test_training(fitted, few):
    """It detects, and its checkpoint scores as it does."""
    model, engine, metrics = fitted
    assert metrics["image_AUROC"] > 0.6
    assert model.model.image_bank.shape == (8, 320)
    loaded = Spade.load_from_checkpoint(engine.best_model_path, map_location="cpu")
    image = folder_datamodule(few)
    image.setup()
    picture = image.test_data[0].image[None]
    assert torch.equal(loaded.eval()(picture).pred_score, model.cpu().eval()(picture).pred_score)


def test_selected_by_name_and_path():
    register()
    for chosen in ("Spade", "spade"):
        assert type(get_model(chosen, **BACKBONE)) is Spade
    assert type(get_model({"class_path": "patchcore_plugin.Spade", "init_args": BACKBONE})) is Spade


def test_export_is_refused(fitted, tmp_path):
    model, engine, _ = fitted
    for export in (model.to_torch, model.to_onnx, model.to_openvino):
        with pytest.raises(UsageError, match=r"Spade is for comparison only, and is not exported.*Train a FaissPatchcore"):
            export(tmp_path / "exported")
    with pytest.raises(BundleError, match="Spade is for comparison only"):
        export_bundle(model, tmp_path / "bundle")
    with pytest.raises(UsageError, match="This is a checkpoint of Spade"):
        FaissPatchcore.load_from_checkpoint(engine.best_model_path, map_location="cpu")
    assert list(tmp_path.iterdir()) == []


def test_anomalous_images_are_left_out(few, tmp_path):
    """A training set of labeled images: the anomalous ones teach nothing; with no other the training says so."""
    from anomalib.data import ImageBatch

    def loader(labels):
        datamodule = folder_datamodule(few)
        datamodule.setup()
        items = [datamodule.train_data[number] for number in range(len(labels))]
        for item, label in zip(items, labels, strict=True):
            item.gt_label = torch.tensor(label)
        return torch.utils.data.DataLoader(items, batch_size=2, collate_fn=ImageBatch.collate)

    model = Spade(**BACKBONE, visualizer=False)
    make_engine(tmp_path, limit_val_batches=0).fit(model, train_dataloaders=loader([0, 1, 0, 1, 1]))
    assert len(model.model.image_bank) == 2
    with pytest.raises(MemoryBankError, match="no normal image"):
        make_engine(tmp_path, limit_val_batches=0).fit(model, train_dataloaders=loader([1, 1]))


def test_untrained(few, tmp_path):
    model = Spade(**BACKBONE, visualizer=False)
    with pytest.raises(MemoryBankError, match="Spade knows no training image"):
        make_engine(tmp_path).test(model=model, datamodule=folder_datamodule(few))


def test_validation_in_the_middle(few, tmp_path):
    model = Spade(**BACKBONE, visualizer=False)
    engine = make_engine(tmp_path, val_check_interval=1)
    with pytest.raises(MemoryBankError, match=r"leave the trainer's val_check_interval at 1\.0"):
        engine.fit(model, datamodule=folder_datamodule(few, train_batch_size=2))


def test_command_line(few, tmp_path):
    """``patchcore train`` by the short name, and ``patchcore export``, which ends with one sentence."""
    patchcore = Path(sys.executable).parent / "patchcore"
    config = tmp_path / "spade.yaml"
    config.write_text(
        textwrap.dedent(f"""
        model:
          class_path: Spade
          init_args: {{backbone: efficientnet_lite0, layers: [blocks.2, blocks.4], num_neighbors: 3, visualizer: false}}
        data:
          class_path: anomalib.data.Folder
          init_args:
            {{name: few, root: '{few.as_posix()}', normal_dir: train/good, normal_test_dir: test/good,
             abnormal_dir: test/defective, num_workers: 0, val_split_mode: same_as_test}}
        """)
    )
    arguments = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run([patchcore, "train", "--config", config], check=False, **arguments)
    assert result.returncode == 0, result.stderr
    (checkpoint,) = tmp_path.glob("results/Spade/few/v0/weights/lightning/model.ckpt")
    result = subprocess.run([patchcore, "export", checkpoint, "bundle"], check=False, **arguments)
    assert result.returncode != 0
    assert "This is a checkpoint of Spade. Spade is for comparison only" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
