"""An ensemble: several backbones, each with a memory bank of its own, from training to HTTP."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from helpers.bundles import change_manifest, renew_checksums
from helpers.references import nearest
from helpers.server import app_server
from helpers.training import LAYERS, assert_scores_alike, folder_datamodule, make_engine, make_model
from PIL import Image, ImageEnhance

from patchcore_plugin import ConformalPostProcessor, FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.bundle import BundleError, read_manifest
from patchcore_plugin.errors import PatchcoreError, UsageError
from patchcore_plugin.export import export_bundle
from patchcore_plugin.memory_bank import EnsembleBank, MemoryBank
from patchcore_plugin.model.pre_processing import IMAGENET_MEAN, IMAGENET_STD, build_pre_processor
from patchcore_plugin.model.torch_model import FaissPatchcoreModel, MemoryBankError, Renormalization, spread
from patchcore_plugin.operations.update import update_bundle
from patchcore_plugin.operations.validation import validate_bundle
from patchcore_plugin.scoring import ScoreRule

SECOND = {"backbone": "efficientnet_lite1"}


@pytest.fixture(scope="module")
def fitted(cells, tmp_path_factory) -> tuple[FaissPatchcore, Path]:
    """An ensemble of EfficientNet-Lite0 and Lite1 that learned from ``cells``, and its checkpoint."""
    model = make_model(ensemble=[SECOND], post_processor=ConformalPostProcessor(0.05))
    engine = make_engine(tmp_path_factory.mktemp("ensemble"))
    engine.fit(model, datamodule=folder_datamodule(cells))
    return model.eval(), Path(engine.best_model_path)


@pytest.fixture(scope="module")
def ensemble_bundle(fitted, tmp_path_factory) -> Path:
    return export_bundle(fitted[0], tmp_path_factory.mktemp("export") / "both", thumbnails=True)


@pytest.fixture
def damaged(ensemble_bundle, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(ensemble_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def ensemble_runtime(ensemble_bundle) -> PatchcoreRuntime:
    return PatchcoreRuntime.load(ensemble_bundle)


def test_each_member_has_the_bank_that_it_has_alone(fitted, trained, cells, tmp_path):
    model = fitted[0].model
    assert model.widths == [152, 152]
    assert torch.equal(model.memory_bank, trained.model.model.memory_bank)
    alone = make_model(backbone="efficientnet_lite1")
    make_engine(tmp_path).fit(alone, datamodule=folder_datamodule(cells))
    (second,) = model.further
    assert torch.equal(second.memory_bank, alone.model.memory_bank)
    assert second.covering_radius == alone.model.covering_radius
    assert float(second.weight) == pytest.approx(spread(model.memory_bank) / spread(second.memory_bank))
    origins = fitted[0].origins
    assert len(origins.images) == len({Path(path).name for path in origins.images}) <= 24
    for found, own in zip(np.split(origins.patches, 2), (trained.model.origins, alone.origins), strict=True):
        assert [origins.images[number] for number in found[:, 0]] == [own.images[number] for number in own.patches[:, 0]]
        np.testing.assert_array_equal(found[:, 1:], own.patches[:, 1:])


def reference_scores(embedding, banks, weights, rule):
    """Image scores and patch distances in float64, by the definition: the members' distances are averaged."""
    parts = np.split(embedding.astype(np.float64), np.cumsum([bank.shape[1] for bank in banks])[:-1], axis=-1)
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    found = [nearest(part, bank.astype(np.float64)) for part, bank in zip(flat, banks, strict=True)]
    patch = sum(weight * distance[:, 0] for weight, (distance, _) in zip(weights, found, strict=True)) / len(banks)
    patch = patch.reshape(embedding.shape[:3])
    scores = []
    for number, distances in enumerate(patch):
        row = number * distances.size + distances.argmax()
        support = 0
        for part, bank, weight, (_, index) in zip(flat, banks, weights, found, strict=True):
            _, around = nearest(bank[index[row]].astype(np.float64), bank.astype(np.float64), rule.num_neighbors)
            support = support + weight * np.linalg.norm(part[row] - bank[around[0]], axis=1) / len(banks)
        weight = 1 - np.exp(support[0]) / np.exp(support).sum() if rule.num_neighbors > 1 else 1
        scores.append(weight * distances.max())
    return np.array(scores), patch


