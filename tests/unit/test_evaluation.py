"""The arithmetic and the YAML of ``patchcore evaluate``."""

import csv
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.training import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label as regions_of

from patchcore_plugin.bundle import lock_folder
from patchcore_plugin.evaluation.job import JobError, plant
from patchcore_plugin.evaluation.metrics import AUPRO_LIMIT, image_metrics, pixel_metrics
from patchcore_plugin.evaluation.plan import MEAN, Job, PlanError, Published, list_jobs, read_plan
from patchcore_plugin.evaluation.report import write_report
from patchcore_plugin.evaluation.runner import METRICS_FILE, PREDICTIONS_FILE, Result, read_result, run_jobs, select
from patchcore_plugin.evaluation.summary import summarize, write_csv

PADIM = {"class_path": "anomalib.models.Padim", "init_args": {"backbone": "resnet18", "pre_trained": False}}


def published(dataset, **figures):
    """A change of the plan: published figures of its model."""
    return {"models": {"padim": {**PADIM, "published": {"source": "a paper", "figures": {dataset: figures}}}}}


def pairs_auroc(labels, scores):
    """Share of pairs of an anomalous and a normal one in the right order; a tie counts half."""
    normal, anomalous = scores[labels == 0], scores[labels == 1]
    return np.mean((anomalous[:, None] > normal) + 0.5 * (anomalous[:, None] == normal))


def rates(labels, scores, threshold):
    found = scores >= threshold
    return found[labels == 0].mean(), found[labels == 1].mean()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(-5, 60)), min_size=1, max_size=60))
def test_image_metrics(images):
    """Against the definitions, with ties, scores far from [0, 1], and one class alone."""
    labels, scores = (np.array(values) for values in zip(*images, strict=True))
    labels, scores = labels.astype(int), scores.astype(np.float64)
    found = image_metrics(labels, scores)
    if len(set(labels)) == 1:
        assert found == {}
        return
    thresholds = sorted(set(scores))
    assert found["image_auroc"] == pytest.approx(pairs_auroc(labels, scores))
    f1 = []
    for threshold in thresholds:
        hits = ((scores >= threshold) & (labels == 1)).sum()
        f1.append(2 * hits / ((scores >= threshold).sum() + labels.sum()))
    assert found["f1_max"] == pytest.approx(max(f1), abs=1e-6)
    for name, least in (("fpr_at_95_tpr", 0.95), ("fpr_at_99_tpr", 0.99)):
        false = [rates(labels, scores, threshold) for threshold in thresholds]
        assert found[name] == pytest.approx(min(fpr for fpr, tpr in false if tpr >= least))


def test_pixel_metrics():
    """Against the definitions: every threshold, every region by itself, areas by trapezoids."""
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 24, 24), bool)
    masks[0, 2:6, 3:20] = masks[0, 12:20, 5:9] = masks[1, 8:16, 8:16] = True
    maps = (20 + rng.normal(size=masks.shape) + 1.2 * masks).round(1).astype(np.float32)  # rounded: ties
    found = pixel_metrics(masks, maps)
    assert found["pixel_auroc"] == pytest.approx(pairs_auroc(masks.ravel().astype(int), maps.ravel()))
    false, overlap = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        above = maps >= threshold
        found_in = [
            above[number][labeled == region].mean()
            for number, (labeled, count) in enumerate(map(regions_of, masks))
            for region in range(1, count + 1)
        ]
        false.append(above[~masks].mean())
        overlap.append(np.mean(found_in))
    grid = np.append(np.array(false)[np.array(false) < AUPRO_LIMIT], AUPRO_LIMIT)
    area = np.trapezoid(np.interp(grid, false, overlap), grid) / AUPRO_LIMIT
    assert found["aupro"] == pytest.approx(area, abs=1e-4)


@pytest.mark.parametrize("value", [True, False])
def test_pixel_metrics_of_masks_without_a_border(value):
    masks = np.full((2, 4, 4), value)
    assert pixel_metrics(masks, np.ones(masks.shape, np.float32)) == {}


