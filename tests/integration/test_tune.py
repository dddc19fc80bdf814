"""``patchcore tune`` from images to a config, and a training with that config."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from patchcore_plugin.cli import main

BASE = """
model:
  class_path: patchcore_plugin.FaissPatchcore
  init_args:
    backbone: efficientnet_lite0
    layers: [blocks.2]
    coreset_sampling_ratio: 0.02
    outlier_rejection: 2
    memory_budget: 0.5
    augmentations: [mirror]
    num_neighbors: 3
    image_size: [96, 96]
    normalization: imagenet
    visualizer: false
data:
  class_path: anomalib.data.Folder
  init_args: {name: other, root: nowhere, normal_dir: ok, val_split_mode: same_as_test, num_workers: 0}
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false}
default_root_dir: results
"""


@pytest.fixture(scope="module")
def part(cells, tmp_path_factory) -> Path:
    """A folder whose path has a space, with 24 normal and 12 defective cells, and a config of another folder."""
    root = tmp_path_factory.mktemp("tuning") / "my part"
    shutil.copytree(cells / "train/good", root / "good")
    (root / "defect").mkdir()
    for image in sorted((cells / "test/defective").iterdir())[::4][:12]:
        shutil.copy(image, root / "defect")
    (root / "base.yaml").write_text(BASE, encoding="utf-8")
    return root


def tune(part: Path, output: Path, *arguments: object) -> Result:
    command = ["tune", part / "good", "--config", part / "base.yaml", "--output", output, "--settings", "best", *arguments]
    return CliRunner().invoke(main, list(map(str, command)))


@pytest.fixture(scope="module")
def tuned(part) -> Result:
    """With real defects, into ``part / "tuned.yaml"``."""
    return tune(part, part / "tuned.yaml", "--defects", part / "defect")


def test_real_defects(tuned, part):
    assert tuned.exit_code == 0, tuned.output
    assert "24 of 24 normal and 12 defective images, 2 settings" in tuned.stdout
    assert "SYNTHETIC" not in tuned.stdout
    assert (
        "stay as the config has them: coreset_sampling_ratio, outlier_rejection, memory_budget, augmentations."
        in tuned.stdout
    )
    (chosen,) = re.findall(r"^Chosen: (\w+);", tuned.stdout, re.MULTILINE)
    aurocs = {name: float(value) for name, value in re.findall(r"^(\w+) +([01]\.\d+) ±", tuned.stdout, re.MULTILINE)}
    assert aurocs.keys() == {"paper", "best"}
    assert min(aurocs.values()) > 0.5
    gain, error = map(float, re.search(r"([+-]\d\.\d+) ± (\d\.\d+)  the backbone's", tuned.stdout).groups())
    assert gain == pytest.approx(aurocs["best"] - aurocs["paper"], abs=2e-4)
    assert chosen == ("best" if gain > error else "paper")

    text = (part / "tuned.yaml").read_text(encoding="utf-8")
    assert "# " + tuned.stdout[tuned.stdout.index("Chosen:") :].splitlines()[0] in text
    base, written = yaml.safe_load(BASE), yaml.safe_load(text)
    changed = {"best": {"normalization": "backbone", "score_smoothing": 1}, "paper": {}}[chosen]
    assert written["model"]["init_args"] == base["model"]["init_args"] | changed
    assert written["trainer"] == base["trainer"]
    data = written["data"]["init_args"]
    assert (data["name"], data["root"]) == ("my part", str(part))
    assert (data["normal_dir"], data["abnormal_dir"]) == ("good", "defect")


def test_the_same_again(tuned, part):
    """Refused while the config is there; with ``--overwrite`` the same one is written, as all is drawn by the seed."""
    before = (part / "tuned.yaml").read_bytes()
    refused = tune(part, part / "tuned.yaml", "--defects", part / "defect")
    assert refused.exit_code == 1
    assert re.fullmatch(r"Error: .*tuned\.yaml is there already: .* --overwrite to replace it\.\n", refused.stderr)
    assert (part / "tuned.yaml").read_bytes() == before
    again = tune(part, part / "tuned.yaml", "--defects", part / "defect", "--overwrite")
    assert again.exit_code == 0, again.output
    assert (part / "tuned.yaml").read_bytes() == before
    other = tune(part, part / "other.yaml", "--defects", part / "defect", "--seed", "1")
    assert re.findall(r"[01]\.\d{4} ±", other.stdout) != re.findall(r"[01]\.\d{4} ±", tuned.stdout)


def test_config_trains(tuned, part, monkeypatch, tmp_path):
    """The config as it was written, by ``patchcore train``."""
    assert tuned.exit_code == 0, tuned.output
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["train", "--config", str(part / "tuned.yaml")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "results/FaissPatchcore/my part/v0/weights/lightning/model.ckpt").is_file()


def test_synthetic_defects(part, tmp_path):
    """Without defective images the output and the config say how weak the evidence is."""
    result = tune(part, tmp_path / "out.yaml")
    assert result.exit_code == 0, result.output
    assert "24 of 24 normal and 24 SYNTHETIC defective images" in result.stdout
    for text in (result.stdout, (tmp_path / "out.yaml").read_text(encoding="utf-8")):
        assert "Chosen: paper; the config as it is, as synthetic defects choose nothing." in text
        assert "which is weak evidence" in text
        assert "with --defects as soon as there are 5." in text
    written = yaml.safe_load((tmp_path / "out.yaml").read_text(encoding="utf-8"))
    assert written["model"] == yaml.safe_load(BASE)["model"]
    assert "abnormal_dir" not in written["data"]["init_args"]


def test_region_tiles_and_ensemble(part, tmp_path):
    """Marks outside the region change no figure; tiles count; the further backbones of an ensemble do not."""
    for path in (part / "good").iterdir():
        pixels = np.array(Image.open(path))
        (tmp_path / "good").mkdir(exist_ok=True)
        pixels[:60, :60] = np.random.default_rng(int(path.stem[-3:])).integers(0, 256, (60, 60))
        Image.fromarray(pixels).save(tmp_path / "good" / path.name)
    config = yaml.safe_load(BASE)
    arguments = config["model"]["init_args"]
    del arguments["augmentations"]
    arguments |= {"region_of_interest": [{"rectangle": [0, 0, 0.25, 0.25], "ignore": True}], "tile_size": 64}
    arguments["ensemble"] = [{"backbone": "efficientnet_lite1"}]
    found = []
    for number, folder in enumerate((part / "good", tmp_path / "good")):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        output = tmp_path / f"{number}.yaml"
        command = ["tune", folder, "--defects", part / "defect", "--config", tmp_path / "base.yaml", "-o", output]
        result = CliRunner().invoke(main, [*map(str, command), "--settings", "best"])
        assert result.exit_code == 0, result.output
        found.append(re.findall(r"[01]\.\d{4} ±", result.stdout))
        assert re.search(r"has them: .*\bensemble", result.stdout)
    assert found[0] == found[1]
    written = yaml.safe_load((tmp_path / "0.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    assert written["ensemble"] == arguments["ensemble"]
    assert written["region_of_interest"] == arguments["region_of_interest"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--defects", "nowhere"], 1, "nowhere"),
        (["--settings", "papper"], 1, "There is no setting 'papper'"),
        (["--config", "nowhere.yaml"], 1, "There is no file nowhere.yaml"),
        (["--seed", "-1"], 2, "--seed"),
        (["--seed", "nan"], 2, "--seed"),
        (["--output", "no folder/out.yaml"], 1, "There is no folder"),
        (["--output", "good/00.png", "--overwrite"], 1, "00.png must end in .yaml or .yml"),
    ],
)
def test_wrong_arguments(part, tmp_path, arguments, code, message):
    result = tune(part, tmp_path / "out.yaml", *arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "changed", "message"),
    [
        ("image_size: [96, 96]", "image_size: 96", "image_size must be a height and a width"),
        ("image_size: [96, 96]", "image_size: [96, 10000000]", "image_size may have sides of up to"),
        ("num_neighbors: 3", "score_smoothing: .nan", "score_smoothing must be"),
        ("num_neighbors: 3", "score_smoothing: soft", "score_smoothing must be"),
        ("num_neighbors: 3", "num_neighbors: 0", "num_neighbors must be"),
        ("normalization: imagenet", "normalization: [1]", "normalization must be None or one of"),
        ("memory_budget: 0.5", "memory_budget: -1", "memory_budget must be"),
        ("memory_budget: 0.5", "1: 2", "no argument 1"),
        ("layers: [blocks.2]", "layers: [nowhere]", "no layer 'nowhere'"),
        ("normal_dir: ok", "normal_dir: ok, abnormal_dir: bad", "abnormal_dir: bad, for another folder than"),
    ],
)
def test_wrong_configs(part, tmp_path, line, changed, message):
    assert line in BASE
    (tmp_path / "base.yaml").write_text(BASE.replace(line, changed), encoding="utf-8")
    result = tune(part, tmp_path / "out.yaml", "--config", tmp_path / "base.yaml")
    assert result.exit_code == 1, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.yaml").exists()


def test_normal_images_alone(part, tmp_path):
    """The config that comes with the package; 24 images do not allow its false-alarm rate, and that is said."""
    command = ["tune", part / "good", "--output", tmp_path / "out.yaml", "--settings", "default"]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert "false_positive_rate is 0.125 instead of 0.01: 24 normal images allow no lower one." in result.stdout
    written = yaml.safe_load((tmp_path / "out.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    assert written["post_processor"]["init_args"]["false_positive_rate"] == 0.125
