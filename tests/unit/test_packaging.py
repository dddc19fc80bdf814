"""pyproject.toml, the bento's description and the packaged files agree."""

import re
import sys
from importlib.metadata import entry_points, requires
from importlib.resources import files
from itertools import chain

import yaml
from helpers.training import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_base_install_has_no_training_package():
    names = {re.split(r"[>=<\[; ]", requirement)[0] for requirement in project()["dependencies"]}
    assert names.isdisjoint({"torch", "torchvision", "lightning", "anomalib", "timm", "bentoml", "matplotlib"})
    assert {"numpy", "openvino", "faiss-cpu", "pillow"} <= names


def test_every_requirement_has_a_lower_bound():
    own = re.compile(r"^patchcore-plugin\[")
    everything = chain(project()["dependencies"], *project()["optional-dependencies"].values())
    assert [line for line in everything if not own.match(line) and ">=" not in line] == []


def test_bento_installs_what_serving_needs():
    build = yaml.safe_load((ROOT / "bento" / "bentofile.yaml").read_text())
    assert build["python"]["packages"] == project()["dependencies"] + project()["optional-dependencies"]["serve"]


def test_entry_points():
    (model,) = entry_points(group="anomalib.models", name="faiss_patchcore")
    assert model.value == "patchcore_plugin:FaissPatchcore"
    (command,) = entry_points(group="console_scripts", name="patchcore")
    assert command.value == "patchcore_plugin.cli:main"


def test_configs_and_service_travel_with_the_package():
    configs = {file.name for file in files("patchcore_plugin.configs").iterdir()}
    assert {
        "best.yaml",
        "elpv.yaml",
        "evaluate.yaml",
        "folder.yaml",
        "mvtec_ad.yaml",
        "normal_only.yaml",
        "visa.yaml",
    } <= configs
    assert (files("patchcore_plugin.bento") / "service.py").is_file()
    assert (files("patchcore_plugin.bento") / "ui" / "index.html").is_file()
    assert (files("patchcore_plugin") / "py.typed").is_file()
    assert (files("patchcore_plugin.evaluation") / "report.html.j2").is_file()


def test_installed_metadata_matches_pyproject():
    assert {re.sub(r"\s", "", line) for line in requires("patchcore-plugin") if "extra ==" not in line} == set(
        project()["dependencies"]
    )
