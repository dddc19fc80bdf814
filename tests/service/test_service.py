"""The BentoML service: real servers, started from a path, from the model store, and from a built bento."""

import base64
import filecmp
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from contextlib import nullcontext
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers.server import BENTOML, SERVE, SERVICE, bentoml_serve
from helpers.training import ROOT
from PIL import Image

PYTHON = sys.executable


@pytest.fixture(scope="module")
def url(bundle, tmp_path_factory):
    with bentoml_serve(SERVE, tmp_path_factory.mktemp("serve"), PATCHCORE_BUNDLE=str(bundle)) as url:
        yield url


@pytest.fixture(scope="module")
def store(bundle, tmp_path_factory) -> dict[str, str]:
    """A model store with the bundle in it, put there by ``patchcore pack``."""
    environment = {"BENTOML_HOME": str(tmp_path_factory.mktemp("bentoml"))}
    command = [str(Path(PYTHON).parent / "patchcore"), "pack", str(bundle)]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Packed as patchcore:" in result.stdout
    return environment


def ask(url, path, **fields):
    return httpx.post(f"{url}/predict", files={"image": path.read_bytes()}, data=fields, timeout=60)


def test_answers_as_the_runtime(url, runtime, test_images):
    for path in (test_images[0], test_images[-1]):
        response = ask(url, path)
        assert response.status_code == 200, response.text
        expected = runtime.predict([path])[0]
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
                "pixel_threshold": pytest.approx(expected.pixel_threshold, rel=1e-6),
                "regions": [pytest.approx(vars(region), rel=1e-6) for region in expected.regions],
                "size": {"width": 300, "height": 300},
                "model": "cells",
                "version": hashlib.sha256((Path(runtime.path) / "manifest.json").read_bytes()).hexdigest()[:12],
                "heatmap": None,
            }
        )


def test_bytes_as_they_are(url, test_images):
    """An image may be the body itself; fields go into the query."""
    expected = ask(url, test_images[0], heatmap="true").json()
    response = httpx.post(
        f"{url}/predict?heatmap=true&model=cells",
        content=test_images[0].read_bytes(),
        headers={"content-type": "image/png"},
        timeout=60,
    )
    answer = response.json()
    assert {**answer, "milliseconds": None} == {**expected, "milliseconds": None}


def test_several_images(url, test_images):
    """Answers come in order, each the same as alone; one that is no image does not spoil the others."""
    parts = [("images", (path.name, path.read_bytes())) for path in test_images[:5]]
    parts.insert(2, ("images", ("text.png", b"no image")))
    response = httpx.post(f"{url}/predict_batch", files=parts, timeout=60)
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert [result["name"] for result in results] == [name for _, (name, _) in parts]
    problem = results.pop(2)
    assert (problem["answer"], problem["problem"]["code"]) == (None, "image_unreadable")
    for path, result in zip(test_images[:5], results, strict=True):
        alone = ask(url, path).json()
        assert {**result["answer"], "milliseconds": None} == {**alone, "milliseconds": None}


@pytest.mark.parametrize("kind", ["overlay", "map"])
def test_heatmap_alone(url, runtime, test_images, kind):
    (prediction,) = runtime.predict(test_images[:1])
    response = httpx.post(f"{url}/heatmap", files={"image": test_images[0].read_bytes()}, data={"kind": kind}, timeout=60)
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert float(response.headers["x-score"]) == pytest.approx(prediction.score, rel=1e-6)
    assert response.headers["x-verdict"] == prediction.verdict
    picture = np.asarray(Image.open(io.BytesIO(response.content)))
    if kind == "overlay":
        np.testing.assert_array_equal(picture, np.asarray(runtime.heatmap(test_images[0], prediction)))
    else:
        np.testing.assert_allclose(picture / 65535, prediction.normalized_map, atol=1e-5)


