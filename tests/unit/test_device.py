"""The device of the network: its scores are those of the CPU, or it is refused."""

import json
import shutil
from pathlib import Path

import openvino as ov
import pytest
from bentoml.exceptions import BentoMLConfigException
from click.testing import CliRunner
from helpers.bundles import change_manifest
from helpers.training import ROOT
from patchcore_plugin.bento.metrics import Metrics
from patchcore_plugin.bento.repository import make_repository
from patchcore_plugin.bento.settings import Settings, read_settings
from prometheus_client import CollectorRegistry

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import BundleError, read_manifest
from patchcore_plugin.cli import main
from patchcore_plugin.errors import UsageError
from patchcore_plugin.runtime.device import check_device, device_facts, device_options
from patchcore_plugin.runtime.network import Embedder

OLD = ROOT / "tests/data/old"
IMAGES = sorted((OLD / "images").iterdir())


@pytest.fixture
def small(tmp_path):
    """A small bundle with a self-test."""
    return Path(shutil.copytree(OLD / "bundle-hnsw", tmp_path / "bundle"))


def scores(bundle, **options):
    return [answer.score for answer in PatchcoreRuntime.load(bundle, **options).predict(IMAGES)]


@pytest.mark.parametrize(
    ("device", "computes", "precision", "mode"),
    [
        ("AUTO", "CPU", "f32", "latency"),
        ("AUTO:-NPU,-GPU", "CPU", "bf16", "throughput"),
        ("HETERO:CPU", "HETERO:CPU", "f32", "throughput"),
        ("HETERO:CPU", "HETERO:CPU", "bf16", "latency"),
    ],
)
def test_scores_are_those_of_the_cpu(small, tmp_path, device, computes, precision, mode):
    """Also those of a compiled network that was kept."""
    change_manifest(small, precision=precision)
    expected, options = scores(small, cache=False), {"mode": mode, "threads": 2, "cache": tmp_path / "cache"}
    for _ in range(2):
        runtime = PatchcoreRuntime.load(small, device=device, **options)
        assert runtime.device == computes
        assert [answer.score for answer in runtime.predict(IMAGES)] == pytest.approx(expected, rel=1e-5)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    assert len(kept) == 1 if (computes, precision) == ("CPU", "f32") else 2
    assert scores(small, **options) == pytest.approx(expected, rel=1e-5)
    assert kept.items() <= {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()}.items()


@pytest.mark.parametrize(("device", "factor"), [("AUTO", 1.01), ("HETERO:CPU", 0.97)])
def test_device_that_lies(small, monkeypatch, device, factor):
    """It is told by both numbers. Below the tolerance, it is believed."""
    embed = Embedder.embed
    answer = 1.0
    monkeypatch.setattr(Embedder, "embed", lambda self, image: answer * embed(self, image))
    answer = 1 + 1e-5
    PatchcoreRuntime.load(small, device=device, cache=False)
    answer = factor
    lied = PatchcoreRuntime.load(small, cache=False).self_test_scores()
    with pytest.raises(BundleError, match=r"The device .*CPU\)? is not used: .*tolerance 0\.2%\)") as error:
        PatchcoreRuntime.load(small, device=device, cache=False)
    numbers = [
        f"picture {place} of the self-test is {found:.6g}, expected {expected:.6g} ("
        for place, (found, expected) in enumerate(zip(lied, read_manifest(small).self_test.scores, strict=True), 1)
    ]
    assert sum(said in str(error.value) for said in numbers) == 1


def test_self_test_runs_on_every_device_but_the_cpu(small):
    """The CPU wrote it, and ``patchcore validate`` runs it there."""
    recorded = read_manifest(small).self_test.scores
    change_manifest(small, self_test={"scores": [*recorded[:4], 1.5 * recorded[4]]})
    PatchcoreRuntime.load(small, cache=False)
    message = rf"picture 5 of the self-test is 0\.28\d*, expected {1.5 * recorded[4]:.6g} \(33\.33% off"
    for device in ("AUTO", "AUTO:CPU", "HETERO:CPU"):
        with pytest.raises(BundleError, match=message):
            PatchcoreRuntime.load(small, cache=False, device=device)


def test_device_that_overflows(small, monkeypatch):
    """As float16 does beyond 65504."""
    embed = Embedder.embed
    monkeypatch.setattr(Embedder, "embed", lambda self, image: embed(self, image) + float("inf"))
    with pytest.raises(BundleError, match=r"AUTO \(CPU\) is not used: it fails at the self-test: .*infinite values"):
        PatchcoreRuntime.load(small, device="AUTO", cache=False)


def test_bundle_without_a_self_test():
    for device in ("AUTO", "HETERO:CPU"):
        with pytest.raises(BundleError, match=r"is not used: .*without a self-test.* Export the model again"):
            PatchcoreRuntime.load(OLD / "bundle-format-2", cache=False, device=device)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("", "There is no device '': write CPU, GPU"),
        ("cpu", "There is no device 'cpu': write CPU, GPU"),
        ("AUTO:", "There is no device 'AUTO:': write CPU, GPU"),
        ("AUTO:CPU;GPU", "There is no device 'AUTO:CPU;GPU': write CPU, GPU"),
        ("HETERO", "There is no device 'HETERO': HETERO takes a list of devices, such as HETERO:GPU,CPU"),
        ("HETERO:-CPU", "There is no device 'HETERO:-CPU': HETERO takes a list"),
        ("MULTI:CPU", "There is no device 'MULTI:CPU': MULTI spreads images over several devices"),
        ("TPU", "OpenVINO finds no device TPU here, which 'TPU' names"),
        ("CPU.1", r"OpenVINO finds no device CPU\.1 here"),
        ("AUTO:CPU,TPU", "OpenVINO finds no device TPU here, which 'AUTO:CPU,TPU' names"),
        ("HETERO:TPU,QPU", "OpenVINO finds no device TPU and no device QPU here"),
        ("AUTO:-" + ",-".join(ov.Core().available_devices), "leaves nothing to choose from"),
    ],
)
def test_no_such_device(device, message):
    with pytest.raises(UsageError, match=message) as error:
        check_device(device)
    assert ", ".join(ov.Core().available_devices) in str(error.value)