def write(folder, **changes):
    content = {
        "datasets": {"cells": {"elpv": "mono"}},
        "models": {"padim": PADIM},
        **changes,
    }
    file = folder / "evaluation.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def make_plan(folder, **changes):
    file = write(folder, **changes)
    return list_jobs(read_plan(file), folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {}}, "model: Extra inputs are not permitted"),
        ({"models": {}}, "models: Dictionary should have at least 1 item"),
        ({"seeds": [0, "one"]}, r"seeds.1: .*valid integer.*got 'one'"),
        ({"seeds": [1, 1]}, "a seed is listed twice"),
        ({"baseline": "Padim"}, "baseline 'Padim' is not one of the models: padim"),
        ({"datasets": {"a/b": {"elpv": "mono"}}}, "datasets.a/b"),
        ({"datasets": {"x": {"elpv": "multi"}}}, "datasets.x.elpv: Input should be 'mono' or 'poly', got 'multi'"),
        (
            {"datasets": {"x": {"elpv": "mono", "folder": "y"}}},
            "datasets.x: give exactly one of class_path, folder",
        ),
        ({"datasets": {"x": {"folder": "nowhere"}}}, "datasets.x: there is no folder nowhere.*optional: true"),
        (
            {"datasets": {"x": {"folder": "nowhere", "optional": True}}},
            "Every data set is optional, and missing: x: ",
        ),
        ({"datasets": {"x": {"class_path": "Foldr"}}}, "(?s)datasets.x: .*Foldr"),
        ({"models": {"x": {"init_args": {}}}}, "models.x: give exactly one of class_path and config"),
        ({"models": {"x": {"class_path": "anomalib.models.Padm"}}}, "(?s)models.x: .*Padm"),
        ({"models": {"x": {**PADIM, "init_args": {"layer": ["a"]}}}}, "(?s)models.x: .*'layer' is not accepted"),
        ({"models": {"x": {**PADIM, "init_args": {"n_features": "many"}}}}, "(?s)models.x: .*n_features.*many"),
        ({"models": {"x": {"config": "evaluation.yaml"}}}, "models.x.config: .* has no model section"),
        ({"models": {"x": {"config": "other.yaml"}}}, "There is no file .*other.yaml"),
        (
            published(MEAN, auroc=0.9),
            "models.padim.published.figures: mean of all: 'auroc' is none of the metrics image_auroc",
        ),
        (published(MEAN, fit_seconds=0.9), "'fit_seconds' is none of the metrics"),
        (published(MEAN, aupro=93.4), r"aupro is a share from 0 to 1 \(0.991 for 99.1 %\), got 93.4"),
        (published(MEAN, aupro=float("nan")), "aupro is a share from 0 to 1 .*, got nan"),
        (published(MEAN, aupro="0.9"), "aupro is a share from 0 to 1 .*, got '0.9'"),
        (published(MEAN, aupro=True), "aupro is a share from 0 to 1 .*, got True"),
        (published("bottle", aupro=0.9), "models.padim.published: 'bottle' is none of the data sets, nor 'mean of all'"),
        ({"models": {"x": {**PADIM, "published": {"figures": {MEAN: {}}}}}}, "models.x.published.source: Field required"),
    ],
)
def test_every_mistake_is_named(tmp_path, changes, said):
    with pytest.raises(PlanError, match=said):
        make_plan(tmp_path, **changes)


