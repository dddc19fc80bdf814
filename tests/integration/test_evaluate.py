"""``patchcore evaluate``, run as a user runs it, on real cells with painted scratches."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.training import LAYERS
from PIL import Image, ImageDraw

from patchcore_plugin.evaluation.metrics import METRICS

PATCHCORE = Path(sys.executable).parent / "patchcore"
QUALITIES = [name for name, metric in METRICS.items() if not metric.is_cost]
HOSTILE = "<img src=x onerror=alert(1)>"  # as a folder, and as a model
BACKBONE = {"backbone": "efficientnet_lite0", "layers": LAYERS}


@pytest.fixture(scope="module")
def tiles(cells, tmp_path_factory) -> Path:
    """Ten cells to train, six sound ones to test, and six with a scratch and its mask, in two kinds."""
    root = tmp_path_factory.mktemp("tiles")
    train, test = (sorted((cells / folder).iterdir()) for folder in ("train/good", "test/good"))
    for folder, images in {"train/good": train[:10], "test/good": test[:6]}.items():
        (root / folder).mkdir(parents=True)
        for image in images:
            shutil.copy(image, root / folder)
    rng = np.random.default_rng(0)
    for kind, images in {"scratch": test[6:9], HOSTILE: test[9:12]}.items():
        for part in ("test", "ground_truth"):
            (root / part / kind).mkdir(parents=True)
        for image in images:
            picture = Image.open(image).convert("L")
            mask = Image.new("L", picture.size)
            ends = rng.integers(40, 260, 4).tolist()
            for target, ink in ((picture, 0), (mask, 255)):
                ImageDraw.Draw(target).line(ends, fill=ink, width=8)
            picture.save(root / "test" / kind / image.name)
            mask.save(root / "ground_truth" / kind / image.name)
    return root


@pytest.fixture(scope="module")
def config(tiles, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "evaluation.yaml"
    plan = {
        "datasets": {"tiles": {"folder": str(tiles)}, "absent": {"folder": "nowhere", "optional": True}},
        "seeds": [0, 1],
        "baseline": HOSTILE,
        "backbones": {"lite0": BACKBONE},
        "models": {
            "ours": {
                "class_path": "patchcore_plugin.FaissPatchcore",
                "init_args": {"coreset_sampling_ratio": 0.02, "normalization": "imagenet"},  # as the peer
            },
            HOSTILE: {"class_path": "anomalib.models.Padim", "init_args": {"n_features": 20}},
            "peer": {"class_path": "anomalib.models.Patchcore", "init_args": {"coreset_sampling_ratio": 0.02}},
            "broken": {"class_path": "anomalib.models.Padim", "init_args": {"n_features": 1000}},
        },
    }
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    return file


def evaluate(config, output, *only):
    options = [part for pattern in only for part in ("--only", pattern)]
    command = [PATCHCORE, "evaluate", config, "--output", output, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def evaluated(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation")
    result = evaluate(config, output, "*/ours/*", "*/<img*/*", "*/peer/0", "*/broken/0")
    return output, result


def rows(output) -> dict[tuple[str, str], dict[str, str]]:
    with (output / "results.csv").open(newline="") as file:
        return {(row["model"], row["seed"]): row for row in csv.DictReader(file)}


def test_table(evaluated):
    output, result = evaluated
    assert result.returncode == 1, "a failed job must not pass unseen"
    found = rows(output)
    assert {key: row["status"] for key, row in found.items()} == {
        ("ours", "0"): "done", ("ours", "1"): "done", (HOSTILE, "0"): "done", (HOSTILE, "1"): "done",
        ("peer", "0"): "done", ("peer", "1"): "not run", ("broken", "0"): "failed", ("broken", "1"): "not run",
    }  # fmt: skip
    assert "0 < n_features <= 152, found 1000" in found["broken", "0"]["error"]
    assert "Failed: tiles/broken/0: ValueError: " in result.stderr
    assert "Data set absent is skipped: there is no folder nowhere." in result.stdout
    assert "2 of 8 jobs have not been run yet" in result.stdout
    ours = {name: float(found["ours", "0"][name]) for name in (*QUALITIES, "fit_seconds", "bank_vectors", "peak_mebibytes")}
    assert ours["image_auroc"] > 0.9
    assert ours["pixel_auroc"] > 0.9
    assert ours["aupro"] > 0.6
    assert ours["bank_vectors"] == 10 * 32 * 32 * 0.02 // 1
    assert 200 < ours["peak_mebibytes"] < 10_000
    with (output / "summary.csv").open(newline="") as file:
        summary = {(row["model"], row["metric"]): row for row in csv.DictReader(file)}
    own = summary["ours", "image_auroc"]
    aurocs = {model: [float(found[model, seed]["image_auroc"]) for seed in "01"] for model in ("ours", HOSTILE)}
    assert float(own["mean"]) == pytest.approx(np.mean(aurocs["ours"]))
    assert float(own["difference"]) == pytest.approx(np.mean(aurocs["ours"]) - np.mean(aurocs[HOSTILE]))
    assert float(own["low"]) <= float(own["difference"]) <= float(own["high"])


def test_same_backbone(evaluated):
    """The peer has our weights: with the same images, its scores are near ours, in another feature space they are not."""
    scores = {}
    for model in ("ours", "peer"):
        (file,) = evaluated[0].glob(f"jobs/tiles-{model}-0-*/predictions.csv")
        with file.open(newline="") as lines:
            scores[model] = np.array([float(row["score"]) for row in csv.DictReader(lines)])
    assert np.abs(scores["peer"] / scores["ours"] - 1).max() < 0.15
    assert np.corrcoef(scores["peer"], scores["ours"])[0, 1] > 0.98


def test_report_in_a_browser(evaluated, browser, keep):
    """No request, no error, no script from a name; everything is in it, and a phone can read it."""
    from playwright.sync_api import expect  # it is there where a browser is

    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 800})
        asked, errors = [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, errors=errors: errors.append(message.text))
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.on("dialog", lambda dialog, errors=errors: errors.append(dialog.message))
        address = (evaluated[0] / "report.html").as_uri()
        page.goto(address)
        page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
        for image in page.locator("img").all():
            expect(image).to_have_js_property("complete", value=True)
        assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
        keep(page, f"evaluation-{width}")
        assert [url for url in asked if not url.startswith("data:")] == [address]
        assert errors == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        text = page.inner_text("body")
        assert page.locator("img").count() == 2 + 3 * (6 + 6 + 2)
        page.close()
    assert HOSTILE in text
    assert "n_features <= 152" in text
    assert "absent: skipped" in text
    for shown in (
        "image AUROC",
        "AUPRO",
        "FPR95",
        "latency ms",
        "difference",
        "Worst misses",
        "ground truth",
        "flagged",
    ):
        assert shown in text


def test_finished_jobs_are_not_repeated(evaluated, config):
    output, _ = evaluated
    before = {path: path.stat().st_mtime_ns for path in output.glob("jobs/*/metrics.json")}
    table = rows(output)
    (left,) = output.glob("jobs/tiles-ours-0-*")
    left = left.with_name(f"{left.name}.log")
    left.touch()  # as if the evaluation had been killed while this job was ending
    assert evaluate(config, output, "*/ours/*").returncode == 0, "the job that failed is not among these"
    assert {path: path.stat().st_mtime_ns for path in output.glob("jobs/*/metrics.json")} == before
    assert rows(output) == table
    assert not left.exists()


def test_job_ends_with_its_evaluation(evaluated, config, tmp_path):
    """A killed evaluation leaves no job behind that would work on, beside the next one's."""
    definition = json.loads(next(evaluated[0].glob("jobs/tiles-ours-0-*/metrics.json")).read_text())["job"]
    (tmp_path / "job.json").write_text(json.dumps(definition))
    command = [sys.executable, "-m", "patchcore_plugin.evaluation.job", tmp_path / "job.json", tmp_path / "out", tmp_path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / ".out.partial").is_dir, process)
    process.stdin.close()
    assert process.wait(20) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_evaluation_goes_on(evaluated, config, tmp_path):
    """SIGKILL in the middle of the second job: the first is kept as it is, and the table is that of a run in one go.

    Its small twins are test_finished_jobs_are_not_repeated and test_job_ends_with_its_evaluation.
    """
    jobs = tmp_path / "jobs"
    command = [PATCHCORE, "evaluate", config, "--output", tmp_path, "--only", "*/ours/*", "--only", "*/<img*/0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(jobs.glob("[!.]*/metrics.json")) and any(jobs.glob(".*.partial/engine")), process)
    process.kill()
    process.wait()
    (first,) = jobs.glob("[!.]*/metrics.json")
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "results.csv").exists()
    result = evaluate(config, tmp_path, "*/ours/*", "*/<img*/0")
    assert result.returncode == 0, result.stderr
    assert first.stat().st_mtime_ns == written
    whole, resumed = rows(evaluated[0]), rows(tmp_path)
    done = [key for key, row in resumed.items() if row["status"] == "done"]
    assert len(done) == 3
    for key in done:
        assert [resumed[key][name] for name in QUALITIES] == [whole[key][name] for name in QUALITIES]
    assert {path.suffix for path in jobs.iterdir()} == {""}, "nothing is left of what was interrupted"


def wait_for(condition, process, limit=180):
    deadline = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)