def test_options_of_a_device():
    core = ov.Core()
    cpu = device_options(core, "CPU", "f32", "latency", 3)
    assert cpu == {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": 3,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    assert device_options(core, "HETERO:CPU", "f32", "latency", 3) == {"DEVICE_PROPERTIES": {"CPU": cpu}}
    assert device_facts(core, "HETERO:CPU")[1:] == device_facts(core, "CPU")[1:]
    assert device_facts(core, "HETERO:CPU") != device_facts(core, "CPU")


@pytest.mark.parametrize(
    ("capabilities", "precision", "hint"),
    [
        (["FP32", "FP16", "INT8"], "f32", "f32"),
        (["FP32", "FP16", "INT8"], "bf16", "f16"),
        (["FP32", "BF16", "FP16"], "bf16", "bf16"),
        (["FP16", "INT8"], "f32", "f16"),
        (["INT8"], "f32", None),
    ],
)
def test_arithmetic_of_other_devices(capabilities, precision, hint):
    """What OpenVINO would say of devices that this machine lacks."""

    class Core:
        def get_property(self, device, name):
            supported = {"PERFORMANCE_HINT": "RW", "PERFORMANCE_HINT_NUM_REQUESTS": "RW", "INFERENCE_PRECISION_HINT": "RW"}
            return {"OPTIMIZATION_CAPABILITIES": capabilities, "SUPPORTED_PROPERTIES": supported}[name]

    options = device_options(Core(), "GPU.1", precision, "throughput", 4)
    hints = {} if hint is None else {"INFERENCE_PRECISION_HINT": hint}
    assert options == {"PERFORMANCE_HINT": "THROUGHPUT", "PERFORMANCE_HINT_NUM_REQUESTS": 4, **hints}


def call(*arguments):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.output


def test_command_line(small, tmp_path):
    results = {}
    for device in ("CPU", "AUTO"):
        code, output = call("predict", small, OLD / "images", "-o", tmp_path / device, "--no-heatmaps", "--device", device)
        assert code == 0, output
        results[device] = (tmp_path / device / "results.csv").read_text()
    assert results["AUTO"] == results["CPU"]
    code, output = call("watch", small, OLD / "images", "-o", tmp_path / "watch", "--once", "--device", "AUTO")
    assert code == 0, output
    code, output = call("validate", small, "--device", "HETERO:CPU", "--json")
    details = {check["name"]: (check["result"], check["detail"]) for check in json.loads(output)["checks"]}
    assert code == 0
    assert "network in f32 on HETERO:CPU" in details["network and bank"][1]
    change_manifest(small, self_test={"scores": [1.0] * 5})
    code, output = call("validate", small, "--device", "AUTO", "--json")
    details = {check["name"]: (check["result"], check["detail"]) for check in json.loads(output)["checks"]}
    assert (code, details["network and bank"][0], details["self-test"][0]) == (1, "failed", "skipped")
    assert "expected 1 (" in details["network and bank"][1]


@pytest.mark.parametrize("command", ["predict", "watch", "validate", "benchmark"])
def test_command_line_without_the_device(small, tmp_path, command):
    folder = [] if command == "validate" else [OLD / "images"]
    code, output = call(command, small, *folder, "--device", "TPU")
    assert code == 1
    assert "OpenVINO finds no device TPU here" in output.replace("\n", " ")


def test_watch_of_a_service_has_no_device(tmp_path):
    code, output = call("watch", "model", tmp_path, "--url", "http://127.0.0.1:9", "--device", "AUTO")
    assert code == 1
    assert "--device AUTO has no effect with --url" in output


def test_service(small, monkeypatch, tmp_path, caplog):
    """A device that is not here is refused at the start; one that lies is refused with the bundle."""
    monkeypatch.setenv("PATCHCORE_DEVICE", "TPU")
    with pytest.raises(BentoMLConfigException, match=r"PATCHCORE_DEVICE: .*OpenVINO finds no device TPU here"):
        read_settings()
    settings = Settings(bundle=small, device="HETERO:CPU", cache=tmp_path / "cache")
    repository = make_repository(settings, Metrics(CollectorRegistry()))
    with caplog.at_level("INFO"):
        assert repository.preload()
    assert "network on HETERO:CPU" in caplog.text
    assert {name: model.device for name, model in repository.loaded().items()} == {read_manifest(small).name: "HETERO:CPU"}
    change_manifest(small, self_test={"scores": [1.0] * 5})
    assert not make_repository(settings, Metrics(CollectorRegistry())).preload()
    assert "cannot be served: The device HETERO:CPU is not used: its score of picture" in caplog.text
