"""The whole of configs/reproduce_mvtec_ad.yaml, interrupted and resumed, on a miniature: its figures mean nothing."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.mvtec import write_miniature, write_small_config

PATCHCORE = Path(sys.executable).parent / "patchcore"
MODELS = ["PatchCore 25 %", "PatchCore 10 %", "PatchCore 1 %", "PatchCore 1 %, ensemble", "PaDiM", "SPADE",
          "anomalib Patchcore", "anomalib MHPatchcore"]  # fmt: skip
PUBLISHED = {"image_auroc", "pixel_auroc", "aupro"}


@pytest.mark.parametrize(
    "models",
    [["PatchCore 1 %"], pytest.param(MODELS, marks=pytest.mark.slow)],
    ids=["one model", "all models"],
)
def test_interrupted_and_resumed(tmp_path, models):
    """Killed after the first job, a second call does the others, and the report compares their mean with the paper's."""
    categories = ["bottle", "cable"]
    write_miniature(tmp_path / "data", categories)
    write_small_config(tmp_path / "small.yaml", categories, models)
    command = [PATCHCORE, "evaluate", tmp_path / "small.yaml", "--output", tmp_path / "out"]
    environment = os.environ | {"MVTEC_AD": str(tmp_path / "data")}
    jobs = tmp_path / "out/jobs"

    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(jobs.glob("[!.]*/metrics.json")):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    (first,) = jobs.glob("[!.]*/metrics.json")
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "out/results.csv").exists()

    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.index("GPU: a rough guess") < result.stdout.index("cable/"), "the estimate comes first"
    assert first.stat().st_mtime_ns == written
    assert {path.suffix for path in jobs.iterdir()} == {""}, "nothing is left of what was interrupted"
    with (tmp_path / "out/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["dataset"], row["model"], row["status"]) for row in rows] == [
        (category, model, "done") for category in categories for model in models
    ]
    assert all(row[metric] for row in rows for metric in PUBLISHED)
    with (tmp_path / "out/summary.csv").open(newline="") as file:
        beside = [row for row in csv.DictReader(file) if row["published"]]
    assert {row["dataset"] for row in beside} == {"mean of all"}
    compared = [model for model in models if "anomalib" not in model]  # the paper knows no model of anomalib
    assert {(row["model"], row["metric"]) for row in beside} == {(model, name) for model in compared for name in PUBLISHED}
    for row in beside:
        assert float(row["minus_published"]) == pytest.approx(float(row["mean"]) - float(row["published"]))
    report = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Measured and published" in report
    assert report.count("Roth et al., arXiv 2106.08265") == len(compared)