def test_not_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("datasets: [")
    with pytest.raises(PlanError, match="cannot be read as YAML"):
        read_plan(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("models: {a: {class_path: x}}\nmodels: {b: {class_path: y}}")
    with pytest.raises(PlanError, match="duplicate key models"):
        read_plan(tmp_path / "b.yaml")


def test_jobs(tmp_path):
    """Seeds reach what takes one; a folder's layout becomes arguments; an optional data set may be absent."""
    for folder in ("train/good", "test/good", "test/crack", "ground_truth/crack"):
        (tmp_path / folder).mkdir(parents=True)
    own = {"class_path": "patchcore_plugin.FaissPatchcore", "init_args": {"coreset_sampling_ratio": 0.5}}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump({"model": own}))
    jobs, skipped = make_plan(
        tmp_path,
        datasets={"tiles": {"folder": str(tmp_path)}, "gone": {"folder": str(tmp_path / "gone"), "optional": True}},
        models={"padim": PADIM, "best": {"config": "best.yaml", "init_args": {"num_neighbors": 3}}},
        seeds=[4, 5],
        baseline="padim",
    )
    assert skipped == {"gone": f"there is no folder {tmp_path / 'gone'}"}
    assert [job.label for job in jobs] == ["tiles/padim/4", "tiles/best/4", "tiles/padim/5", "tiles/best/5"]
    assert jobs[1].network["init_args"] == {
        "coreset_sampling_ratio": 0.5, "num_neighbors": 3, "visualizer": False, "random_state": 4,
    }  # fmt: skip
    assert jobs[1].data["init_args"]["seed"] == 4
    assert jobs[1].data["init_args"]["abnormal_dir"] == ["test/crack"]
    assert jobs[1].data["init_args"]["mask_dir"] == ["ground_truth/crack"]
    assert [job.label for job in select(jobs, ["*/best/*", "*/4"])] == ["tiles/padim/4", "tiles/best/4", "tiles/best/5"]
    with pytest.raises(PlanError, match=r"(?s)'\*/worst/\*' matches no job.*tiles/padim/4"):
        select(jobs, ["*/worst/*"])


def test_the_packaged_evaluation(tmp_path, monkeypatch):
    """It is valid, all its models have one backbone, and it does without the data set that has to be fetched."""
    monkeypatch.setenv("MTD", str(tmp_path / "mtd"))
    jobs, skipped = list_jobs(read_plan(ROOT / "configs" / "evaluate.yaml"), ROOT / "configs")
    assert list(skipped) == ["MTD", "MTD, 5 % planted"]
    assert {job.elpv for job in jobs} == {"mono", "poly"}
    assert {job.baseline for job in jobs} == {"anomalib Patchcore"}
    assert {job.network["init_args"]["backbone"] for job in jobs} == {"efficientnet_lite0"}
    normalizations = {job.model: job.network["init_args"].get("normalization") for job in jobs if "ours" in job.model}
    assert normalizations == {"ours (paper)": "imagenet", "ours (default)": None, "ours (best)": "backbone"}


def test_backbones(tmp_path):
    """Every model with every backbone, but those with one of their own; compared with the same backbone's baseline."""
    lite = {"backbone": "efficientnet_lite0", "layers": ["blocks.2"]}
    bare = {"class_path": "anomalib.models.Padim", "init_args": {"n_features": 9}}
    jobs, _ = make_plan(
        tmp_path,
        models={"bare": bare, "core": {"class_path": "anomalib.models.Patchcore"}, "own": PADIM},
        backbones={"lite": lite, "r18": {"backbone": "resnet18", "layers": ["layer1"]}},
        baseline="bare",
    )
    assert {job.model: job.baseline for job in jobs} == {
        "bare, lite": "bare, lite", "bare, r18": "bare, r18",
        "core, lite": "bare, lite", "core, r18": "bare, r18", "own": "bare, lite",
    }  # fmt: skip
    assert {job.model: job.network["init_args"]["backbone"] for job in jobs}["core, r18"] == "resnet18"


def test_key_changes_with_the_definition(tmp_path):
    """What a result depends on changes its folder; what it does not, does not."""
    (job,), _ = make_plan(tmp_path)
    (same,), _ = make_plan(tmp_path, output="elsewhere", baseline="padim", **published(MEAN, aupro=0.5))
    changed = {
        "models": {"padim": {**PADIM, "init_args": {**PADIM["init_args"], "n_features": 9}}},
        "datasets": {"cells": {"elpv": "mono", "init_args": {"train_batch_size": 2}}},
        "seeds": [7],
    }
    others = [make_plan(tmp_path, **{name: value})[0][0] for name, value in changed.items()]
    assert same.key == job.key
    assert len({job.key, *(other.key for other in others)}) == 4


