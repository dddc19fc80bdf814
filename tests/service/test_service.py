"""The BentoML service: real servers, started from a path, from the model store, and from a built bento."""

import base64
import filecmp
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bentoml
import numpy as np
import pytest
from helpers.bundles import change_manifest
from helpers.container import DOCKERFILE, ContainerImage, instructions
from helpers.http import predict, wait_for, without_times
from helpers.pictures import encoded
from helpers.server import BENTOML, SERVE, SERVICE, bentoml_serve
from helpers.training import ROOT
from PIL import Image

PYTHON = sys.executable
BUILD = (*BENTOML, "build", "--bentofile", "bento/bentofile.yaml", ".")
ENGINE = """#!/bin/sh
[ "$1" = version ] && echo '"28.2.2"' && exit
for last; do :; done
cp -r "$last" "$CONTEXT"
"""


@pytest.fixture(scope="module")
def store(bundle, tmp_path_factory) -> dict[str, str]:
    """A model store with the bundle in it, put there by ``patchcore pack``."""
    environment = {"BENTOML_HOME": str(tmp_path_factory.mktemp("bentoml"))}
    command = [str(Path(PYTHON).parent / "patchcore"), "pack", str(bundle)]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Packed as patchcore:" in result.stdout
    return environment


def test_answers_as_the_runtime(client, runtime, test_images):
    for path in (test_images[0], test_images[-1]):
        response = predict(client, path)
        assert response.status_code == 200, response.text
        expected = runtime.predict([path])[0]
        regions = [
            {name: value for name, value in vars(region).items() if name != "mm_per_pixel"} for region in expected.regions
        ]
        answer = response.json()
        assert answer.pop("milliseconds").keys() == {"decode", "network", "search", "answer"}
        assert (
            answer
            == {
                "score": pytest.approx(expected.score, rel=1e-6),
                "normalized_score": pytest.approx(expected.normalized_score, rel=1e-6),
                "p_value": None,  # anomalib's own post-processor calibrates none
                "verdict": expected.verdict,
                "threshold": pytest.approx(expected.threshold, rel=1e-6),
                "ratio": pytest.approx(expected.score / expected.threshold, rel=1e-6),
                "pixel_threshold": pytest.approx(expected.pixel_threshold, rel=1e-6),
                "regions": [{**region, "peak": pytest.approx(region["peak"], rel=1e-6), "mm": None} for region in regions],
                "small_regions": 0,
                "size": {"width": 300, "height": 300},
                "model": "cells",
                "version": hashlib.sha256((Path(runtime.path) / "manifest.json").read_bytes()).hexdigest()[:12],
                "review_threshold": None,
                "record": None,
                "heatmap": None,
            }
        )


def test_body_that_is_an_image(client, test_images):
    """An image may be the body itself; fields go into the query."""
    expected = predict(client, test_images[0], heatmap="true").json()
    response = client.post(
        "/predict?heatmap=true&model=cells",
        content=test_images[0].read_bytes(),
        headers={"content-type": "image/png"},
    )
    assert without_times(response.json()) == without_times(expected)


def test_several_images(client, test_images):
    """Answers come in order, each the same as alone; one that is no image does not spoil the others."""
    parts = [("images", (path.name, path.read_bytes())) for path in test_images[:5]]
    parts.insert(2, ("images", ("text.png", b"no image")))
    response = client.post("/predict_batch", files=parts)
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert [result["name"] for result in results] == [name for _, (name, _) in parts]
    problem = results.pop(2)
    assert (problem["answer"], problem["problem"]["code"]) == (None, "image_unreadable")
    assert problem["problem"]["request_id"] == response.headers["x-request-id"]
    for path, result in zip(test_images[:5], results, strict=True):
        assert without_times(result["answer"]) == without_times(predict(client, path).json())


@pytest.mark.parametrize("kind", ["overlay", "map"])
def test_heatmap_alone(client, runtime, test_images, kind):
    (prediction,) = runtime.predict(test_images[:1])
    response = client.post("/heatmap", files={"image": test_images[0].read_bytes()}, data={"kind": kind})
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert float(response.headers["x-score"]) == pytest.approx(prediction.score, rel=1e-6)
    assert response.headers["x-verdict"] == prediction.verdict
    picture = np.asarray(Image.open(io.BytesIO(response.content)))
    if kind == "overlay":
        np.testing.assert_array_equal(picture, np.asarray(runtime.heatmap(test_images[0], prediction)))
    else:
        np.testing.assert_allclose(picture / 65535, prediction.normalized_map, atol=1e-5)