@pytest.mark.parametrize("runner", ["inside", "process"])
def test_explain(url, bundle, runtime, test_images, tmp_path, runner):
    """Crops and nearest normal patches, as the runtime names them; the same where another process computes."""
    with (
        nullcontext(url)
        if runner == "inside"
        else bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_RUNNER=runner) as server
    ):
        response = httpx.post(f"{server}/explain", files={"image": test_images[0].read_bytes()}, timeout=60)
        assert response.status_code == 200, response.text
        explained, plain = response.json(), ask(server, test_images[0]).json()
        assert {name: explained[name] for name in plain if name != "milliseconds"} == {
            name: plain[name] for name in plain if name != "milliseconds"
        }
        unreadable = httpx.post(f"{server}/explain", files={"image": b"x"}, timeout=60)
        assert (unreadable.status_code, unreadable.json()["code"]) == (400, "image_unreadable")
    _, reasons = runtime.explain(test_images[0])
    assert len(explained["reasons"]) == len(reasons)
    for found, expected in zip(explained["reasons"], reasons, strict=True):
        nearest = found["nearest"]
        assert (nearest["image"], nearest["row"]) == (expected.nearest.image, expected.nearest.row)
        assert nearest["distance"] == pytest.approx(expected.nearest.distance, rel=1e-6)
        assert nearest["crop"] is None, "the bundle has no thumbnails"
        assert found["box"] == vars(expected.box)
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["crop"]))))
        np.testing.assert_array_equal(picture, expected.crop)


def test_models(url, runtime):
    listed = httpx.get(f"{url}/models", timeout=60).json()
    manifest = runtime.manifest
    assert listed["default"] == "cells"
    (model,) = listed["models"]
    assert (model["name"], model["loaded"], model["problem"]) == ("cells", True, None)
    assert model["input_size"] == {"width": 256, "height": 256}
    assert (model["bank_size"], model["index"], model["precision"]) == (manifest.bank_size, manifest.index.kind, "f32")
    assert model["threshold"] == pytest.approx(manifest.image.threshold)
    assert model["sha256"] == {name: file.sha256 for name, file in manifest.files.items()}
    response = httpx.post(f"{url}/predict?model=other", files={"image": b"x"}, timeout=60)
    assert response.status_code == 404
    assert response.json()["detail"] == "There is no model 'other'. Models: cells."


def test_metrics_and_log(url, test_images):
    given = "line-7.shift_2"
    response = httpx.post(
        f"{url}/predict", files={"image": test_images[0].read_bytes()}, headers={"x-request-id": given}, timeout=60
    )
    assert response.headers["x-request-id"] == given
    hostile = httpx.post(f"{url}/predict", files={"image": b"x"}, headers={"x-request-id": "a b"}, timeout=60)
    assert hostile.headers["x-request-id"] == hostile.json()["request_id"] != "a b"
    time.sleep(0.2)  # the line follows the answer
    lines = url.log.read_text().splitlines()
    assert any(f'request_id="{given}"' in line and "status=200" in line and "verdict=" in line for line in lines)
    metrics = httpx.get(f"{url}/metrics", timeout=60).text
    for name in (
        'patchcore_verdicts_total{model="cells",verdict="anomalous"}',
        'patchcore_normalized_score_count{model="cells"}',
        'patchcore_stage_seconds_count{stage="search"}',
        "patchcore_requests_inside 0.0",
        'patchcore_model_loads_total{model="cells",result="loaded"} 1.0',
        'patchcore_rejected_total{code="image_unreadable"}',
        "patchcore_request_images_count",
        "bentoml_service_request_total",
    ):
        assert name in metrics, name


def test_heatmap_on_request(url, runtime, test_images):
    picture = Image.open(io.BytesIO(base64.b64decode(ask(url, test_images[0], heatmap="true").json()["heatmap"])))
    expected = runtime.heatmap(test_images[0], runtime.predict([test_images[0]])[0])
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_photo_in_colour(url, tmp_path):
    path = tmp_path / "photo.jpg"
    Image.effect_mandelbrot((1024, 768), (-2, -1.2, 1, 1.2), 60).convert("RGB").save(path)
    answer = ask(url, path).json()
    assert answer["size"] == {"width": 1024, "height": 768}
    assert answer["verdict"] == "anomalous"


