"""pyproject.toml, the bento's description and the packaged files agree."""

import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import entry_points, requires
from importlib.resources import files
from itertools import chain
from pathlib import Path

import pytest
import yaml
from helpers.old_files import EXPECTED, OLD
from helpers.packages import PLATFORMS, PYTHONS, ResolutionError, check_wheels, resolve, uv
from helpers.training import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = "patchcore_plugin"
TARGETS = [(name, python) for name in PLATFORMS for python in PYTHONS if (name, python) != ("Windows x86-64", "3.13")]


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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel that is built from it elsewhere, as ``python -m build`` does."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t"]
    subprocess.run([*build, "sdist"], cwd=ROOT, capture_output=True, check=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "source")
    (source,) = (folder / "source").iterdir()
    subprocess.run([*build, "wheel"], cwd=source, capture_output=True, check=True)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


def repository(*folders):
    """Files of the repository in these folders."""
    ignored = {"__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in paths if not ignored & set(path.parts)}


def test_source_distribution(built):
    source, _ = built
    found = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    around = {"pyproject.toml", "README.md", "LICENSE", ".gitignore", "PKG-INFO"}
    assert found == repository("bento", "configs", "tests", PACKAGE) | around


def test_wheel(built):
    """It has all code, templates, configs and the page; what only those with a clone can use stays out."""
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    outside = {"bento/bentofile.yaml", "bento/Dockerfile.j2", *repository("bento/examples")}
    needed = {file for file in repository("bento", "configs", PACKAGE) - outside if not file.endswith((".md", ".png"))}
    assert names == {file if file.startswith(PACKAGE) else f"{PACKAGE}/{file}" for file in needed}
    endings = {name.rpartition(".")[2] for name in names}
    assert endings == {"py", "typed", "j2", "yaml", "html", "css", "js"}


def installed(built, folder, **environment):
    """Environment of a process that finds the wheel's files, and no clone."""
    zipfile.ZipFile(built[1]).extractall(folder)
    return {**os.environ, "PYTHONPATH": str(folder), **environment}


def test_wheel_works_far_from_a_clone(built, tmp_path):
    """The small twin: commands, configs and service of the wheel's files, in this environment."""
    environment = installed(built, tmp_path / "site")
    code = """
import sys
from importlib.resources import files
import patchcore_plugin, patchcore_plugin.bento.service
from patchcore_plugin.cli import main
assert patchcore_plugin.__file__.startswith(sys.argv[1])
assert patchcore_plugin.bento.service.__file__.startswith(sys.argv[1])
assert (files("patchcore_plugin.configs") / "elpv.yaml").is_file()
assert (files("patchcore_plugin.bento") / "ui" / "index.html").is_file()
main(sys.argv[2:])
"""
    bundle = shutil.copytree(OLD / "bundle-hnsw", tmp_path / "bundle")  # a cache appears beside it
    command = ["predict", str(bundle), str(OLD / "images"), "--output", str(tmp_path / "out")]
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), *command],
        cwd=tmp_path,
        env=environment,
        timeout=100,
        check=True,
    )
    with (tmp_path / "out" / "results.csv").open(newline="", encoding="utf-8") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert scores == pytest.approx(EXPECTED["bundle-hnsw"]["raw"], rel=1e-4)


@pytest.mark.slow
def test_demo_of_the_wheel(tmp_path):
    """``python -m build``, then the whole demo from the wheel, with the packages of this environment."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(python, "-m", "pip", "install", "build")
    run(python, "-m", "build", "--outdir", str(tmp_path / "dist"), str(ROOT))
    assert sorted(path.suffix for path in (tmp_path / "dist").iterdir()) == [".gz", ".whl"]
    run(python, "-m", "pip", "install", "--no-deps", *map(str, (tmp_path / "dist").glob("*.whl")))
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # behind the wheel
    assert run(python, "-c", "import patchcore_plugin; print(patchcore_plugin.__file__)").startswith(str(site))
    run(str(Path(python).with_name("patchcore")), "demo")
    assert (tmp_path / "patchcore-demo" / "figure.png").is_file()


# Other platforms.


@pytest.fixture(scope="module")
def index():
    """The package index; without one, nothing can be said of other platforms."""
    if shutil.which("uv") is None and not Path(sys.prefix, "bin", "uv").is_file():
        pytest.skip("uv is not installed")
    try:
        uv("pip", "compile", "--quiet", "--no-deps", "-", text="click>=8.1")
    except ResolutionError as error:
        if "click" not in str(error):
            raise
        pytest.skip(f"the package index cannot be reached: {error}")


@pytest.mark.parametrize(
    ("name", "python"), [("Windows x86-64", "3.13"), *(pytest.param(*one, marks=pytest.mark.slow) for one in TARGETS)]
)
def test_service_on_each_platform(index, name, python):
    """Wheels for all packages, and no torch; markers are those of the platform."""
    versions = resolve("serve", PLATFORMS[name], python)
    assert {"openvino", "faiss-cpu", "numpy", "pillow", "httptools", "pydantic-core", "bentoml"} <= set(versions)
    assert {"torch", "torchvision", "anomalib", "lightning", "timm"}.isdisjoint(versions)
    assert ("uvloop" in versions) == ("Windows" not in name)


@pytest.mark.slow
def test_pip_agrees(index):
    """For one platform, as pip fetches the packages to know what they need."""
    windows = PLATFORMS["Windows x86-64"]
    check_wheels(resolve("serve", windows, "3.13"), windows, "3.13")
    with pytest.raises(ResolutionError, match="uvloop"):
        check_wheels({"uvloop": "0.21.0"}, windows, "3.13")


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
