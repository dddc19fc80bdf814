"""Training within a memory budget, at other precisions, to a radius, and by several processes."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from helpers.references import covering_radius
from helpers.training import folder_datamodule, make_engine, make_model

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.bundle import BundleError
from patchcore_plugin.bundle.origins import Origins
from patchcore_plugin.export import export_bundle
from patchcore_plugin.model.augmentation import PixelScale, changes_of


def fit(model, cells, tmp_path, **arguments) -> FaissPatchcore:
    make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells, **arguments))
    return model


def auroc(model, cells, tmp_path) -> float:
    return make_engine(tmp_path).test(model, datamodule=folder_datamodule(cells))[0]["image_AUROC"]


def assert_origins(found: Origins, bank: torch.Tensor, trained, images: int) -> None:
    """The patch that each bank vector is said to come from has that very embedding."""
    assert len(found.patches) == len(bank)
    assert len(found.images) <= images
    assert sorted(set(found.patches[:, 0])) == list(range(len(found.images)))
    assert len({Path(path).name for path in found.images}) == len(found.images)
    for number, path in enumerate(found.images):
        mine = found.patches[:, 0] == number
        with torch.no_grad():
            pixels = trained.model.pre_processor.transform(read_image(path, as_tensor=True)[None])
            (embedding,) = trained.model.model.embed(pixels)
        _, rows, columns = found.patches[mine].T
        # An image's embedding depends on its batch and the number of threads in the last digits.
        np.testing.assert_allclose(bank[mine], embedding[rows, columns], atol=1e-3)


def test_bank_remembers_its_images(trained):
    origins, bank = trained.model.origins, trained.model.model.memory_bank
    assert_origins(origins, bank, trained, 24)
    loaded = FaissPatchcore.load_from_checkpoint(trained.checkpoint).origins
    np.testing.assert_array_equal(loaded.patches, origins.patches)
    assert loaded.images == origins.images


def test_checkpoint_without_origins(trained, tmp_path):
    """As written before models kept them: it is exported without."""
    checkpoint = torch.load(trained.checkpoint, weights_only=False)
    del checkpoint["origins"]
    torch.save(checkpoint, tmp_path / "model.ckpt")
    model = FaissPatchcore.load_from_checkpoint(tmp_path / "model.ckpt")
    assert model.origins is None
    with pytest.raises(BundleError, match="does not know its training images"):
        export_bundle(model, tmp_path / "bundle", index="flat", thumbnails=True)
    export_bundle(model, tmp_path / "bundle", index="flat")
    assert PatchcoreRuntime.load(tmp_path / "bundle").origins is None


@pytest.fixture(scope="module")
def training_embeddings(trained, cells) -> np.ndarray:
    """Patch embeddings (24576, 152) of all training cells."""
    images = torch.stack([read_image(path, as_tensor=True) for path in sorted((cells / "train/good").iterdir())])
    with torch.no_grad():
        parts = [trained.model.model.embed(part) for part in trained.model.pre_processor.transform(images).split(8)]
    return torch.cat(parts).flatten(0, 2).numpy()


def test_radius_reached_is_stored_and_true(trained, training_embeddings):
    radius, bank = float(trained.model.model.covering_radius), trained.model.model.memory_bank
    assert covering_radius(training_embeddings, bank) == pytest.approx(radius, rel=1e-4)
    assert torch.load(trained.checkpoint, weights_only=False)["state_dict"]["model.covering_radius"] == radius


def test_checkpoint_without_a_radius(trained, tmp_path):
    """As written before models kept it."""
    checkpoint = torch.load(trained.checkpoint, weights_only=False)
    del checkpoint["state_dict"]["model.covering_radius"]
    torch.save(checkpoint, tmp_path / "model.ckpt")
    model = FaissPatchcore.load_from_checkpoint(tmp_path / "model.ckpt")
    assert model.model.covering_radius.isnan()
    assert torch.equal(model.model.memory_bank, trained.model.model.memory_bank)


def test_coreset_radius(cells, tmp_path, trained):
    radius = 1.1 * float(trained.model.model.covering_radius)
    model = fit(make_model(coreset_radius=radius), cells, tmp_path)
    assert float(model.model.covering_radius) <= radius
    assert 20 < len(model.model.memory_bank) < len(trained.model.model.memory_bank)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_half_the_memory_for_embeddings(cells, tmp_path, trained, dtype):
    model = fit(make_model(embedding_dtype=dtype), cells, tmp_path)
    bank = model.model.memory_bank
    assert bank.dtype == torch.float32
    assert torch.equal(bank, bank.to(getattr(torch, dtype)).float())
    assert len(bank) == len(trained.model.model.memory_bank)
    assert auroc(model, cells, tmp_path) == pytest.approx(trained.metrics["image_AUROC"], abs=0.02)


def test_data_ten_times_the_budget(cells, tmp_path, trained, training_embeddings):
    model = fit(make_model(memory_budget=24 * 1024 * 152 * 4 * 1.25 / 10 / 2**30), cells, tmp_path)
    bank = model.model.memory_bank
    assert len(bank) == len(trained.model.model.memory_bank)
    reached = covering_radius(training_embeddings, bank)
    assert reached <= model.model.covering_radius
    assert reached < 1.3 * trained.model.model.covering_radius
    assert auroc(model, cells, tmp_path) > trained.metrics["image_AUROC"] - 0.03
    assert_origins(model.origins, bank, trained, 24)


COPIES = ["mirror", "flip", "half_turn", "quarter_turns", "small_turns", "brightness"]


@pytest.fixture(scope="module")
def three_cells(cells, tmp_path_factory) -> Path:
    """Three normal cells to train, and some test images."""
    root = tmp_path_factory.mktemp("three")
    for folder, count in {"train/good": 3, "test/good": 20, "test/defective": 2}.items():
        (root / folder).mkdir(parents=True)
        for image in sorted((cells / folder).iterdir())[:count]:
            (root / folder / image.name).hardlink_to(image)
    return root


def assert_copies(
    origins: Origins, bank: torch.Tensor, trained, names: list[str], atol: float = 1e-3, missing: int = 0
) -> None:
    """Each bank vector is an embedding of its image or of a copy, at the place that is its origin in the image.

    All kinds of copies have given vectors, but for ``missing`` of them.
    """
    scale, kinds = PixelScale.of(trained.model.pre_processor.transform), set()
    assert len(origins.patches) == len(bank)
    assert len(set(origins.images)) == len(origins.images) <= 3
    for number, path in enumerate(origins.images):
        mine = origins.patches[:, 0] == number
        vectors = bank[torch.from_numpy(mine)].float()
        originals = torch.from_numpy(origins.patches[mine, 1] * 32 + origins.patches[mine, 2])
        pixels = trained.model.pre_processor.transform(read_image(path, as_tensor=True)[None])
        found = torch.zeros(len(vectors), dtype=torch.bool)
        for change in [None, *changes_of(names)]:
            with torch.no_grad():
                copy = trained.model.model.embed(pixels if change is None else change.apply(pixels, scale)).reshape(1024, -1)
            places = torch.arange(1024) if change is None else change.origins(32, 32)
            nearest = torch.cdist(vectors, copy, compute_mode="donot_use_mm_for_euclid_dist").min(1)
            fits = (nearest.values < atol * 152**0.5) & (places[nearest.indices] == originals)
            found |= fits
            kinds |= {change} if fits.any() else set()
        assert found.all()
    assert len(kinds) >= 1 + len(changes_of(names)) - missing


def test_copies_of_three_images(three_cells, tmp_path, trained):
    model = fit(make_model(augmentations=COPIES), three_cells, tmp_path / "all")
    copies = len(changes_of(COPIES))
    assert copies == 9
    assert len(model.model.memory_bank) == 3 * 1024 * (1 + copies) * 2 // 100
    assert_copies(model.origins, model.model.memory_bank, trained, COPIES)
    plain = fit(make_model(), three_cells, tmp_path / "none")
    assert len(plain.model.memory_bank) == 3 * 1024 * 2 // 100
    # no copy is validated, and none is held out
    assert len(model.held_out) == len(plain.held_out) == 20


def test_checkpoint_keeps_the_names_of_copies(three_cells, tmp_path, test_images):
    model, engine = make_model(augmentations=("mirror",), coreset_sampling_ratio=1), make_engine(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(three_cells))
    loaded = FaissPatchcore.load_from_checkpoint(engine.best_model_path)
    assert loaded.augmentations == loaded.hparams["augmentations"] == ["mirror"]
    assert len(loaded.model.memory_bank) == 3 * 1024 * 2
    runtime = PatchcoreRuntime.load(export_bundle(loaded.eval(), tmp_path / "bundle", index="flat", thumbnails=True))
    found = {(one.nearest.image, one.nearest.row, one.nearest.column) for one in runtime.explain(test_images[-1])[1]}
    assert {name for name, *_ in found} <= {f"good/{path.name}" for path in (three_cells / "train/good").iterdir()}
    assert all(0 <= row < 32 and 0 <= column < 32 for _, row, column in found)


def test_copies_of_an_image_that_is_not_square(three_cells, tmp_path):
    """A quarter turn swaps height and width."""
    model = fit(make_model(augmentations=["quarter_turns"], image_size=[128, 256]), three_cells, tmp_path)
    assert len(model.model.memory_bank) == 3 * 16 * 32 * 3 * 2 // 100
    _, rows, columns = model.origins.patches.T
    assert rows.max() < 16 <= columns.max() < 32


def test_copies_in_half_the_memory(three_cells, tmp_path, trained):
    model = fit(make_model(augmentations=COPIES, embedding_dtype="float16"), three_cells, tmp_path)
    bank = model.model.memory_bank
    assert torch.equal(bank, bank.half().float())
    assert_copies(model.origins, bank, trained, COPIES, atol=0.03)


def test_copies_within_a_budget(three_cells, tmp_path, trained, caplog):
    """The budget is for the embeddings of all copies: they are planned for, and streamed."""
    budget = 30 * 1024 * 152 * 4 * 1.25 / 5 / 2**30
    with caplog.at_level("INFO", "patchcore_plugin"):
        model = fit(make_model(augmentations=COPIES, memory_budget=budget), three_cells, tmp_path)
    assert "Reduced" in caplog.text
    assert len(model.model.memory_bank) == 30 * 1024 * 2 // 100
    # a darker copy is close to its image: among streamed picks, one vector or none of 614 is of it, as the CPU rounds
    assert_copies(model.origins, model.model.memory_bank, trained, COPIES, missing=2)


@pytest.mark.slow  # its small twins: test_two_processes_end_with_the_bank_of_one, and the copies of one process
def test_two_processes_with_copies(three_cells, tmp_path, trained):
    (one,) = train_by(1, three_cells, tmp_path / "one", {"augmentations": ["mirror", "small_turns"]})
    first, second = train_by(2, three_cells, tmp_path / "two", {"augmentations": ["mirror", "small_turns"]})
    assert torch.equal(first["bank"], second["bank"])
    assert len(first["bank"]) == len(one["bank"]) == 3 * 1024 * 4 * 2 // 100
    assert first["radius"] == pytest.approx(one["radius"], rel=1e-4)
    for found in (one, first, second):
        patches, images = found["origins"]
        assert_copies(Origins(patches.numpy(), images), found["bank"], trained, ["mirror", "small_turns"])


def test_features_too_large_for_float16(cells, tmp_path):
    model = make_model(embedding_dtype="float16")
    with torch.no_grad():
        for module in model.model.feature_extractor.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.mul_(1e5)
    with pytest.raises(ValueError, match="too large for float16: use 'bfloat16' or 'float32' for embedding_dtype"):
        fit(model, cells, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads peak memory from Linux")
def test_peak_memory_of_a_fit(tmp_path):
    """A process that collects embeddings and picks 1 % of them takes 1.25 times their matrix at most, the bank included."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(200, 152)).astype(np.float32) * 2
    rows, part = 600_000, 6000
    with (tmp_path / "rows").open("wb") as file:
        for _ in range(rows // part):
            (centers[rng.integers(0, 200, part)] + rng.normal(size=(part, 152)).astype(np.float32)).tofile(file)
    benchmark = Path(__file__).parents[1] / "benchmarks/coreset_memory.py"
    job = json.dumps(["fit", "ours", str(tmp_path / "rows"), rows, rows // 100, "float32"])
    done = subprocess.run([sys.executable, benchmark, job], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT"))
    assert rows * 152 * 4 < found["peak"] < 1.25 * rows * 152 * 4


def test_budget_far_too_small(cells, tmp_path):
    with pytest.raises(ValueError, match="Raise memory_budget to at least"):
        fit(make_model(memory_budget=1e-6), cells, tmp_path)


SCRIPT = """
import os, sys, torch
from helpers.training import folder_datamodule, make_engine, make_model
from patchcore_plugin import ConformalPostProcessor
if __name__ == "__main__":
    cells, folder, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
    model = make_model(post_processor=ConformalPostProcessor(0.05), **eval(sys.argv[4]))
    engine = make_engine(folder, devices=devices, strategy="ddp" if devices > 1 else "auto")
    data = folder_datamodule(cells, train_batch_size=4)
    engine.fit(model, datamodule=data)
    metrics = engine.test(model, datamodule=data)[0]
    found = {"bank": model.model.memory_bank, "radius": float(model.model.covering_radius), "metrics": metrics}
    found["banks"] = [member.memory_bank for member in model.model.members]
    found["weights"] = list(map(float, model.model.weights))
    found["calibration"] = model.post_processor.calibration
    found["origins"] = torch.from_numpy(model.origins.patches), model.origins.images
    found["trainable"] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    torch.save(found, f"{folder}/{os.environ.get('LOCAL_RANK', 0)}.pt")
"""


def train_by(devices: int, cells: Path, folder: Path, arguments: dict | None = None) -> list[dict]:
    """What each process of a training ends with."""
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT", "NODE_RANK"):
        environment.pop(name, None)
    command = [sys.executable, "script.py", str(cells), str(folder), str(devices), repr(arguments or {})]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(devices)]


@pytest.fixture(scope="module")
def odd_cells(cells, tmp_path_factory) -> Path:
    """The cells without one of the training images: two processes cannot share them evenly."""
    root = tmp_path_factory.mktemp("odd")
    for image in (cells / "train/good").iterdir():
        (root / "train/good").mkdir(parents=True, exist_ok=True)
        (root / "train/good" / image.name).hardlink_to(image)
    next((root / "train/good").iterdir()).unlink()
    (root / "test").symlink_to(cells / "test", target_is_directory=True)
    return root


def test_two_processes_end_with_the_bank_of_one(odd_cells, tmp_path, trained):
    (one,) = train_by(1, odd_cells, tmp_path / "one")
    first, second = train_by(2, odd_cells, tmp_path / "two")
    assert torch.equal(first["bank"], second["bank"])
    # 23 images: the sampler repeats one for the second process, and it must not count
    assert len(first["bank"]) == 23 * 1024 * 2 // 100
    # An image's embedding depends on its batch and the number of threads in the last digits.
    np.testing.assert_allclose(first["bank"], one["bank"], atol=1e-3)
    assert first["radius"] == pytest.approx(one["radius"], rel=1e-5)
    assert first["metrics"] == pytest.approx(second["metrics"])
    assert torch.equal(first["calibration"], second["calibration"])
    np.testing.assert_allclose(first["calibration"], one["calibration"], rtol=1e-3)
    assert len(first["calibration"]) == 52
    assert first["metrics"]["image_AUROC"] == pytest.approx(one["metrics"]["image_AUROC"], abs=0.02)
    assert first["trainable"] == []
    for found in (one, first, second):
        patches, images = found["origins"]
        assert_origins(Origins(patches.numpy(), images), found["bank"], trained, 23)


@pytest.fixture(scope="module")
def dirty_cells(cells, tmp_path_factory) -> tuple[Path, set[str]]:
    """The cells with three defective ones among those to learn from, and the names of the three."""
    root = tmp_path_factory.mktemp("dirty")
    defective = sorted((cells / "test/defective").iterdir())[::20]
    (root / "train/good").mkdir(parents=True)
    for image in [*(cells / "train/good").iterdir(), *defective]:
        (root / "train/good" / image.name).hardlink_to(image)
    (root / "test").symlink_to(cells / "test", target_is_directory=True)
    return root, {image.name for image in defective}


def share_of(images: set[str], origins: Origins) -> float:
    """Share of the bank's vectors that come from some images."""
    names = np.array([Path(path).name for path in origins.images])[origins.patches[:, 0]]
    return np.isin(names, list(images)).mean()


@pytest.fixture(scope="module")
def dirty(dirty_cells, trained, tmp_path_factory) -> FaissPatchcore:
    """A model that learned from the dirty cells without outlier rejection; its bank is full of them."""
    model = fit(make_model(), dirty_cells[0], tmp_path_factory.mktemp("dirty-results"))
    assert len(model.model.memory_bank) == 27 * 1024 * 2 // 100
    assert share_of(dirty_cells[1], model.origins) > 1.5 * 3 / 27
    return model


@pytest.mark.parametrize(
    "arguments",
    [{}, {"embedding_dtype": "float16"}, {"memory_budget": 27 * 1024 * 152 * 4 * 1.25 / 6 / 2**30}],
    ids=["exact", "float16", "streamed"],
)
def test_outliers_are_left_out(dirty, dirty_cells, trained, tmp_path, caplog, arguments):
    root, planted = dirty_cells
    with caplog.at_level(logging.INFO):
        model = fit(make_model(outlier_rejection=2, **arguments), root, tmp_path)
    before, bank = dirty.model.memory_bank, model.model.memory_bank
    assert 0.8 * len(before) < len(bank) < len(before)
    assert f"{len(before) - len(bank)} of them are left out" in caplog.text
    assert share_of(planted, model.origins) < 0.88 * share_of(planted, dirty.origins)
    if "embedding_dtype" not in arguments:  # rounded vectors are no embeddings
        assert_origins(model.origins, bank, trained, 27)
    if not arguments:  # most are of the three among 27 images; the others stay, in the order of picking
        counts = [share_of(planted, found.origins) * len(found.model.memory_bank) for found in (dirty, model)]
        assert counts[0] - counts[1] > 0.6 * (len(before) - len(bank))
        stay = (bank[:, None] == before).all(2).nonzero()[:, 1]
        assert len(stay) == len(bank)
        assert (stay.diff() > 0).all()


@pytest.mark.slow  # its small twin is unit/test_outliers.py::test_two_processes_find_what_one_finds
def test_outliers_by_two_processes(dirty_cells, tmp_path):
    root, _ = dirty_cells
    (one,) = train_by(1, root, tmp_path / "one", {"outlier_rejection": 2})
    first, second = train_by(2, root, tmp_path / "two", {"outlier_rejection": 2})
    assert torch.equal(first["bank"], second["bank"])
    assert 450 < len(one["bank"]) < 27 * 1024 * 2 // 100
    assert abs(len(first["bank"]) - len(one["bank"])) <= 3  # an image's embedding depends on its batch in the last digits


@pytest.mark.slow
def test_a_process_without_images_ends_with_the_same_bank(odd_cells, tmp_path):
    """Its small twin is test_two_processes_end_with_the_bank_of_one, and for the arithmetic unit/test_shards.py."""
    good = tmp_path / "cells/train/good"
    good.mkdir(parents=True)
    image = next((odd_cells / "train/good").iterdir())
    (good / image.name).hardlink_to(image)
    (tmp_path / "cells/test").symlink_to(odd_cells / "test", target_is_directory=True)
    first, second = train_by(2, tmp_path / "cells", tmp_path / "two")
    assert torch.equal(first["bank"], second["bank"])
    assert len(first["bank"]) == 1024 * 2 // 100


@pytest.mark.slow
def test_ensemble_by_two_processes(odd_cells, tmp_path):
    """Its small twin is test_two_processes_end_with_the_bank_of_one: each member's coreset is picked as a single model's."""
    arguments = {"ensemble": [{"backbone": "efficientnet_lite1"}]}
    (one,) = train_by(1, odd_cells, tmp_path / "one", arguments)
    first, second = train_by(2, odd_cells, tmp_path / "two", arguments)
    for found in (first, second):
        for bank, expected in zip(found["banks"], one["banks"], strict=True):
            np.testing.assert_allclose(bank, expected, atol=1e-3)
        assert found["weights"] == pytest.approx(one["weights"], rel=1e-4)
        np.testing.assert_allclose(found["calibration"], one["calibration"], rtol=1e-3)
        assert [len(patches) for patches in (found["origins"][0], one["origins"][0])] == [sum(map(len, one["banks"]))] * 2


@pytest.mark.slow
def test_two_processes_within_a_budget(odd_cells, tmp_path, trained):
    """Its small twins are test_data_ten_times_the_budget and, for the arithmetic, unit/test_shards.py."""
    first, second = train_by(2, odd_cells, tmp_path / "two", {"memory_budget": 0.003})
    assert torch.equal(first["bank"], second["bank"])
    assert len(first["bank"]) == 23 * 1024 * 2 // 100
    assert first["metrics"]["image_AUROC"] > 0.85
    patches, images = second["origins"]
    assert_origins(Origins(patches.numpy(), images), second["bank"], trained, 23)
