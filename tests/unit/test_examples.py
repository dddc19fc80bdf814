"""The examples in bento/examples are valid, and agree with the settings and with bento/README.md."""

import copy
import re
import subprocess
import sys

import pytest
import yaml
from helpers.training import ROOT
from patchcore_plugin.bento.middleware import _HEALTH_PATHS as HEALTH_PATHS
from patchcore_plugin.bento.settings import read_settings

COMPOSE = ROOT / "bento" / "examples" / "compose.yaml"
KUBERNETES = ROOT / "bento" / "examples" / "kubernetes.yaml"
README = (ROOT / "bento" / "README.md").read_text(encoding="utf-8")
MIB = {"g": 1024, "Gi": 1024, "Mi": 1}


@pytest.fixture(scope="module")
def service():
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]["patchcore"]


@pytest.fixture(scope="module")
def manifests():
    return {one["kind"]: one for one in yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def pod(manifests):
    return manifests["Deployment"]["spec"]["template"]["spec"]


def mebibytes(text):
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]+)", text).groups()
    return int(number) * MIB[unit]


def compose_problems(content, folder):
    """What the Compose Specification's schema says against a file."""
    pytest.importorskip("check_jsonschema", reason="the package check-jsonschema is not installed")
    file = folder / "compose.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(check, capture_output=True, text=True, check=False).stdout.removeprefix("ok -- validation done")


def test_compose_file_is_valid(tmp_path):
    content = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    assert compose_problems(content, tmp_path).strip() == ""
    content["services"]["patchcore"]["read_onyl"] = True
    assert "read_onyl" in compose_problems(content, tmp_path)


def test_manifests_are_valid(manifests):
    validation = pytest.importorskip("kubernetes_validate", reason="the package kubernetes-validate is not installed")
    for version in ("1.29", validation.latest_version()):
        for manifest in manifests.values():
            validation.validate(manifest, version, strict=True)
    wrong = copy.deepcopy(manifests["Deployment"])
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(validation.ValidationError, match="livenessProb"):
        validation.validate(wrong, version, strict=True)


@pytest.mark.parametrize("kind", ["compose", "kubernetes"])
def test_settings(kind, service, pod, monkeypatch):
    """Each is one that the service knows, with a value that it takes, and limits and numbers agree."""
    container = pod["containers"][0]
    if kind == "compose":
        variables = dict(service["environment"])
        cpus, memory, seconds = service["cpus"], service["mem_limit"], int(service["stop_grace_period"].removesuffix("s"))
        assert variables["PATCHCORE_API_KEY"].startswith("${PATCHCORE_API_KEY:?"), "no key lies in the file"
    else:
        variables = {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}
        limits = container["resources"]["limits"]
        cpus, memory = int(limits["cpu"]), limits["memory"]
        seconds = pod["terminationGracePeriodSeconds"] - int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert "secretKeyRef" in variables["PATCHCORE_API_KEY"]
    for name, value in (variables | {"PATCHCORE_API_KEY": "geheim", "BENTOML_CONTAINERIZED": "true"}).items():
        monkeypatch.setenv(name, value)
    settings = read_settings()
    assert settings.threads == cpus
    assert (settings.host, settings.port) == ("0.0.0.0", 3000)
    assert "patchcore" in settings.hosts
    assert seconds > settings.timeout + 1, "as long as requests may take after SIGTERM"
    assert settings.cache.is_relative_to("/tmp"), "the one place that can be written"
    # what bento/README.md says of memory
    assert settings.max_pixels == 12_000_000
    assert "Memory: 450 MiB (64 MiB more with a record" in README
    assert "with `PATCHCORE_MAX_PIXELS=12000000` the worst that clients can send needs 0.6 GiB" in README
    assert "All bodies together take four times `PATCHCORE_MAX_BODY` at most" in README
    assert mebibytes(memory) >= 450 + 0.6 * 1024 + 4 * settings.max_body + settings.memory


def test_compose(service):
    assert service["ports"] == ["127.0.0.1:3000:3000"], "this computer alone"
    assert service["read_only"]
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["volumes"][0].endswith(f":{service['environment']['PATCHCORE_BUNDLES']}:ro")


def test_probes(pod):
    container = pod["containers"][0]
    assert container["ports"] == [{"name": "http", "containerPort": 3000}]
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    assert set(paths.values()) <= set(HEALTH_PATHS)
    assert all(f"`{path}`" in README for path in paths.values())
    start = container["startupProbe"]
    (allowed,) = re.findall(r"Allow (\d+) s for the first success", README)
    assert start["periodSeconds"] * start["failureThreshold"] >= int(allowed)
    assert all(container[name]["httpGet"]["port"] == "http" for name in paths)


def test_pod(pod, manifests, service):
    container = pod["containers"][0]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    user = pod["securityContext"]["runAsUser"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert service["user"] == str(user)
    assert not pod["automountServiceAccountToken"]
    assert not pod["enableServiceLinks"], "which would set PATCHCORE_PORT and others"
    mounts = {mount["name"]: (mount["mountPath"], mount.get("readOnly", False)) for mount in container["volumeMounts"]}
    assert mounts == {"bundles": ("/bundles", True), "tmp": ("/tmp", False)}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == manifests["PersistentVolumeClaim"]["metadata"]["name"]
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"] == manifests["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["ports"] == [{"name": "http", "port": 3000, "targetPort": "http"}]


def test_variables_of_a_kubernetes_service(monkeypatch):
    """A Service called patchcore sets these in each pod that has not switched them off."""
    monkeypatch.setenv("PATCHCORE_SERVICE_HOST", "10.0.0.7")
    monkeypatch.setenv("PATCHCORE_PORT", "tcp://10.0.0.7:3000")
    with pytest.raises(Exception, match=r"PATCHCORE_SERVICE_HOST.*enableServiceLinks: false"):
        read_settings()