def test_explain(client, runtime, test_images):
    """Crops and nearest normal patches, as the runtime names them."""
    response = client.post("/explain", files={"image": test_images[0].read_bytes()})
    assert response.status_code == 200, response.text
    explained, plain = response.json(), predict(client, test_images[0]).json()
    found = explained.pop("reasons")
    assert without_times(explained) == without_times(plain)
    unreadable = client.post("/explain", files={"image": b"x"})
    assert (unreadable.status_code, unreadable.json()["code"]) == (400, "image_unreadable")
    _, reasons = runtime.explain(test_images[0])
    for reason, expected in zip(found, reasons, strict=True):
        nearest = reason["nearest"]
        assert (nearest["image"], nearest["row"]) == (expected.nearest.image, expected.nearest.row)
        assert nearest["distance"] == pytest.approx(expected.nearest.distance, rel=1e-6)
        assert nearest["crop"] is None, "the bundle has no thumbnails"
        assert reason["box"] == vars(expected.box)
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(reason["crop"]))))
        np.testing.assert_array_equal(picture, expected.crop)


def test_models(client, runtime):
    listed = client.get("/models").json()
    manifest = runtime.manifest
    assert listed["default"] == "cells"
    (model,) = listed["models"]
    assert (model["name"], model["loaded"], model["problem"]) == ("cells", True, None)
    assert model["input_size"] == {"width": 256, "height": 256}
    assert (model["bank_size"], model["index"], model["precision"]) == (manifest.bank_size, manifest.index.kind, "f32")
    assert model["threshold"] == pytest.approx(manifest.image.threshold), "at a sensitivity of 0.5"
    assert model["sha256"] == {name: file.sha256 for name, file in manifest.files.items()}
    response = client.post("/predict?model=other", files={"image": b"x"})
    assert response.status_code == 404
    assert response.json()["detail"] == "There is no model 'other'. Models: cells."


def test_metrics_and_log(server, client, test_images):
    given = "line-7.shift_2"
    image = {"image": test_images[0].read_bytes()}
    assert client.post("/predict", files=image, headers={"x-request-id": given}).headers["x-request-id"] == given
    hostile = client.post("/predict", files={"image": b"x"}, headers={"x-request-id": "a b"})
    assert hostile.headers["x-request-id"] == hostile.json()["request_id"] != "a b"

    def line() -> str:
        return next((line for line in server.log.read_text().splitlines() if f'request_id="{given}"' in line), "")

    wait_for(line, 10)  # it follows the answer
    assert "status=200" in line()
    assert "verdict=" in line()
    metrics = client.get("/metrics").text
    for name in (
        'patchcore_verdicts_total{model="cells",verdict="anomalous"}',
        'patchcore_normalized_score_count{model="cells"}',
        'patchcore_stage_seconds_count{stage="search"}',
        "patchcore_requests_inside 0.0",
        'patchcore_model_loads_total{model="cells",result="loaded"} 1.0',
        'patchcore_rejected_total{code="image_unreadable"}',
        "patchcore_request_images_count",
        'patchcore_requests_total{route="/predict",status="200"}',
        'patchcore_request_seconds_count{route="/predict"}',
    ):
        assert name in metrics, name


def test_heatmap_on_request(client, runtime, test_images):
    answer = predict(client, test_images[0], heatmap="true").json()
    picture = Image.open(io.BytesIO(base64.b64decode(answer["heatmap"])))
    expected = runtime.heatmap(test_images[0], runtime.predict([test_images[0]])[0])
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_photo_in_color(client):
    photo = Image.effect_mandelbrot((1024, 768), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    answer = predict(client, encoded(photo, "JPEG")).json()
    assert answer["size"] == {"width": 1024, "height": 768}
    assert answer["verdict"] == "anomalous"


def test_curl_as_in_the_readme(server, test_images):
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.strip().startswith("curl"))
    command = line.strip().replace("http://127.0.0.1:3000", server).replace("cell.png", str(test_images[0]))
    assert command != line.strip()
    result = subprocess.run([*command.split(), "--silent"], capture_output=True, text=True, timeout=60, check=False)
    assert '"verdict":"anomalous"' in result.stdout, result.stderr


def test_parallel_requests(client, runtime, test_images):
    expected = [answer.score for answer in runtime.predict(test_images[:24])]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: predict(client, path).json()["score"], test_images[:24]))
    np.testing.assert_allclose(answers, expected, rtol=1e-6)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\x00\x00"], ids=["empty", "text", "truncated"])
def test_files_that_are_no_image(client, content):
    response = client.post("/predict", files={"image": ("cell.png", content, "image/png")})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "image_unreadable"
    assert "'cell.png' cannot be read as an image" in response.text
    assert "Traceback" not in response.text
    assert "tmp" not in response.text


