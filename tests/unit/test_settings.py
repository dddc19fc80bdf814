"""The service's settings, from arguments, environment and file: wrong ones are refused by name; bento/README.md has all."""

import os
import re
from importlib.metadata import distributions

import pytest
from bentoml.exceptions import BentoMLConfigException
from helpers.training import ROOT
from patchcore_plugin.bento.metrics import Metrics
from patchcore_plugin.bento.problems import PROBLEMS
from patchcore_plugin.bento.settings import Settings, read_settings, settings_table
from prometheus_client import CollectorRegistry

README = (ROOT / "bento" / "README.md").read_text()


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith("PATCHCORE_")]:
        monkeypatch.delenv(name)


def test_readme_lists_the_settings():
    """Print the table with ``python -m patchcore_plugin.bento.settings``."""
    assert settings_table() in README


def test_readme_lists_the_problems():
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \| (.*) \|$", README, re.MULTILINE)
    assert rows == [(code, str(status), meaning) for code, (status, meaning) in PROBLEMS.items()]


def test_every_problem_in_the_code_is_listed():
    """And every listed one is used."""
    code = "".join(path.read_text() for path in (ROOT / "bento").glob("*.py"))
    used = re.findall(r'ProblemError\(\s*"(\w+)"', code) + re.findall(r'code, detail = "(\w+)"', code)
    assert {*used, "not_found", "method_not_allowed"} == set(PROBLEMS), "the last two come from the framework"


def test_readme_lists_the_metrics():
    registry = CollectorRegistry()
    Metrics(registry)
    assert set(re.findall(r"`(patchcore_\w+)`", README)) == {family.name for family in registry.collect()}


def test_defaults():
    settings = read_settings()
    assert settings == Settings()
    assert (settings.host, settings.runner, settings.api_key) == ("127.0.0.1", "inside", None)
    assert all(field.description for field in Settings.model_fields.values())


def test_tracing_needs_its_package(monkeypatch):
    if "opentelemetry-exporter-otlp-proto-http" in {found.metadata["Name"] for found in distributions()}:
        pytest.skip("it is installed here")
    monkeypatch.setenv("PATCHCORE_TRACE_TO", "http://127.0.0.1:4318/v1/traces")
    with pytest.raises(BentoMLConfigException, match=r"PATCHCORE_TRACE_TO: .*opentelemetry-exporter-otlp"):
        read_settings()


def test_container(monkeypatch):
    """Loopback inside a container would be out of reach."""
    monkeypatch.setenv("BENTOML_CONTAINERIZED", "true")
    assert read_settings().host == "0.0.0.0"
    monkeypatch.setenv("PATCHCORE_HOST", "10.0.0.1")
    assert read_settings().host == "10.0.0.1"


def test_arguments_go_before_the_environment(monkeypatch):
    monkeypatch.setenv("PATCHCORE_QUEUE", "7")
    monkeypatch.setenv("PATCHCORE_THREADS", "2")
    settings = Settings(queue=5)
    assert (settings.queue, settings.threads) == (5, 2)


def test_environment_goes_before_the_file(tmp_path, monkeypatch):
    (tmp_path / "settings.yaml").write_text("queue: 5\nthreads: 3\napi_key: geheim\n")
    monkeypatch.setenv("PATCHCORE_SETTINGS", str(tmp_path / "settings.yaml"))
    monkeypatch.setenv("PATCHCORE_QUEUE", "7")
    monkeypatch.setenv("PATCHCORE_MODE", "")
    settings = read_settings()
    assert (settings.queue, settings.threads, settings.mode) == (7, 3, "auto")
    assert settings.api_key.get_secret_value() == "geheim"
    assert "geheim" not in str(settings.model_dump()), "what is printed at start"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PATCHCORE_THREADS", "0", r"PATCHCORE_THREADS: .*greater than or equal to 1 \(got '0'\)"),
        ("PATCHCORE_THREADS", "many", "PATCHCORE_THREADS: .*integer"),
        ("PATCHCORE_MODE", "fast", "PATCHCORE_MODE: .*'auto', 'latency' or 'throughput'"),
        ("PATCHCORE_TIMEOUT", "nan", "PATCHCORE_TIMEOUT"),
        ("PATCHCORE_PORT", "70000", "PATCHCORE_PORT"),
        ("PATCHCORE_TRACE_TO", "localhost:4318", "PATCHCORE_TRACE_TO: .*pattern"),
        ("PATCHCORE_THREDS", "2", "There is no setting PATCHCORE_THREDS.*PATCHCORE_THREADS"),
        ("PATCHCORE_SETTINGS", "absent.yaml", "PATCHCORE_SETTINGS: there is no file absent.yaml"),
    ],
)
def test_wrong_environment(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(BentoMLConfigException, match=message):
        read_settings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("queue: -1", "PATCHCORE_QUEUE"),
        ("bundle: a\nbundles: b", "PATCHCORE_BUNDLES: .*set either this or bundle, which is a"),
        ("qeue: 5", "PATCHCORE_SETTINGS: the file has qeue, which is no setting; settings: .*queue"),
        ("queue: [", "PATCHCORE_SETTINGS: .* cannot be read"),
        ("- 1", "PATCHCORE_SETTINGS: .* cannot be read"),
        ("!!python/object/apply:os.system ['true']", "PATCHCORE_SETTINGS: .* cannot be read"),
    ],
)
def test_wrong_file(tmp_path, monkeypatch, content, message):
    (tmp_path / "settings.yaml").write_text(content)
    monkeypatch.setenv("PATCHCORE_SETTINGS", str(tmp_path / "settings.yaml"))
    with pytest.raises(BentoMLConfigException, match=message):
        read_settings()
