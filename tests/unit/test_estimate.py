"""The estimate that ``patchcore evaluate`` prints before its first job."""

import pytest
import torch
import yaml
from anomalib.models import Padim, Patchcore
from click.testing import CliRunner
from helpers.mvtec import write_miniature, write_small_config
from torch.utils.flop_counter import FlopCounterMode

from patchcore_plugin.cli import main
from patchcore_plugin.evaluation.estimate import count_work, estimate
from patchcore_plugin.evaluation.plan import list_jobs, read_plan
from patchcore_plugin.model.spade import Spade

SMALL = {"backbone": "resnet10t", "pre_trained": False, "visualizer": False}
TRAIN, SIDE = 6, 64


def fitted(model):
    """The model with the features of a few random images."""
    torch.manual_seed(0)
    images = torch.rand(TRAIN, 3, SIDE, SIDE)
    if isinstance(model, Spade):
        model.model.keep(model.model.extract(images))
        return model.eval()
    model.model.training = True
    model.model(images)
    model.model.fit() if isinstance(model, Padim) else model.model.subsample_embedding(model.coreset_sampling_ratio)
    return model.eval()


def operations(function, images):
    """Operations in products of matrices, without those of convolutions: of the network, and of what smooths the map."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        found = function(images)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for name, count in counts.items() if "convolution" not in str(name)), found


@pytest.mark.parametrize(
    ("model", "tolerance"),
    [
        (lambda: Spade(**SMALL, num_neighbors=3), 0.01),
        (lambda: Padim(**SMALL, layers=["layer1", "layer2"], n_features=50), 0.01),
        (lambda: Patchcore(**SMALL, coreset_sampling_ratio=0.1), 0.05),  # neighbors of the farthest patch are left out
    ],
    ids=["spade", "padim", "patchcore"],
)
def test_operations_of_scoring(model, tolerance):
    """As torch counts them in the model itself."""
    module = fitted(model())
    image = torch.rand(1, 3, SIDE, SIDE)
    whole, _ = operations(module.model, image)
    if isinstance(module, Spade):
        network, features = operations(module.model.extract, image)
    else:
        module.model.training = True
        network, embedded = operations(module.model, image)
        features = [embedded]
    counted = [count_work(module, features, TRAIN, scored).products for scored in (0, 1)]
    assert counted[1] - counted[0] == pytest.approx(whole - network, rel=tolerance)


def test_memory_of_padim():
    """Three arrays of a matrix for each patch, as with 550 features on 56 x 56 patches: 10.6 GiB."""
    module = Padim(**SMALL, n_features=50)
    work = count_work(module, [torch.empty(1, 550, 56, 56)], 0, 0)
    assert work.memory == 3 * 4 * 550**2 * 56**2


def make_jobs(folder, models, categories=("bottle",), **changes):
    write_small_config(folder / "small.yaml", list(categories), models)
    plan = yaml.safe_load((folder / "small.yaml").read_text())
    for name, change in changes.items():
        plan["models"][name] = change
    (folder / "small.yaml").write_text(yaml.safe_dump(plan))
    return list_jobs(read_plan(folder / "small.yaml"), folder)[0]


def test_estimates(tmp_path, monkeypatch):
    """A line for each model, over its data sets; an unknown model, or a broken one, is left out and hinders none."""
    monkeypatch.setenv("MVTEC_AD", str(tmp_path))
    write_miniature(tmp_path, ["bottle", "cable"], train=12, test=3)
    unknown = {"class_path": "anomalib.models.Stfpm"}
    broken = {"class_path": "anomalib.models.Padim", "init_args": {"backbone": "resnet10t", "n_features": 5000}}
    models = ["PatchCore 25 %", "PatchCore 1 %, ensemble"]
    jobs = make_jobs(tmp_path, models, ("bottle", "cable"), unknown=unknown, broken=broken)
    found = estimate(jobs)
    lines = {line.model: line for line in found.lines}
    assert {name: line.jobs for name, line in lines.items()} == dict.fromkeys(models, 2)
    assert all(line.seconds > 20 and line.gpu_seconds > 20 and line.memory > 2**28 for line in lines.values())
    assert {label.split("/")[1] for label in found.unknown} == {"unknown", "broken"}
    assert "the work of anomalib.models.Stfpm is not known" in found.unknown["bottle/unknown/0"]
    assert "n_features" in found.unknown["cable/broken/0"]


def test_only_an_estimate(tmp_path, monkeypatch):
    """The option prints the table, and runs and writes nothing."""
    monkeypatch.setenv("MVTEC_AD", str(tmp_path))
    write_miniature(tmp_path, ["bottle"], train=12, test=3)
    make_jobs(tmp_path, ["PatchCore 1 %"])
    command = ["evaluate", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out"), "--estimate"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "| PatchCore 1 % | 1    |" in result.output
    assert "0 of 1 jobs are finished" in result.output
    assert not (tmp_path / "out").exists()