def test_curl_as_in_the_readme(url, test_images):
    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if line.strip().startswith("curl"))
    command = line.strip().replace("http://127.0.0.1:3000", url).replace("cell.png", str(test_images[0]))
    assert command != line.strip()
    result = subprocess.run([*command.split(), "--silent"], capture_output=True, text=True, timeout=60, check=False)
    assert '"verdict":"anomalous"' in result.stdout, result.stderr


def test_parallel_requests(url, runtime, test_images):
    from concurrent.futures import ThreadPoolExecutor

    expected = [answer.score for answer in runtime.predict(test_images[:24])]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: ask(url, path).json()["score"], test_images[:24]))
    np.testing.assert_allclose(answers, expected, rtol=1e-6)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\x00\x00"], ids=["empty", "text", "truncated"])
def test_bodies_that_are_no_image(url, content):
    response = httpx.post(f"{url}/predict", files={"image": ("cell.png", content, "image/png")}, timeout=60)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "image_unreadable"
    assert "'cell.png' cannot be read as an image" in response.text
    assert "Traceback" not in response.text
    assert "tmp" not in response.text


def test_decompression_bomb(url):
    stream = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(stream, "PNG")
    response = httpx.post(f"{url}/predict", files={"image": ("bomb.png", stream.getvalue(), "image/png")}, timeout=60)
    assert response.status_code == 413
    assert response.json()["code"] == "image_too_large"


def test_missing_field_and_wrong_flag(url, test_images):
    response = httpx.post(f"{url}/predict", files={"picture": b"x"}, timeout=60)
    assert response.status_code == 400
    assert "image" in response.text
    response = ask(url, test_images[0], heatmap="perhaps")
    assert (response.status_code, response.json()["code"]) == (400, "field_invalid")
    text = httpx.post(f"{url}/predict", files={"image": (None, "http://127.0.0.1:9/cell.png")}, timeout=60)
    assert (text.status_code, text.json()["code"]) == (400, "image_missing"), "a URL is never fetched"


def test_pickle_is_refused(url):
    response = httpx.post(f"{url}/predict", content=b"\x80\x04.", headers={"content-type": "application/vnd.bentoml+pickle"})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


def test_openapi_describes_the_answer(url):
    document = httpx.get(f"{url}/docs.json", timeout=60).text
    for word in ("/predict", "normalized_score", "feature units", "heatmap"):
        assert word in document


SPANS = """
import asyncio, json, sys
from pathlib import Path
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from patchcore_plugin.bento.service import PatchcoreService

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
service = PatchcoreService.inner()
with provider.get_tracer("test").start_as_current_span("POST /predict"):
    answer = asyncio.run(service.answer(Path(sys.argv[1]).read_bytes(), "cell.png", None))
(span,) = exporter.get_finished_spans()
print(json.dumps([dict(span.attributes), answer.model_dump(include={"score", "version", "milliseconds"})]))
"""


def test_spans(bundle, test_images):
    """A request's span says how long each stage took. (What sends it is a package of its own.)"""
    done = subprocess.run(
        [PYTHON, "-c", SPANS, str(test_images[0])],
        env={**os.environ, "PATCHCORE_BUNDLE": str(bundle)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    attributes, answer = json.loads(done.stdout)
    expected = {f"patchcore.{stage}_ms": spent for stage, spent in answer["milliseconds"].items()}
    assert attributes == {
        **expected, "patchcore.model": "cells", "patchcore.version": answer["version"], "patchcore.score": answer["score"]
    }  # fmt: skip


def test_from_the_model_store(store, runtime, test_images, tmp_path):
    with bentoml_serve(SERVE, tmp_path, **store, PATCHCORE_BUNDLE="") as url:
        assert ask(url, test_images[0]).json()["score"] == pytest.approx(runtime.predict(test_images[:1])[0].score, rel=1e-6)


def test_nothing_to_serve(tmp_path):
    with pytest.raises(RuntimeError) as caught:  # noqa: SIM117
        with bentoml_serve(SERVE, tmp_path, BENTOML_HOME=str(tmp_path / "home"), PATCHCORE_BUNDLE=""):
            pytest.fail("a server without a model must not become ready")
    assert "There is no model to serve. Set PATCHCORE_BUNDLE" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "patchcore pack BUNDLE" in str(caught.value)


def test_damaged_bundle(bundle_copy, tmp_path):
    (bundle_copy / "bank.faiss").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"bank\.faiss has 0 bytes, its manifest says"):  # noqa: SIM117
        with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle_copy)):
            pytest.fail("a server with a damaged bundle must not become ready")