def test_missing_field_and_wrong_flag(client, test_images):
    response = client.post("/predict", files={"picture": b"x"})
    assert (response.status_code, response.json()["code"]) == (400, "image_missing")
    assert "image" in response.text
    response = predict(client, test_images[0], heatmap="perhaps")
    assert (response.status_code, response.json()["code"]) == (400, "field_invalid")
    text = client.post("/predict", files={"image": (None, "http://127.0.0.1:9/cell.png")})
    assert (text.status_code, text.json()["code"]) == (400, "image_missing"), "a URL is never fetched"


def test_pickle_is_refused(client):
    response = client.post("/predict", content=b"\x80\x04.", headers={"content-type": "application/vnd.bentoml+pickle"})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


def test_openapi_describes_the_answer(client):
    document = client.get("/docs.json").text
    for word in ("/predict", "normalized_score", "feature units", "heatmap"):
        assert word in document
    assert {"/predict", "/explain", "/models"} <= client.get("/docs.json").json()["paths"].keys()


def test_from_the_model_store(store, runtime, test_images, tmp_path):
    with bentoml_serve(SERVE, tmp_path, **store, PATCHCORE_BUNDLE="") as server:
        answer = predict(server.client, test_images[0]).json()
    assert answer["score"] == pytest.approx(runtime.predict(test_images[:1])[0].score, rel=1e-6)


def test_nothing_to_serve(tmp_path):
    with pytest.raises(RuntimeError) as caught:  # noqa: SIM117
        with bentoml_serve(SERVE, tmp_path, BENTOML_HOME=str(tmp_path / "home"), PATCHCORE_BUNDLE=""):
            pytest.fail("a server without a model must not become ready")
    assert "There is no model to serve. Set PATCHCORE_BUNDLE" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "patchcore pack BUNDLE" in str(caught.value)


def differing(found: filecmp.dircmp) -> list[str]:
    """Files of two folders that differ or are in one alone."""
    below = [f"{name}/{file}" for name, folder in found.subdirs.items() for file in differing(folder)]
    return [*found.left_only, *found.right_only, *found.diff_files, *below]


