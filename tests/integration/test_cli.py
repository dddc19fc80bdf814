"""The command line, run as a user runs it: the stock ``anomalib``, and ours."""

import csv
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from helpers.training import LAYERS
from PIL import Image

from patchcore_plugin.bundle import read_manifest

SCRIPTS = Path(sys.executable).parent


def run(*arguments, cwd=None, check=True) -> subprocess.CompletedProcess:
    command = [str(SCRIPTS / str(arguments[0])), *map(str, arguments[1:])]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, check=False)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def auroc(output: str) -> float:
    return float(re.search(r"image_AUROC\s*│\s*([\d.]+)", output)[1])


@pytest.mark.slow
def test_stock_anomalib_trains_config(elpv, tmp_path):
    """Image AUROC with the stock executable, on all of ELPV's monocrystalline cells; elpv.yaml's is that of the demo."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "elpv").symlink_to(elpv)
    result = run("anomalib", "train", "--config", files("patchcore_plugin.configs") / "best.yaml", cwd=tmp_path)
    assert auroc(result.stdout) >= 0.958
    assert list(tmp_path.glob("results/FaissPatchcore/best/*/weights/lightning/model.ckpt"))


def test_stock_anomalib_needs_no_registration(cells, tmp_path):
    """The small twin: one line of the config, ``class_path: patchcore_plugin.FaissPatchcore``, is enough."""
    path = files("patchcore_plugin.configs") / "best.yaml"
    result = run("anomalib", "train", "--config", path, "--data.init_args.root", cells, cwd=tmp_path)
    assert auroc(result.stdout) > 0.9


def test_short_names_and_export(cells, tmp_path, test_images):
    """``patchcore train --model FaissPatchcore``, then export and predict, as in the README."""
    result = run(
        "patchcore", "train", "--model", "FaissPatchcore", "--model.backbone", "efficientnet_lite0",
        "--model.layers", f"[{','.join(LAYERS)}]", "--model.coreset_sampling_ratio", "0.02", "--model.visualizer", "false",
        "--data", "Folder", "--data.name", "cells", "--data.root", cells, "--data.normal_dir", "train/good",
        "--data.normal_test_dir", "test/good", "--data.abnormal_dir", "test/defective", "--data.num_workers", "0",
        "--data.val_split_mode", "same_as_test",
        cwd=tmp_path,
    )  # fmt: skip
    assert auroc(result.stdout) > 0.9
    (checkpoint,) = tmp_path.glob("results/FaissPatchcore/cells/v0/weights/lightning/model.ckpt")

    assert "Bundle: out/bundle" in run("patchcore", "export", checkpoint, "out/bundle", cwd=tmp_path).stdout
    again = run("patchcore", "export", checkpoint, "out/bundle", cwd=tmp_path, check=False)
    assert again.returncode == 1
    assert "exists already. Choose another folder, or pass --overwrite" in " ".join(again.stderr.split())
    run("patchcore", "export", checkpoint, "out/bundle", "--overwrite", "--name", "cells v2", cwd=tmp_path)

    images = tmp_path / "line 1"
    (images / "sub").mkdir(parents=True)
    shutil.copy(test_images[0], images / "a.png")
    Image.open(test_images[-1]).convert("RGB").resize((400, 200)).save(images / "sub" / "b.jpg")
    (images / "broken.png").write_bytes(b"no image")
    result = run("patchcore", "predict", "out/bundle", images, "--output", "answers", cwd=tmp_path, check=False)
    assert result.returncode == 1, "an unreadable image must not pass unseen"
    assert "3 images" in result.stdout
    assert "1 unreadable" in result.stdout
    rows = list(csv.DictReader((tmp_path / "answers" / "results.csv").open()))
    assert [row["image"] for row in rows] == ["a.png", "broken.png", "sub/b.jpg"]
    assert float(rows[0]["score"]) > float(rows[0]["threshold"])
    assert rows[0]["verdict"] == "anomalous"
    assert "cannot be read as an image" in rows[1]["error"]
    assert Image.open(tmp_path / "answers" / "heatmaps" / "a.png.png").size == (300, 300)
    assert Image.open(tmp_path / "answers" / "heatmaps" / "sub" / "b.jpg.png").size == (400, 200)
    (images / "broken.png").unlink()
    for _ in range(2):
        result = run("patchcore", "predict", "../out/bundle", ".", cwd=images)
        assert "2 images" in result.stdout, "the heatmaps of the first run are no images to score"
    shutil.rmtree(images / "predictions")
    run("patchcore", "predict", "out/bundle", images, "--output", "plain", "--no-heatmaps", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["results.csv"]


def test_choices_of_an_export(trained, tmp_path, cells):
    """What was measured is printed and kept; what was asked for is taken."""
    result = run("patchcore", "export", trained.checkpoint, "auto", cwd=tmp_path)
    assert "recall@1" in result.stdout
    assert "taken" in result.stdout
    manifest = read_manifest(tmp_path / "auto")
    assert [
        trial for trial in manifest.index.trials if (trial.index, trial.width) == (manifest.index.kind, manifest.index.width)
    ]
    options = ["--index", "ivf", "--storage", "float16", "--precision", "auto", "--images", cells / "test/good"]
    result = run("patchcore", "export", trained.checkpoint, "asked", *options, cwd=tmp_path)
    assert "rank correlation" in result.stdout
    manifest = read_manifest(tmp_path / "asked")
    assert (manifest.index.kind, manifest.index.storage) == ("ivf", "float16")
    assert {"f32", "int8"} <= {trial.precision for trial in manifest.precision_trials}
    assert {file.name for file in (tmp_path / "asked").iterdir()} == {"manifest.json", *manifest.files}
    result = run("patchcore", "benchmark", "asked", cells / "test/good", "--limit", "5", "--threads", "1", cwd=tmp_path)
    for word in ("decode", "preprocess", "backbone", "search", "map", "images/s in mode throughput"):
        assert word in result.stdout


def test_short_name_in_a_config(cells, tmp_path):
    """A config may say ``class_path: FaissPatchcore`` where our command registers first."""
    text = (files("patchcore_plugin.configs") / "elpv.yaml").read_text()
    (tmp_path / "short.yaml").write_text(text.replace("patchcore_plugin.FaissPatchcore", "FaissPatchcore"))
    run("patchcore", "fit", "--config", "short.yaml", "--data.init_args.root", cells, cwd=tmp_path)
    assert list(tmp_path.glob("results/FaissPatchcore/elpv/v0/weights/lightning/model.ckpt"))


@pytest.mark.parametrize("config", ["folder.yaml", "mvtec_ad.yaml", "visa.yaml", "elpv.yaml", "best.yaml"])
def test_configs_are_understood(config, tmp_path):
    result = run(
        "anomalib", "fit", "--config", files("patchcore_plugin.configs") / config, "--print_config", cwd=tmp_path
    )  # fmt: skip
    assert "patchcore_plugin" in result.stdout


def test_help():
    for arguments, words in {
        ("--help",): ["train", "export", "predict", "pack", "demo"],
        ("predict", "--help"): ["BUNDLE", "FOLDER", "results.csv"],
        ("export", "--help"): ["CHECKPOINT", "--overwrite", "--index", "--precision", "--images", "--thumbnails"],
        ("validate", "--help"): ["BUNDLE", "--images", "--json", "exit code 1"],
        ("explain", "--help"): ["BUNDLE", "IMAGE", "--output"],
        ("update", "--help"): ["BUNDLE", "NEW_NORMALS", "--holdout", "--test"],
        ("benchmark", "--help"): ["BUNDLE", "FOLDER", "--threads"],
        ("demo", "--help"): ["--data-only", "Safe to run again"],
        ("train", "--help"): ["--model", "--config"],
    }.items():
        output = run("patchcore", *arguments).stdout
        for word in words:
            assert word in output
    assert re.search(r"patchcore, version \d", run("patchcore", "--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent", "."], "no bundle folder absent"),
        (["predict", "{bundle}", "absent"], "no folder absent"),
        (["predict", "{bundle}", "{bundle}"], "holds no image"),
        (["export", "absent.ckpt", "bundle"], "does not exist"),
        (["export", "{bundle}/manifest.json", "out"], "not a checkpoint"),
        (["pack", "absent"], "no bundle folder absent"),
        (["surprise"], "No such command"),
    ],
)
def test_errors_are_one_sentence(bundle, tmp_path, arguments, message):
    result = run("patchcore", *(part.format(bundle=bundle) for part in arguments), cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr + result.stdout
    assert not list(tmp_path.iterdir())


def test_demo_lays_out_the_data_alone(tmp_path):
    output = run("patchcore", "demo", "--data-only", cwd=tmp_path).stdout
    counts = {folder: len(list((tmp_path / "datasets/elpv" / folder).iterdir())) for folder in ("train/good", "test/good")}
    assert counts == {"train/good": 411, "test/good": 177}
    assert len(list((tmp_path / "datasets/elpv/test/defective").iterdir())) == 313
    assert "411 images" in output
    assert run("patchcore", "demo", "--data-only", cwd=tmp_path).stdout == output


@pytest.mark.slow
def test_demo_after_an_earlier_one(bundle, tmp_path):
    """The main job as a newcomer runs it, over an earlier run's files; its small twins are the tests of its parts."""
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