def result(dataset, model, seed, labels, scores, folder=None):
    job = Job(dataset=dataset, model=model, baseline="a", seed=seed, data={}, elpv=None, network={}, trainer={})
    predictions = [
        {"image": f"x/{number}.png", "kind": "k", "label": int(label), "score": float(score)}
        for number, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]
    content = {"metrics": image_metrics(labels, scores), "threshold": None}
    return Result(job, folder, content, None, predictions)


def test_differences(tmp_path):
    """The interval covers the true difference, is of a bootstrap's width, and narrows in the mean over data sets."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 150)
    results = []
    for dataset in ("one", "two"):
        common = rng.normal(size=300)
        for seed in range(2):
            noise = rng.normal(size=(2, 300)) * 0.1
            results.append(result(dataset, "a", seed, labels, common + labels + noise[0]))
            results.append(result(dataset, "b", seed, labels, common + 2 * labels + noise[1]))
    rows = summarize(results)
    assert [(row.dataset, row.model) for row in rows] == [
        ("one", "a"), ("one", "b"), ("two", "a"), ("two", "b"), (MEAN, "a"), (MEAN, "b"),
    ]  # fmt: skip
    assert rows[0].difference is None
    own, mean = rows[1], rows[-1]
    aurocs = {model: [r.metrics["image_auroc"] for r in results[:4] if r.job.model == model] for model in "ab"}
    assert own.means["image_auroc"] == pytest.approx(np.mean(aurocs["b"]))
    assert own.spreads["image_auroc"] == pytest.approx(np.std(aurocs["b"], ddof=1))
    assert own.difference == pytest.approx(np.mean(aurocs["b"]) - np.mean(aurocs["a"]))
    low, high = own.interval
    drawn = []  # the obvious way: take images, repeated ones repeatedly, and compare the two models on them
    scores = {r.job.label: np.array([image["score"] for image in r.predictions]) for r in results[:4]}
    for _ in range(1000):
        take = np.concatenate([rng.choice(np.flatnonzero(labels == kind), 150) for kind in (0, 1)])
        auroc = {label: pairs_auroc(labels[take], found[take]) for label, found in scores.items()}
        drawn.append(np.mean([auroc[f"one/b/{seed}"] - auroc[f"one/a/{seed}"] for seed in range(2)]))
    np.testing.assert_allclose([low, high], np.quantile(drawn, [0.025, 0.975]), atol=0.15 * (high - low))
    assert mean.difference == pytest.approx((own.difference + rows[3].difference) / 2)
    assert mean.interval[1] - mean.interval[0] < high - low
    write_csv(results, rows, tmp_path)
    assert (tmp_path / "summary.csv").read_text().count("\n") == 1 + 6 * 5


def test_published_figures(tmp_path):
    """The difference is measured minus published; the mean's is shown only once all data sets of the plan have results."""
    known = Published(source="a <paper>", figures={"one": {"image_auroc": 0.75, "aupro": 0.5}, MEAN: {"image_auroc": 0.5}})
    labels = np.array([0, 0, 1, 1])
    results = [result(dataset, "a", 0, labels, np.array([0, 2, 1, 3]), tmp_path) for dataset in ("one", "two")]
    for one in results:
        one.job.published = known
        one.content |= {"pictures": {}, "machine": {"cores": 1, "threads": 1, "system": "here"}}
    rows = summarize(results)
    write_csv(results, rows, tmp_path)
    with (tmp_path / "summary.csv").open(newline="") as file:
        found = {(row["dataset"], row["metric"]): row for row in csv.DictReader(file)}
    beside = {key: (row["published"], row["minus_published"]) for key, row in found.items() if row["published"]}
    assert beside == {("one", "image_auroc"): ("0.75", "0.0"), (MEAN, "image_auroc"): ("0.5", "0.25")}
    write_report(results, rows, {}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>0.7500</td><td>0.5000</td><td>+0.2500</td>" in page
    assert "a: a &lt;paper&gt;" in page

    third = replace(results[1], job=results[1].job.model_copy(update={"dataset": "three"}), content=None)
    for unfinished in (third, replace(third, error="no")):
        rows = summarize([*results, unfinished])
        assert {row.dataset: row.published for row in rows} == {"one": known.figures["one"], "two": {}, MEAN: {}}


def test_published_mean_of_a_part(tmp_path):
    """Without an optional data set, the mean is one over other data sets than the published one."""
    gone = {"gone": {"folder": str(tmp_path / "gone"), "optional": True}, "cells": {"elpv": "mono"}}
    (job,), _ = make_plan(tmp_path, datasets=gone, **published(MEAN, aupro=0.5))
    assert job.published is None
    (job,), _ = make_plan(tmp_path, **published(MEAN, aupro=0.5))
    assert job.published.figures == {MEAN: {"aupro": 0.5}}
    assert Job.model_validate(json.loads(job.model_dump_json())) == job


def test_a_missing_folder_names_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("MVTEC_AD", str(tmp_path / "nowhere"))
    plan = read_plan(ROOT / "configs" / "reproduce_mvtec_ad.yaml")
    with pytest.raises(PlanError, match=r"datasets.bottle: there is no folder .*bottle \(.* from the variable MVTEC_AD\)"):
        list_jobs(plan, ROOT / "configs")


def test_a_class_among_the_arguments(tmp_path):
    """As a pre-processor of the user's: the job's definition keeps it as the file has it, and can be written."""
    transform = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [64, 64]}}
    own = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": transform}}
    (job,), _ = make_plan(tmp_path, models={"x": {**PADIM, "init_args": {**PADIM["init_args"], "pre_processor": own}}})
    assert job.network["init_args"]["pre_processor"] == own
    assert Job.model_validate(json.loads(json.dumps(job.model_dump()))).key == job.key


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 1], [0, 1]])
def test_differences_of_few_images(labels):
    """No interval, and no crash, where a class has one image or none."""
    rows = summarize([result("x", model, 0, np.array(labels), np.arange(len(labels)) * 1.0) for model in "ab"])
    assert rows[1].interval is None
    assert ("image_auroc" in rows[1].means) == (len(set(labels)) == 2)


