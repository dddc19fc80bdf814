"""pyproject.toml, the bento's description and the packaged files agree."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, requires
from importlib.resources import files
from itertools import chain

import yaml
from helpers.training import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = "patchcore_plugin"


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
    models = {"faiss_patchcore": "patchcore_plugin:FaissPatchcore", "spade": "patchcore_plugin:Spade"}
    for name, value in models.items():
        (model,) = entry_points(group="anomalib.models", name=name)
        assert model.value == value
    (command,) = entry_points(group="console_scripts", name="patchcore")
    assert command.value == "patchcore_plugin.cli:main"


def test_wheel_has_every_file_of_the_package(tmp_path):
    """Those of bento/ and configs/ inside the package."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    paths = {file for name in ("bento", "configs", PACKAGE) for file in (ROOT / name).rglob("*") if file.is_file()}
    expected = {file.relative_to(ROOT).as_posix() for file in paths if file.suffix != ".pyc"}
    assert names == {file if file.startswith(PACKAGE) else f"{PACKAGE}/{file}" for file in expected}
    assert {
        f"{PACKAGE}/py.typed",
        f"{PACKAGE}/bento/ui/index.html",
        f"{PACKAGE}/evaluation/report.html.j2",
        f"{PACKAGE}/cleaning/report.html.j2",
    } <= names


def test_configs_and_service_are_found_inside_the_package():
    assert (files(f"{PACKAGE}.configs") / "folder.yaml").is_file()
    assert (files(f"{PACKAGE}.bento") / "ui" / "index.html").is_file()


def test_installed_metadata_matches_pyproject():
    assert {re.sub(r"\s", "", line) for line in requires("patchcore-plugin") if "extra ==" not in line} == set(
        project()["dependencies"]
    )


def test_gate_runs_the_tests_as_the_readme_does():
    commands = [re.findall(r"-m pytest.*", (ROOT / name).read_text()) for name in ("README.md", ".ci/run")]
    assert commands[0] == commands[1] == ['-m pytest -n 2 -m "not slow"']
