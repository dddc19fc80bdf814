"""The command line, run as a user runs it: the stock ``anomalib``, and ours."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from helpers.bundles import change_manifest
from helpers.training import LAYERS, ROOT
from PIL import Image

from patchcore_plugin import demo
from patchcore_plugin.bundle import RegionRule, read_manifest
from patchcore_plugin.cli import main

SCRIPTS = Path(sys.executable).parent
CONFIGS = files("patchcore_plugin.configs")


def run(*arguments, cwd=None, check=True) -> subprocess.CompletedProcess:
    """Run a console script in a process of its own."""
    command = [str(SCRIPTS / str(arguments[0])), *map(str, arguments[1:])]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, check=False)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def call(*arguments) -> Result:
    """Run ``patchcore`` in this process, which has imported torch already."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def words(text: str) -> str:
    """A text without line breaks and frames."""
    return " ".join(text.replace("│", " ").split())


def auroc(output: str) -> float:
    return float(re.search(r"image_AUROC\s*│\s*([\d.]+)", output)[1])


# Training, by anomalib.


@pytest.mark.slow
def test_stock_anomalib_trains_config(elpv, tmp_path):
    """Image AUROC with the stock executable, on all of ELPV's monocrystalline cells."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "elpv").symlink_to(elpv)
    result = run("anomalib", "train", "--config", CONFIGS / "elpv.yaml", cwd=tmp_path)
    assert auroc(result.stdout) >= 0.958
    assert list(tmp_path.glob("results/FaissPatchcore/elpv/*/weights/lightning/model.ckpt"))


@pytest.fixture(scope="module")
def few_cells(cells, tmp_path_factory) -> Path:
    """Every third test image, as these trainings are for the command line."""
    root = tmp_path_factory.mktemp("few cells")
    shutil.copytree(cells / "train", root / "train")
    for kind in ("good", "defective"):
        (root / "test" / kind).mkdir(parents=True)
        for image in sorted((cells / "test" / kind).iterdir())[::3]:
            shutil.copy(image, root / "test" / kind)
    return root


def test_stock_anomalib_needs_no_registration(few_cells, tmp_path):
    """The small twin: one line of the config, ``class_path: patchcore_plugin.FaissPatchcore``, is enough."""
    result = run("anomalib", "train", "--config", CONFIGS / "elpv.yaml", "--data.init_args.root", few_cells, cwd=tmp_path)
    assert auroc(result.stdout) > 0.9


def test_train_by_short_name_and_export(few_cells, tmp_path):
    """``patchcore train --model FaissPatchcore``, then export, as in the README."""
    result = run(
        "patchcore", "train", "--model", "FaissPatchcore", "--model.backbone", "efficientnet_lite0",
        "--model.layers", f"[{','.join(LAYERS)}]", "--model.coreset_sampling_ratio", "0.02", "--model.visualizer", "false",
        "--data", "Folder", "--data.name", "cells", "--data.root", few_cells, "--data.normal_dir", "train/good",
        "--data.normal_test_dir", "test/good", "--data.abnormal_dir", "test/defective", "--data.num_workers", "0",
        "--data.val_split_mode", "same_as_test",
        cwd=tmp_path,
    )  # fmt: skip
    assert auroc(result.stdout) > 0.9
    log = words(result.stdout + result.stderr)
    assert log.count("Memory bank: 491 of 24576 patch embeddings") == log.count("The memory bank is kept in") == 1
    (checkpoint,) = tmp_path.glob("results/FaissPatchcore/cells/v0/weights/lightning/model.ckpt")
    result = run("patchcore", "export", checkpoint, "out/bundle", cwd=tmp_path)
    assert "Bundle: out/bundle" in result.stdout
    assert read_manifest(tmp_path / "out/bundle").name == "bundle"


def contains(whole, part) -> bool:
    """Whether every value of nested dictionaries and lists is at the same place in others."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(contains(whole.get(name), value) for name, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return whole == part