@pytest.mark.parametrize("rule", [ScoreRule(), ScoreRule(num_neighbors=1)])
def test_scores_are_the_mean_of_the_members(rule):
    rng = np.random.default_rng(0)
    banks = [rng.normal(size=(size, width)).astype(np.float32) / 3 for size, width in ((40, 6), (25, 3), (9, 10))]
    embedding = rng.normal(size=(4, 5, 7, 19)).astype(np.float32) / 3
    weights = [1, 0.7, 2.5]
    for index in ("flat", "hnsw"):
        bank = EnsembleBank([MemoryBank(vectors, index) for vectors in banks], weights)
        found = bank.score(embedding, rule)
        scores, patch = reference_scores(embedding, banks, weights, rule)
        np.testing.assert_allclose(found.patch, patch, rtol=1e-5)
        np.testing.assert_allclose(found.image, scores, rtol=1e-5)
        assert (len(bank), bank.dimension) == (74, 19)
    with pytest.raises(UsageError, match="have 18 values each, the vectors of the memory banks 19"):
        bank.score(embedding[..., :18], rule)


def test_vector_shown_is_of_the_member_that_finds_the_patch_farthest():
    bank = EnsembleBank([MemoryBank(np.eye(3)), MemoryBank(np.eye(2))], [1, 10])
    distances, numbers = bank.search_again(np.float32([[1, 0, 0, 5, 0], [0, 9, 0, 0, 1]]), 8)
    np.testing.assert_allclose(distances, [(0 + 10 * 4) / 2, (8 + 0) / 2])
    assert numbers.tolist() == [3, 1]


def test_torch_scores_as_the_reference(fitted, test_images):
    model = fitted[0].model
    pixels = torch.stack([read_image(path, as_tensor=True) for path in test_images[::25]])
    with torch.no_grad():
        images = fitted[0].pre_processor.transform(pixels)
        embedding, found = model.embed(images), model(images)
    banks = [member.memory_bank.numpy() for member in model.members]
    scores, _ = reference_scores(embedding.numpy(), banks, [1, float(model.further[0].weight)], model.rule)
    np.testing.assert_allclose(found.pred_score, scores, rtol=1e-4)


def test_checkpoint_keeps_the_members(fitted, test_images):
    loaded = FaissPatchcore.load_from_checkpoint(fitted[1]).eval()
    assert loaded.ensemble == [SECOND]
    images = fitted[0].pre_processor.transform(read_image(test_images[0], as_tensor=True)[None])
    with torch.no_grad():
        assert torch.equal(loaded.model(images).pred_score, fitted[0].model(images).pred_score)


def test_bundle_scores_as_torch(fitted, ensemble_runtime, test_images):
    found = ensemble_runtime.predict(test_images)
    for path, prediction in zip(test_images, found, strict=True):
        with torch.no_grad():
            expected = fitted[0].model(fitted[0].pre_processor.transform(read_image(path, as_tensor=True)[None]))
        assert prediction.score == pytest.approx(float(expected.pred_score), rel=1e-3)
        np.testing.assert_allclose(prediction.anomaly_map, expected.anomaly_map[0, 0], rtol=1e-2, atol=1e-2)
        assert 0 < prediction.p_value <= 1
    assert len({prediction.verdict for prediction in found}) == 2


def test_bundle_names_its_members(ensemble_bundle):
    manifest = read_manifest(ensemble_bundle)
    assert manifest.format_version == 6
    assert [member.backbone for member in manifest.all_members] == ["efficientnet_lite0", "efficientnet_lite1"]
    assert manifest.vectors == 2 * manifest.bank_size
    assert validate_bundle(ensemble_bundle).ok


def test_single_model_keeps_its_format(bundle):
    """Earlier versions read it."""
    content = json.loads((bundle / "manifest.json").read_text())
    assert content["format_version"] == 3
    assert "members" not in content


def test_reasons_name_images_of_either_bank(ensemble_runtime, cells, test_images):
    names = {f"good/{path.name}" for path in (cells / "train/good").iterdir()}
    vectors = set()
    for path in test_images[::5]:
        _, reasons = ensemble_runtime.explain(path)
        assert {reason.nearest.image for reason in reasons} <= names
        assert all(reason.nearest.crop.shape == (224, 224, 3) for reason in reasons)
        vectors |= {reason.nearest.vector for reason in reasons}
    size = ensemble_runtime.manifest.bank_size
    assert min(vectors) < size <= max(vectors), "both banks give reasons"