def differing(found: filecmp.dircmp) -> list[str]:
    """Files of two folders that differ or are in one alone."""
    below = [f"{name}/{file}" for name, folder in found.subdirs.items() for file in differing(folder)]
    return [*found.left_only, *found.right_only, *found.diff_files, *below]


def test_built_bento_serves(store, runtime, bundle_copy, test_images, tmp_path):
    """``bentoml build`` from a clean copy of the repository; the bento has model and code inside."""
    source = tmp_path / "clone"
    for folder in ("bento", "patchcore_plugin"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, **store}
    build = [*BENTOML, "build", "--bentofile", "bento/bentofile.yaml", "."]
    result = subprocess.run(build, cwd=source, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (bento,) = (path.parent for path in Path(store["BENTOML_HOME"], "bentos").rglob("bento.yaml"))
    names = {path.relative_to(bento / "src").as_posix() for path in (bento / "src").rglob("*.py")}
    assert {"bento/service.py", "patchcore_plugin/runtime/runtime.py", "patchcore_plugin/memory_bank/bank.py"} <= names
    without_torch = {"bundle", "cli", "memory_bank", "operations", "runtime", "scoring"}
    folders = {"bento", "patchcore_plugin", *(f"patchcore_plugin/{name}" for name in without_torch)}
    assert {Path(name).parent.as_posix() for name in names} == folders
    again = [*build, "--version", "again"]
    subprocess.run(again, cwd=source, env=environment, capture_output=True, timeout=300, check=True)
    differ = differing(filecmp.dircmp(bento, bento.with_name("again")))
    assert differ == ["README.md", "bento.yaml"], "which BentoML writes: version and time"
    # A newer model in the store must not slip into a bento that was built with another.
    newer = json.loads((bundle_copy / "manifest.json").read_text()) | {"name": "newer"}
    (bundle_copy / "manifest.json").write_text(json.dumps(newer))
    subprocess.run([str(Path(PYTHON).parent / "patchcore"), "pack", str(bundle_copy)], env=environment, check=True)
    assert (bento / "src" / "bento" / "ui" / "index.html").is_file()
    locked = re.findall(r"^([\w.-]+)==", (bento / "env" / "python" / "requirements.txt").read_text(), re.MULTILINE)
    assert {"openvino", "faiss-cpu", "bentoml", "fastapi"} <= set(locked)
    assert {"torch", "anomalib"}.isdisjoint(locked)
    with bentoml_serve([*BENTOML, "serve", "patchcore:latest"], tmp_path, **store, PATCHCORE_BUNDLE="") as url:
        answer = ask(url, test_images[0]).json()
    assert answer["model"] == "cells"
    assert answer["score"] == pytest.approx(runtime.predict(test_images[:1])[0].score, rel=1e-6)


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
    with bentoml_serve(command, tmp_path, PATCHCORE_BUNDLE=str(bundle)) as url:
        answer = ask(url, test_images[0], heatmap="true").json()
    assert answer["score"] == pytest.approx(runtime.predict(test_images[:1])[0].score, rel=1e-6)
    assert answer["heatmap"]
    # From the top of a clone, whose patchcore_plugin/ hides the installed one.
    with bentoml_serve(command, tmp_path, cwd=ROOT, PATCHCORE_BUNDLE=str(bundle)) as url:
        assert ask(url, test_images[0]).status_code == 200
    patchcore = str(scripts / "patchcore")
    train = subprocess.run([patchcore, "train", "--help"], capture_output=True, text=True, check=False)
    assert train.returncode == 1
    assert "pip install 'patchcore-plugin[train]'" in train.stderr