ANOMALIB = """
import contextlib, io, json, sys
from anomalib.cli.cli import AnomalibCLI

configs, commands = json.loads(sys.argv[1])

def printed(config):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        AnomalibCLI(["fit", "--config", config, "--print_config"])
    return output.getvalue()

stock = [printed(config) for config in configs]

from click.testing import CliRunner
from patchcore_plugin.cli import main

def outcome(arguments):
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output, type(result.exception).__name__

print("\\n" + json.dumps([stock, [outcome(arguments) for arguments in commands]]))
"""

OF_EVALUATE = "evaluate.yaml", "reproduce_mvtec_ad.yaml"
FULL_CONFIGS = sorted(str(file) for file in CONFIGS.iterdir() if file.suffix == ".yaml" and file.name not in OF_EVALUATE)
SHORT = ["fit", "--config", "short.yaml", "--data.init_args.root", "cells"]
WRONG_ARGUMENTS = {
    "Error: coreset_sampling_ratio must be a number in (0, 1], got 2.0.": ["--model.init_args.coreset_sampling_ratio", "2"],
    "has no layer 'nowhere'. Its feature layers: blocks.0": ["--model.init_args.layers", "[nowhere]"],
    "Option 'surprise' is not accepted": ["--model.init_args.surprise", "1"],
    "absent/train/good": ["--data.init_args.root", "absent"],
    "All split ratios must be between 0 and 1": [
        "--data.init_args.val_split_mode", "from_train", "--data.init_args.val_split_ratio", "3",
    ],
    "No supported gpu backend found": ["--trainer.accelerator", "gpu"],
}  # fmt: skip