@pytest.fixture(scope="module")
def bento(store, tmp_path_factory):
    """Folder of the bento that ``bentoml build`` makes of a clean copy of the repository, and the copy."""
    source = tmp_path_factory.mktemp("clone")
    for folder in ("bento", "patchcore_plugin"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run(
        BUILD, cwd=source, env={**os.environ, **store}, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (bento,) = (path.parent for path in Path(store["BENTOML_HOME"], "bentos").rglob("bento.yaml"))
    return bento, source


@pytest.fixture(scope="module")
def context(bento, store, tmp_path_factory):
    """What ``bentoml containerize`` gives to the container engine, whose place is taken by a program that copies it."""
    folder = tmp_path_factory.mktemp("engine")
    engine = folder / "docker"
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    environment = {**os.environ, **store, "PATH": f"{folder}:{os.environ['PATH']}", "CONTEXT": str(folder / "context")}
    command = [*BENTOML, "containerize", f"patchcore:{bento[0].name}", "--image-tag", "patchcore:latest"]
    # from /, as bento/README.md says
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (folder / "context").is_dir(), done.stdout + done.stderr
    return folder / "context"


def test_built_bento_serves(bento, context, store, runtime, bundle_copy, test_images, tmp_path):
    """The bento has model and code inside, and serves them in a container; its packages are here those of the tests."""
    bento, source = bento
    environment = {**os.environ, **store}
    names = {path.relative_to(bento / "src").as_posix() for path in (bento / "src").rglob("*.py")}
    assert {"bento/service.py", "patchcore_plugin/runtime/runtime.py", "patchcore_plugin/memory_bank/bank.py"} <= names
    without_torch = {"bundle", "cli", "memory_bank", "operations", "record", "runtime", "scoring", "watching", "webhook"}
    folders = {"bento", "patchcore_plugin", *(f"patchcore_plugin/{name}" for name in without_torch)}
    assert {Path(name).parent.as_posix() for name in names} == folders
    again = [*BUILD, "--version", "again"]
    subprocess.run(again, cwd=source, env=environment, capture_output=True, timeout=300, check=True)
    differ = differing(filecmp.dircmp(bento, bento.with_name("again")))
    assert differ == ["README.md", "bento.yaml"], "which BentoML writes: version and time"
    # A newer model in the store must not slip into a bento that was built with another.
    change_manifest(bundle_copy, name="newer")
    subprocess.run([str(Path(PYTHON).parent / "patchcore"), "pack", str(bundle_copy)], env=environment, check=True)
    assert (bento / "src" / "bento" / "ui" / "index.html").is_file()
    locked = re.findall(r"^([\w.-]+)==", (bento / "env" / "python" / "requirements.lock.txt").read_text(), re.MULTILINE)
    assert {"openvino", "faiss-cpu", "bentoml", "fastapi"} <= set(locked)
    assert {"torch", "anomalib"}.isdisjoint(locked)
    check_image(ContainerImage(context, tmp_path / "image", install=False), runtime, test_images, tmp_path)


def check_image(image, runtime, test_images, folder):
    """The image's entrypoint serves the model in it, and the health check tells when."""
    with bentoml_serve(image.entrypoint, folder, **image.environment, PATCHCORE_BUNDLE="") as server:
        answer = predict(server.client, test_images[0]).json()
        with bentoml.SyncHTTPClient(str(server)) as client:  # it calls the methods that the built service describes
            assert client.predict(image=test_images[0])["score"] == answer["score"]
            (item,) = client.predict_batch(images=[test_images[0]])["results"]
            assert item["answer"]["score"] == client.explain(image=test_images[0])["score"] == answer["score"]
            assert client.heatmap(image=test_images[0]).size == (300, 300)
            assert [model["name"] for model in client.models()["models"]] == ["cells"]
        environment = {**image.environment, "PATCHCORE_PORT": server.rpartition(":")[2]}
        assert subprocess.run(image.health_check, env=environment, check=False).returncode == 0
    assert subprocess.run(image.health_check, env=environment, capture_output=True, check=False).returncode != 0
    assert answer["model"] == "cells"
    assert answer["score"] == pytest.approx(runtime.predict(test_images[:1])[0].score, rel=1e-6)


def test_dockerfile(context):
    steps = instructions((context / DOCKERFILE).read_text())
    words = dict(steps)
    assert words["FROM"] == "python:3.11-slim AS base-container"
    assert words["USER"] == "1034", "a number, which Kubernetes' runAsNonRoot can check"
    assert words["EXPOSE"] == "3000", "the service's only port"
    assert words["ENTRYPOINT"] == '[ "/home/bentoml/bento/env/docker/entrypoint.sh" ]'
    assert "BENTOML_CONTAINERIZED=true" in [rest for name, rest in steps if name == "ENV"]
    names = [name for name, _ in steps]
    assert names.index("USER") > max(number for number, name in enumerate(names) if name in ("RUN", "COPY")), "owned by root"
    commands = [rest for name, rest in steps if name == "RUN"]
    assert not [command for command in commands if re.search(r"apt|uv|curl|build-essential", command)]
    (install,) = (command for command in commands if "install" in command)
    assert "--no-cache-dir" in install
    assert "--no-deps -r ./env/python/requirements.lock.txt" in install


@pytest.mark.slow
def test_steps_of_the_dockerfile(context, runtime, test_images, tmp_path):
    """They are run in a folder of their own: the packages of the lock, the code and the model of the bento serve there."""
    image = ContainerImage(context, tmp_path / "image", install=True)
    packages = tmp_path / "image" / "app"
    size = sum(path.lstat().st_size for path in packages.rglob("*") if path.is_file())
    print(f"packages in the image: {size / 2**20:.0f} MiB")
    assert size < 600 << 20
    assert (packages / ".venv" / "bin" / "bentoml").is_file()
    check_image(image, runtime, test_images, tmp_path)


@pytest.mark.slow
def test_base_and_serve_install_alone(bundle, runtime, test_images, tmp_path):
    """In a virtual environment without torch the service starts and answers. Its small twin is unit/test_imports.py."""
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{ROOT}[serve]"], check=True, timeout=900)
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout.lower().split()
    assert not {"torch", "torchvision", "lightning", "anomalib", "timm", "matplotlib"} & set(listed)
    command = [python, "-m", "bentoml", "serve", SERVICE]
    with bentoml_serve(command, tmp_path, PATCHCORE_BUNDLE=str(bundle)) as server:
        answer = predict(server.client, test_images[0], heatmap="true").json()
    assert answer["score"] == pytest.approx(runtime.predict(test_images[:1])[0].score, rel=1e-6)
    assert answer["heatmap"]
    # From the top of a clone, whose patchcore_plugin/ hides the installed one.
    with bentoml_serve(command, tmp_path, cwd=ROOT, PATCHCORE_BUNDLE=str(bundle)) as server:
        assert predict(server.client, test_images[0]).status_code == 200
    patchcore = str(scripts / "patchcore")
    train = subprocess.run([patchcore, "train", "--help"], capture_output=True, text=True, check=False)
    assert train.returncode == 1
    assert "pip install 'patchcore-plugin[train]'" in train.stderr