def test_result_folders(tmp_path):
    """A job is done when its folder is there, failed when its error is, and not run otherwise."""
    job = result("x", "a", 0, np.array([0, 1]), np.array([1.0, 2.0])).job
    assert read_result(job, tmp_path).status == "not run"
    folder = tmp_path / "jobs" / job.key
    folder.with_name(f".{job.key}.partial").mkdir(parents=True)
    assert read_result(job, tmp_path).status == "not run"
    folder.with_name(f"{job.key}.error").write_text("ValueError: no")
    assert (read_result(job, tmp_path).status, read_result(job, tmp_path).error) == ("failed", "ValueError: no")
    folder.mkdir()
    (folder / METRICS_FILE).write_text(json.dumps({"metrics": {"aupro": None, "f1_max": 0.5}}))
    (folder / PREDICTIONS_FILE).write_text("image,kind,label,score\na/b.png,'=a,1,0.25\n")
    found = read_result(job, tmp_path)
    assert (found.status, found.error, found.metrics) == ("done", None, {"f1_max": 0.5})
    assert found.predictions == [{"image": "a/b.png", "kind": "=a", "label": 1, "score": 0.25}]


def test_tables_hold_no_formula(tmp_path):
    """Names of data sets and models, and what an error says, are what somebody else wrote."""
    done = result("=x", "-a", 0, np.array([0, 1]), np.array([1.0, 2.0]))
    failed = replace(result("@y", "b", 0, np.array([0, 1]), np.array([1.0, 2.0])), content=None, error="+1")
    write_csv([done, failed], summarize([done, failed]), tmp_path)
    for name in ("results.csv", "summary.csv"):
        with (tmp_path / name).open(newline="") as file:
            cells = {cell for row in csv.reader(file) for cell in row}
        assert {"'=x", "'-a"} < cells
        assert not any(cell.startswith(("=", "@", "+", "-")) for cell in cells)