@pytest.fixture(scope="module")
def said(cells, tmp_path_factory) -> tuple[list, list]:
    """What stock anomalib prints of our configs, and our commands then say: one process, as importing it takes long."""
    folder = tmp_path_factory.mktemp("said")
    (folder / "cells").symlink_to(cells)
    config = (CONFIGS / "elpv.yaml").read_text()
    (folder / "short.yaml").write_text(config.replace("patchcore_plugin.FaissPatchcore", "FaissPatchcore"))
    wrong = [[*SHORT, *arguments] for arguments in WRONG_ARGUMENTS.values()]
    asked = FULL_CONFIGS, [["train", "--help"], [*SHORT, "--print_config"], *wrong]
    command = [sys.executable, "-c", ANOMALIB, json.dumps(asked)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_configs_are_understood(said):
    """By stock anomalib, which takes over each value and fills in those that a config leaves out."""
    assert len(FULL_CONFIGS) == 7
    for path, printed in zip(FULL_CONFIGS, said[0], strict=True):
        found, given = yaml.safe_load(printed), yaml.safe_load(Path(path).read_text())
        assert contains(found, given), path
        assert {"random_state", "coreset_projection"} <= set(found["model"]["init_args"])


def test_help_of_a_training_is_ours_then_anomalibs(said):
    code, output, _ = said[1][0]
    assert code == 0
    ours, _, theirs = output.partition('FaissPatchcore)"')
    assert "patchcore train --config configs/folder.yaml" in ours
    assert "--model" in theirs, output


def test_short_name_in_a_config(said):
    """A config may say ``class_path: FaissPatchcore`` where our command registers first."""
    code, output, _ = said[1][1]
    assert code == 0
    assert yaml.safe_load(output[output.index("seed_everything") :])["model"]["class_path"].endswith(".FaissPatchcore")


@pytest.mark.parametrize(("number", "message"), enumerate(WRONG_ARGUMENTS, 2))
def test_wrong_argument_of_a_training(said, number, message):
    """One sentence, without a traceback, whoever refuses it: our model, jsonargparse, anomalib or Lightning."""
    code, output, error = said[1][number]
    assert code in (1, 2)
    assert error == "SystemExit"
    assert message in words(output)
    assert len(output[output.rindex("rror:") :]) < 1000


# Bundles.


def test_choices_of_an_export(trained, tmp_path):
    """What was measured is printed and kept, and ``info`` prints it again."""
    exported = call("export", trained.checkpoint, tmp_path / "auto")
    assert exported.exit_code == 0, exported.output
    manifest = read_manifest(tmp_path / "auto")
    (taken,) = (row for row in table_rows(exported.stdout) if row[-1] == "taken")
    assert taken[0] == manifest.index.kind
    assert taken in table_rows(call("info", tmp_path / "auto").stdout)


def test_export_over_a_bundle(trained, bundle_copy, cells):
    """It takes --overwrite, and what was asked for is taken."""
    before = {file.name: file.read_bytes() for file in bundle_copy.iterdir()}
    refused = call("export", trained.checkpoint, bundle_copy)
    assert refused.exit_code == 1
    assert "exists already. Choose another folder, or pass --overwrite" in words(refused.stderr)
    assert {file.name: file.read_bytes() for file in bundle_copy.iterdir()} == before

    for wrong in (["--min-area", "-1"], ["--mm-per-pixel", "nan"], ["--close-gaps", "99999"]):
        refused = call("export", trained.checkpoint, bundle_copy, "--overwrite", *wrong)
        assert refused.exit_code == 1
        assert f"{wrong[0][2:].replace('-', '_')} must be" in words(refused.stderr)

    options = ["--index", "ivf", "--storage", "float16", "--precision", "auto", "--images", cells / "test/good"]
    options += ["--min-area", "0.5", "--mm-per-pixel", "0.1", "--close-gaps", "4"]
    exported = call("export", trained.checkpoint, bundle_copy, *options, "--overwrite", "--name", "cells v2")
    assert exported.exit_code == 0, exported.output
    manifest = read_manifest(bundle_copy)
    assert manifest.name == "cells v2"
    assert (manifest.index.kind, manifest.index.storage) == ("ivf", "float16")
    assert manifest.regions == RegionRule(min_area=0.5, mm_per_pixel=0.1, close_gaps=4)
    assert "pixels of 0.1 mm; those below 0.5 mm² are not listed; gaps of up to 4 pixels are closed" in words(
        call("info", bundle_copy).stdout
    )
    assert {"f32", "int8"} <= {trial.precision for trial in manifest.precision_trials}
    assert [row[0] for row in table_rows(exported.stdout) if row[-1] == "taken"] == ["ivf", manifest.precision]
    assert {file.name for file in bundle_copy.iterdir()} == {"manifest.json", *manifest.files}


def test_export_after_a_training_that_failed(tmp_path):
    """The link ``latest`` leads to a training without a checkpoint; the error names the newest that there is."""
    name = Path("weights", "lightning", "model.ckpt")
    for number in (0, 1):
        (tmp_path / f"v{number}" / name).parent.mkdir(parents=True)
    (tmp_path / "v0" / name).write_bytes(b"a checkpoint")
    result = call("export", tmp_path / "latest" / name, tmp_path / "bundle")
    assert result.exit_code == 1
    assert f"has written none; the newest that has is {tmp_path / 'v0' / name}" in result.stderr.replace("\n", "")


@pytest.mark.parametrize("content", [[1], torch.zeros(3), {}, {"hyper_parameters": 5, "pytorch-lightning_version": "x"}])
def test_export_of_anything_else(tmp_path, content):
    torch.save(content, tmp_path / "junk.ckpt")
    result = call("export", tmp_path / "junk.ckpt", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "junk.ckpt is not a checkpoint of FaissPatchcore" in words(result.stderr)


def test_export_to_a_full_disk(trained, tmp_path):
    """A file that may not grow further stands for it: a sentence that names the file, and nothing is left."""
    resource = pytest.importorskip("resource", reason="this system limits no file sizes")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        result = call("export", trained.checkpoint, tmp_path / "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1
    assert "features.xml cannot be written" in words(result.stderr)
    assert not list(tmp_path.iterdir())


def table_rows(output: str) -> list[list[str]]:
    """Cells of the tables in an output, row by row."""
    rows = (re.split("[│┃]", line)[1:-1] for line in output.splitlines())
    return [[cell.strip() for cell in row] for row in rows if row]


def test_benchmark(bundle, cells):
    result = call("benchmark", bundle, cells / "test/good", "--limit", "5", "--threads", "1")
    assert result.exit_code == 0, result.output
    times = {stage: (float(median), float(high)) for stage, median, high in table_rows(result.stdout)[1:]}
    assert list(times) == ["decode", "preprocess", "backbone", "search", "map", "all"]
    assert all(median <= high for median, high in times.values())
    assert max(median for stage, (median, _) in times.items() if stage != "all") < times["all"][0]
    rates = {mode: int(rate) for rate, mode in re.findall(r"(\d+) images/s in mode (\w+)", result.stdout)}
    assert rates.keys() == {"latency", "throughput"}
    assert min(rates.values()) > 0


@pytest.fixture
def line(test_images, tmp_path) -> Path:
    """A folder of images of several kinds, one of them broken."""
    images = tmp_path / "line 1"
    (images / "sub").mkdir(parents=True)
    shutil.copy(test_images[0], images / "a.png")
    Image.open(test_images[-1]).convert("RGB").resize((400, 200)).save(images / "sub" / "b.jpg")
    (images / "broken.png").write_bytes(b"no image")
    return images


@pytest.mark.parametrize("command", [["predict"], ["watch", "--once", "--poll", "0.05"]], ids=["predict", "watch"])
def test_exit_codes_that_say_what_was_found(bundle_copy, runtime, test_images, tmp_path, command):
    (tmp_path / "line").mkdir()
    scores = {answer.score: path for path, answer in zip(test_images, runtime.predict(test_images), strict=True)}
    shutil.copy(scores[max(scores)], tmp_path / "line")

    def code(*options, **image):
        change_manifest(bundle_copy, format_version=8, image={"threshold": 1e6, **image})
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        result = call(*command, bundle_copy, tmp_path / "line", "--output", tmp_path / "out", "--no-heatmaps", *options)
        return result.exit_code, words(result.stderr)

    assert code(threshold=1.0) == (0, "")
    assert code("--fail-on", "anomalous", threshold=1.0) == (3, "")
    assert code("--fail-on", "anomalous", review=1.0) == (0, "")
    assert code("--fail-on", "review", review=1.0) == (3, "")
    assert code("--fail-on", "review") == (0, "")
    status, said = code("--fail-on", "anomalous", threshold=None)
    assert status == 1
    assert "--fail-on anomalous: the model has no threshold, so 1 images have a score and no verdict" in said
    (tmp_path / "line" / "broken.png").write_bytes(b"no image")
    patience = ["--patience", "0.1"] * ("watch" in command)
    assert code("--fail-on", "anomalous", *patience, threshold=1.0)[0] == 1, "an unreadable image comes first"


def test_predict(bundle, runtime, line, tmp_path):
    result = run("patchcore", "predict", bundle, line, "--output", "answers", cwd=tmp_path, check=False)
    assert result.returncode == 1, "an unreadable image must not pass unseen"
    assert "3 images: 2 anomalous, 1 unreadable. Results: answers/results.csv" in words(result.stdout)
    assert " is damaged" in words(result.stderr), "which one, and why"
    rows = list(csv.DictReader((tmp_path / "answers" / "results.csv").open()))
    assert [row["image"] for row in rows] == ["a.png", "broken.png", "sub/b.jpg"]
    assert "cannot be read as an image" in rows[1].pop("error")
    assert set(rows[1].values()) == {"broken.png", ""}
    for row, answer in zip(rows[::2], runtime.predict([line / "a.png", line / "sub" / "b.jpg"]), strict=True):
        assert float(row["score"]) == pytest.approx(answer.score, rel=1e-6)
        assert float(row["normalized_score"]) == pytest.approx(answer.normalized_score, rel=1e-5)
        assert (float(row["threshold"]), row["verdict"]) == (answer.threshold, answer.verdict)
        assert float(row["ratio"]) == pytest.approx(answer.score / answer.threshold, rel=1e-6)
        assert (row["p_value"], row["error"]) == ("", "")
        largest = max((region.area for region in answer.regions), default="")
        assert (row["regions"], row["small_regions"], row["largest_area"]) == (str(len(answer.regions)), "0", str(largest))
    for name, size in {"a.png.png": (300, 300), "sub/b.jpg.png": (400, 200)}.items():
        assert Image.open(tmp_path / "answers" / "heatmaps" / name).size == size
    assert len(list((tmp_path / "answers" / "heatmaps").rglob("*.*"))) == 2


def results(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of the table that ``predict`` wrote into a folder, by their images."""
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("output", ["predictions", ".", "sub", "heatmaps"])
def test_predict_into_its_own_folder(bundle, line, monkeypatch, caplog, output):
    """Every part is scored, those beside the results too; the heatmaps of this run and of the earlier ones are not."""
    (line / "broken.png").unlink()
    monkeypatch.chdir(line)
    for folder in (output, output, "elsewhere"):
        result = call("predict", bundle, ".", "--output", folder)
        assert result.exit_code == 0, result.output
        assert results(line / folder).keys() == {"a.png", "sub/b.jpg"}
        assert Image.open(line / folder / "heatmaps/sub/b.jpg.png").size == (400, 200)
    assert "2 pictures that patchcore drew are left out" in caplog.messages[-1]


def test_predict_replaces_nothing_else(bundle, line, tmp_path):
    """No image, no table of another program, and no part of the bundle."""
    part = line / "heatmaps" / "a.png.png"
    part.parent.mkdir()
    shutil.copy(line / "a.png", part)
    assert call("predict", bundle, line, "--output", line).exit_code == 1
    rows = results(line)
    assert rows["a.png"]["error"] == f"Its heatmap would replace the image {part}."
    assert float(rows["a.png"]["score"]) == float(rows["heatmaps/a.png.png"]["score"])
    assert part.read_bytes() == (line / "a.png").read_bytes()

    (tmp_path / "results.csv").write_text("model,auroc\n")
    refused = call("predict", bundle, line, "--output", tmp_path)
    assert refused.exit_code == 1
    assert "results.csv is there already, and was not written by patchcore predict" in words(refused.stderr)
    assert (tmp_path / "results.csv").read_text() == "model,auroc\n"
    for command in (["predict", bundle, line], ["explain", bundle, line / "a.png"]):
        refused = call(*command, "--output", bundle / "out")
        assert f"out lies in {bundle}" in words(refused.stderr)
    assert not (bundle / "out").exists()


def test_predict_of_odd_names(bundle, line, tmp_path):
    """Each is a row: a name that is no UTF-8, one too long for its heatmap, formulas, and one whose heatmap has no place."""
    byte, long = os.fsdecode(b"caf\xe9 [red].png"), f"{'x' * 251}.png"
    folder = line / "=cmd"
    folder.mkdir()
    for name in (byte, long, "+1.png", "'1.png", folder / "c.png"):
        shutil.copy(line / "a.png", line / name)
    (line / folder / "-broken.png").write_bytes(b"no image")
    (tmp_path / "out/heatmaps").mkdir(parents=True)
    (tmp_path / "out/heatmaps/sub").write_bytes(b"no folder")
    result = call("predict", bundle, line, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(r"9 images: \d anomalous, 2 unreadable, 2 without a heatmap", words(result.stdout))
    rows = results(tmp_path / "out")
    errors = {name: row["error"] for name, row in rows.items() if row["error"]}
    assert errors.keys() == {"broken.png", "'=cmd/-broken.png", long, "sub/b.jpg"}
    assert "File name too long" in errors[long]
    assert "heatmaps/sub" in errors["sub/b.jpg"]
    sound = {r"caf\udce9 [red].png", "'+1.png", "''1.png", "'=cmd/c.png", long}
    assert sound < rows.keys()
    assert {rows[name]["score"] for name in sound} == {rows["a.png"]["score"]}
    assert Image.open(tmp_path / "out/heatmaps" / f"{byte}.png").size == (300, 300)

    shown = run("patchcore", "validate", bundle, "--images", line, check=False)
    assert r"│ caf\udce9 [red].png" in shown.stdout
    shown = call("validate", bundle, "--images", line, "--json")
    assert str(line / byte) in {row["image"] for row in json.loads(shown.stdout)["images"]}


def test_predict_onto_a_full_disk(bundle, line, tmp_path):
    """It is no fault of one image: the command ends, names the file, and keeps what the earlier run wrote."""
    (line / "broken.png").unlink()
    assert call("predict", bundle, line, "--output", tmp_path).exit_code == 0
    before = (tmp_path / "results.csv").read_bytes()
    for full in ("heatmaps/sub/b.jpg.png", "results.csv.part"):
        (tmp_path / full).unlink(missing_ok=True)
        (tmp_path / full).symlink_to("/dev/full")
        result = call("predict", bundle, line, "--output", tmp_path)
        assert result.exit_code == 1
        assert words(result.stderr) == f"Error: {tmp_path / full}: No space left on device"
        assert (tmp_path / "results.csv").read_bytes() == before
        if full.startswith("heatmaps"):
            assert (tmp_path / "results.csv.part").read_bytes() == before[: before.index(b"sub/b.jpg")]


def test_predict_decodes_each_image_once(bundle, line, tmp_path, monkeypatch):
    """Once, heatmap and verdict together; without heatmaps there is no more than the table."""
    opened, original = Counter(), Image.open

    def count(source, *arguments, **options):
        opened[Path(source).name] += 1
        return original(source, *arguments, **options)

    monkeypatch.setattr(Image, "open", count)
    assert call("predict", bundle, line, "--output", tmp_path / "answers").exit_code == 1
    assert opened == {"a.png": 1, "broken.png": 1, "b.jpg": 1}
    assert call("predict", bundle, line, "--output", tmp_path / "plain", "--no-heatmaps").exit_code == 1
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["results.csv"]


# Help and errors.


def test_help():
    for command, texts in {
        "--help": ["train", "export", "predict", "pack", "demo", "--debug"],
        "predict": ["BUNDLE", "FOLDER", "results.csv"],
        "export": ["CHECKPOINT", "--overwrite", "--index", "--precision", "--images", "--thumbnails"],
        "validate": ["BUNDLE", "--images", "--json", "exit code 1"],
        "explain": ["BUNDLE", "IMAGE", "--output"],
        "update": ["BUNDLE", "NEW_NORMALS", "--holdout N", "--test"],
        "benchmark": ["BUNDLE", "FOLDER", "--threads"],
        "tune": ["FOLDER", "--defects", "--overwrite", "weak evidence", "Exit code: 0"],
        "demo": ["--data-only", "Safe to run again"],
    }.items():
        output = words(call(command, "--help").stdout)
        assert [text for text in texts if text not in output] == []
    assert run("patchcore", "-h").stdout == call("--help").stdout.replace("Usage: main", "Usage: patchcore")
    assert re.search(r"patchcore, version \d", run("patchcore", "--version").stdout)


def test_export_offers_what_a_manifest_may_say():
    """Every index, storage and precision, and no other."""
    from typing import get_args

    from patchcore_plugin.bundle import IndexKind, Precision, Storage

    output = words(call("export", "--help").stdout)
    for option, kinds in {
        "index": ("auto", *get_args(IndexKind)),
        "storage": get_args(Storage),
        "precision": ("auto", *get_args(Precision)),
    }.items():
        assert f"--{option} [{'|'.join(kinds)}]" in output
        refused = call("export", __file__, "bundle", f"--{option}", "surprise")
        assert refused.exit_code == 2
        assert all(repr(kind) in refused.stderr for kind in kinds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent", "."], "no bundle folder absent"),
        (["predict", "{bundle}", "absent"], "no folder absent"),
        (["predict", "{bundle}", "{bundle}"], "holds no image"),
        (["explain", "{bundle}", "absent.png"], "absent.png: No such file or directory"),
        (["predict", "{bundle}", "{cells}", "--output", "{bundle}/manifest.json"], "manifest.json: File exists"),
        (["export", "absent.ckpt", "bundle"], "There is no file absent.ckpt."),
        (["export", str(ROOT / "tests/unit"), "bundle"], "unit is a folder: give the .ckpt file of a training."),
        (["export", "{bundle}/manifest.json", "out"], "cannot be read as a checkpoint"),
        (["pack", "absent"], "no bundle folder absent"),
        (["surprise"], "No such command"),
    ],
)
def test_errors_are_one_sentence(bundle, cells, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = call(*(part.format(bundle=bundle, cells=cells) for part in arguments))
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert message in words(result.stderr)
    assert not list(tmp_path.iterdir())


BROKEN = """
from patchcore_plugin.cli import main
from patchcore_plugin.errors import PatchcoreError

@main.command()
def broken():
    {statement}

main(prog_name="patchcore")
"""


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("raise PatchcoreError('The bundle is missing.')", "Error: The bundle is missing.\n"),
        ("open('absent/file')", "Error: absent/file: No such file or directory\n"),
        ("raise OSError('The disk is full.')", "Error: The disk is full.\n"),
        ("raise ValueError('a bug')", None),
        ("raise RuntimeError('a bug')", None),
        ("import patchcore_plugin.absent", None),
    ],
)
def test_bugs_keep_their_traceback(tmp_path, statement, sentence):
    """A user's error is a sentence; a bug is a traceback; with --debug every error is one."""
    command = [sys.executable, "-c", BROKEN.format(statement=statement)]
    for options in ([], ["--debug"]):
        result = subprocess.run([*command, *options, "broken"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        if sentence and not options:
            assert result.stderr == sentence
        else:
            assert "Traceback (most recent call last)" in result.stderr
            assert "in broken" in result.stderr


def test_reader_that_ends_early():
    """``patchcore info BUNDLE | head``: the command ends without a word about the pipe."""
    command = [Path(sys.executable).parent / "patchcore", "info", ROOT / "tests/data/old/bundle-hnsw"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_missing_extra(tmp_path):
    """A package that is not installed is named together with the extra that brings it."""
    code = "import sys; sys.modules['bentoml'] = None\nfrom patchcore_plugin.cli import main; main(prog_name='patchcore')"
    result = subprocess.run(
        [sys.executable, "-c", code, "pack", "bundle"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "pip install 'patchcore-plugin[serve]'" in words(result.stderr)
    assert "Traceback" not in result.stderr


# The demo.


def test_demo_lays_out_the_data_alone(tmp_path):
    output = run("patchcore", "demo", "--data-only", cwd=tmp_path).stdout
    counts = {folder: len(list((tmp_path / "datasets/elpv" / folder).iterdir())) for folder in ("train/good", "test/good")}
    assert counts == {"train/good": 411, "test/good": 177}
    assert len(list((tmp_path / "datasets/elpv/test/defective").iterdir())) == 313
    assert "411 images" in output
    assert run("patchcore", "demo", "--data-only", cwd=tmp_path).stdout == output


def test_demo_on_few_cells(few_cells, tmp_path, monkeypatch):
    """The small twin: every step of the demo, in this process, on a few cells."""
    copy = lambda folder: shutil.copytree(few_cells, folder) and {"train/good": 24}  # noqa: E731
    monkeypatch.setattr(demo, "lay_out", copy)
    folder = tmp_path / "demo [" / "red]"  # no markup of the terminal
    demo.run(folder)
    assert Image.open(folder / "figure.png").size[0] > 800
    assert read_manifest(folder / "bundle").name == "elpv"


@pytest.mark.slow
def test_demo_after_an_earlier_one(bundle, tmp_path):
    """The main job as a newcomer runs it, over an earlier run's files."""
    folder = tmp_path / "patchcore-demo"
    shutil.copytree(bundle, folder / "bundle")
    (folder / "figure.png").write_bytes(b"")
    earlier = folder / "results/FaissPatchcore/elpv/v0/weights/lightning/model.ckpt"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"")
    output = run("patchcore", "demo", cwd=tmp_path).stdout
    assert auroc(output) >= 0.955
    assert '"verdict": "normal"' in output
    assert '"verdict": "anomalous"' in output
    assert Image.open(folder / "figure.png").size[0] > 800
    assert str(Path("patchcore-demo", "figure.png")) in output
    assert read_manifest(folder / "bundle").name == "elpv"
    assert earlier.stat().st_size == 0