def test_update_extends_every_bank(ensemble_bundle, ensemble_runtime, cells, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    for path in sorted((cells / "test/good").iterdir())[:10]:
        ImageEnhance.Brightness(Image.open(path)).enhance(1.5).save(new / path.name)
    report = update_bundle(ensemble_bundle, sorted(new.iterdir()), tmp_path / "updated")
    before, after = ensemble_runtime.manifest, read_manifest(tmp_path / "updated")
    gained = [new.bank_size - old.bank_size for old, new in zip(before.all_members, after.all_members, strict=True)]
    assert min(gained) > 0
    assert report.update.vectors == sum(gained) == after.vectors - before.vectors
    assert [member.weight for member in after.all_members] == [member.weight for member in before.all_members]
    updated = PatchcoreRuntime.load(tmp_path / "updated")
    for old, grown in zip(ensemble_runtime.bank.members, updated.bank.members, strict=True):
        np.testing.assert_array_equal(grown.vectors[: len(old)], old.vectors)
    # the origins of the first bank's old vectors, its new ones, then those of the second bank
    size, more = before.bank_size, gained[0]
    np.testing.assert_array_equal(updated.origins.patches[:size], ensemble_runtime.origins.patches[:size])
    np.testing.assert_array_equal(updated.origins.patches[size + more :][:size], ensemble_runtime.origins.patches[size:])
    added = updated.origins.patches[size : size + more]
    assert {updated.origins.images[number] for number in added[:, 0]} <= {f"new/{path.name}" for path in new.iterdir()}
    for vector, (number, row, column) in zip(updated.bank.members[0].vectors[size:], added, strict=True):
        embedding = updated.embed([np.asarray(Image.open(tmp_path / updated.origins.images[number]).convert("RGB"))])
        np.testing.assert_allclose(embedding[0, row, column, :152], vector, atol=1e-3)
    assert np.mean([p.score for p in report.after]) < np.mean([p.score for p in report.before])
    assert validate_bundle(tmp_path / "updated").ok


@pytest.mark.parametrize("file", ["bank_2.faiss", "bank_2.npy", "bank.faiss"])
def test_damaged_member_refuses_the_whole(damaged, file):
    content = bytearray((damaged / file).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / file).write_bytes(content)
    with pytest.raises(BundleError, match=f"{file} does not match its checksum"):
        PatchcoreRuntime.load(damaged)
    (damaged / file).unlink()
    with pytest.raises(BundleError, match=f"{file} is missing"):
        PatchcoreRuntime.load(damaged)


def test_members_that_do_not_fit(damaged):
    content = json.loads((damaged / "manifest.json").read_text())
    (member,) = content["members"]
    for members, words in (
        ([], "lists the banks bank.faiss, bank_2.faiss, and there are 1 members"),
        ([member] * 2, "and there are 3 members"),
        ([{**member, "weight": 0}], "weight: Input should be greater than 0"),
        ([{**member, "weight": float("nan")}], "weight: Input should be"),
        ([{**member, "bank_size": 7}], r"holds vectors of shape .* the manifest says \(7, 152\)"),
        ([{**member, "embedding_dimension": 151}], "the manifest says"),
        ([member] * 8, "members: List should have at most 7 items"),
    ):
        change_manifest(damaged, members=members)
        with pytest.raises(BundleError, match=words):
            PatchcoreRuntime.load(damaged)
    change_manifest(damaged, members=[member], format_version=5)
    with pytest.raises(BundleError, match="format_version 5 has no members"):
        PatchcoreRuntime.load(damaged)


def test_bank_of_other_width(damaged):
    MemoryBank(np.random.default_rng(0).normal(size=(491, 100))).save(damaged / "bank_2.faiss")
    renew_checksums(damaged)
    with pytest.raises(BundleError, match=r"bank_2.faiss holds vectors of shape \(491, 100\)"):
        PatchcoreRuntime.load(damaged)


def test_http(ensemble_bundle, test_images):
    with app_server(bundle=str(ensemble_bundle)) as server:
        answer = server.client.post("/predict", files={"image": test_images[-1].read_bytes()}).json()
        expected = PatchcoreRuntime.load(ensemble_bundle).predict([test_images[-1]])[0]
        assert answer["score"] == pytest.approx(expected.score, rel=1e-4)
        assert answer["p_value"] == expected.p_value
        reasons = server.client.post("/explain", files={"image": test_images[-1].read_bytes()})
        assert reasons.status_code == 200
        (model,) = server.client.get("/models").json()["models"]
        assert model["backbone"] == "efficientnet_lite0 + efficientnet_lite1"
        assert model["bank_size"] == 2 * read_manifest(ensemble_bundle).bank_size
        assert server.client.get("/drift").status_code == 200


def test_streamed_in_half_the_memory_without_outliers(cells, tmp_path):
    """What changes a bank does so in each member's."""
    budget = 24 * 1024 * 304 * 2 * 1.25 / 4 / 2**30
    model = make_model(ensemble=[SECOND], embedding_dtype="float16", memory_budget=budget, outlier_rejection=2)
    make_engine(tmp_path, limit_val_batches=0).fit(model, datamodule=folder_datamodule(cells))
    for member in model.model.members:
        assert 300 < len(member.memory_bank) < 491
        assert torch.equal(member.memory_bank, member.memory_bank.half().float())
    assert len(model.origins.patches) == sum(model.model.bank_sizes)


def test_member_sees_images_as_its_weights_were_trained():
    """A ResNet with ImageNet's normalization beside an EfficientNet-Lite, whose pixels lie in [-1, 1]."""
    pixels = torch.rand(2, 3, 64, 64)
    given = build_pre_processor((64, 64), normalization="backbone", backbone="efficientnet_lite0")
    wanted = build_pre_processor((64, 64))
    torch.manual_seed(0)
    between = Renormalization.between(((0.5,) * 3, (0.5,) * 3), (IMAGENET_MEAN, IMAGENET_STD))
    second = FaissPatchcoreModel(["layer1"], "resnet18", pre_trained=False, renormalization=between)
    with torch.no_grad():
        found = second.embed(given.transform(pixels))
        second.renormalization = None
        expected = second.embed(wanted.transform(pixels))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert Renormalization.between((IMAGENET_MEAN, IMAGENET_STD), (IMAGENET_MEAN, IMAGENET_STD)) is None


def test_normalization_of_each_member():
    model = make_model(ensemble=[{"backbone": "resnet18", "layers": ["layer1"]}], pre_trained=False)
    factor, _ = model.model.further[0].renormalization
    np.testing.assert_allclose(factor, 0.5 / np.array(IMAGENET_STD), rtol=0.01)
    model = make_model(
        ensemble=[{"backbone": "resnet18", "layers": ["layer1"]}], pre_trained=False, normalization="imagenet"
    )
    assert model.model.further[0].renormalization is None


@pytest.mark.parametrize(
    ("ensemble", "words"),
    [
        ("efficientnet_lite1", "must be a list of further members"),
        (SECOND, "must be a list of further members"),
        (3, "must be a list of further members"),
        (["efficientnet_lite1"], "A member of the ensemble has a backbone"),
        ([{"layers": LAYERS}], "A member of the ensemble has a backbone"),
        ([{**SECOND, "weight": 2}], "A member of the ensemble has a backbone"),
        ([{"backbone": 3}], "A member of the ensemble has a backbone"),
        ([{**SECOND, "layers": "blocks.2"}], "layers must be a non-empty list"),
        ([{**SECOND, "layers": ["blocks.9"]}], "has no layer 'blocks.9'"),
        ([{"backbone": "efficientnet_lite9"}], "timm has no model"),
        ([{**SECOND, "backbone_weights": "absent.pth"}], "absent.pth"),
        ([SECOND] * 8, "at most 8 members"),
    ],
)
def test_wrong_members(ensemble, words):
    with pytest.raises(PatchcoreError, match=words):
        make_model(ensemble=ensemble)


def test_no_radius_for_an_ensemble():
    with pytest.raises(UsageError, match="coreset_radius is a distance in one backbone's units"):
        make_model(ensemble=[SECOND], coreset_radius=20)


def test_a_bank_for_each_layer(cells, test_images, tmp_path):
    """A deeper layer's patches are brought to the grid of the first member, as section 3.1 does within a backbone."""
    model = make_model(layers=["blocks.2"], ensemble=[{"backbone": "efficientnet_lite0", "layers": ["blocks.4"]}])
    make_engine(tmp_path, limit_val_batches=0).fit(model, datamodule=folder_datamodule(cells))
    model.eval()
    together = make_model().eval()
    runtime = PatchcoreRuntime.load(export_bundle(model, tmp_path / "bundle"))
    for path in test_images[::13]:
        images = model.pre_processor.transform(read_image(path, as_tensor=True)[None])
        with torch.no_grad():
            torch.testing.assert_close(model.model.embed(images), together.model.embed(images))
            expected = model.model(images)
        (found,) = runtime.predict([path])
        assert found.score == pytest.approx(float(expected.pred_score), rel=1e-3)


@pytest.mark.slow  # test_training.py's twin exports a single model
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_self_contained_export(fitted, test_images, tmp_path, kind):
    """anomalib's own export, with the banks of all members inside."""
    path = make_engine(tmp_path).export(fitted[0], kind, export_root=tmp_path, input_size=(300, 300))
    images = torch.stack([read_image(image, as_tensor=True) for image in test_images[::25]])
    assert_scores_alike(path, fitted[0], images)


def test_member_without_a_bank(fitted):
    model = FaissPatchcore.load_from_checkpoint(fitted[1]).eval()
    model.model.further[0].memory_bank = torch.empty(0)
    with pytest.raises(MemoryBankError, match="memory bank is empty"), torch.no_grad():
        model.model(torch.zeros(1, 3, 256, 256))