def test_folders_of_defects(tmp_path, monkeypatch):
    """A kind of defect may have any name that the system takes; a hidden folder is none, and a linked one is named."""
    kind = os.fsdecode(b"cr\xe4ck")
    for folder in ("train/good", "test/good", f"test/{kind}", "test/.ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    datasets = {"tiles": {"folder": str(tmp_path)}}
    (job,) = make_plan(tmp_path, datasets=datasets)[0]
    assert job.data["init_args"]["abnormal_dir"] == [f"test/{kind}"]
    monkeypatch.setattr(sys, "executable", shutil.which("true"))  # a job that ends at once, without a result
    run_jobs([job], tmp_path / "out", lambda result: None, lambda job: None)
    (definition,) = (tmp_path / "out/jobs").glob("*.json")
    assert Job.model_validate(json.loads(definition.read_bytes())) == job

    (tmp_path / "train/good/more").symlink_to(tmp_path / "test")
    with pytest.raises(PlanError, match="train/good/more is a linked folder, whose images anomalib would leave out"):
        make_plan(tmp_path, datasets=datasets)


def test_two_evaluations_in_one_folder(tmp_path):
    """The second one is told; what killed jobs left is removed."""
    (tmp_path / "jobs" / ".killed.partial").mkdir(parents=True)
    lock = lock_folder(tmp_path / "jobs")
    if lock is None:
        pytest.skip("this system cannot lock a folder")
    with pytest.raises(PlanError, match="Another evaluation is at work in"):
        run_jobs([], tmp_path, print, print)
    os.close(lock)
    run_jobs([], tmp_path, print, print)
    assert list((tmp_path / "jobs").iterdir()) == []


def test_planted_images(tmp_path):
    """The share of the training images is defective afterwards; what is planted is not tested, nor is its mask left."""
    for folder, count in {"train/good": 19, "test/good": 3, "test/crack": 4, "test/fray": 3}.items():
        (tmp_path / "tiles" / folder).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "tiles" / folder / f"{number}.jpg").write_bytes(folder.encode())
    for kind, count in {"crack": 4, "fray": 3}.items():
        (tmp_path / "tiles/ground_truth" / kind).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "tiles/ground_truth" / kind / f"{number}.png").touch()
    (plain, planted), _ = make_plan(
        tmp_path,
        datasets={
            "clean": {"folder": str(tmp_path / "tiles")},
            "dirty": {"folder": str(tmp_path / "tiles"), "planted": 0.2},
        },
        models={"padim": PADIM},
    )
    assert (plain.planted, planted.planted) == (0, 0.2)
    assert plain.key != planted.key
    root = plant(planted.data["init_args"], planted.planted, 3, tmp_path / "copy")
    names = sorted(path.name for path in (root / "train/good").iterdir())
    moved = [name for name in names if name.startswith("planted-")]
    assert len(names) == 24
    assert len(moved) == 5
    left = {(path.parent.name, path.stem) for kind in ("crack", "fray") for path in (root / "test" / kind).iterdir()}
    assert len(left) == 2
    assert left == {(path.parent.name, path.stem) for path in (root / "ground_truth").rglob("*.png")}
    assert not left & {tuple(Path(name).stem.split("-")[1:]) for name in moved}
    again = plant(planted.data["init_args"], planted.planted, 3, tmp_path / "copy")
    assert names == sorted(path.name for path in (again / "train/good").iterdir()), "the seed decides"
    with pytest.raises(JobError, match=r"0\.4 planted images takes 13 defective ones, and there are 7"):
        plant(planted.data["init_args"], 0.4, 0, tmp_path / "copy")


def test_planted_goes_with_folders(tmp_path):
    with pytest.raises(PlanError, match="planted goes with folder and elpv alone"):
        make_plan(
            tmp_path,
            datasets={"mvtec": {"class_path": "anomalib.data.MVTecAD", "planted": 0.1}},
            models={"padim": PADIM},
        )
