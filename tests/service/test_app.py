"""The application with many settings, served from this process: limits, keys, models, drift, traces, logs."""

import asyncio
import json
import logging
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bentoml.exceptions import BentoMLConfigException
from click.testing import CliRunner
from helpers.bundles import change_manifest
from helpers.http import Load, predict, predict_batch, wait_for
from helpers.pictures import black_png, encoded
from helpers.server import app_server, serve_app
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from patchcore_plugin.bento.app import make_app, make_pipeline
from patchcore_plugin.bento.logs import LogFormatter
from patchcore_plugin.bento.metrics import Metrics
from patchcore_plugin.bento.pipeline import ImageFile, Pipeline
from patchcore_plugin.bento.problems import ProblemError
from patchcore_plugin.bento.repository import make_repository
from patchcore_plugin.bento.service import check, make_service
from patchcore_plugin.bento.settings import Settings
from PIL import Image
from prometheus_client import CollectorRegistry

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import read_manifest
from patchcore_plugin.cli import main


@pytest.fixture
def bundles(bundle, tmp_path):
    """A folder of two bundles, ``left`` and ``right``."""
    for name in ("left", "right"):
        shutil.copytree(bundle, tmp_path / "bundles" / name)
    return tmp_path / "bundles"


@pytest.fixture
def log(caplog):
    """What the service writes to its log."""
    caplog.set_level(logging.INFO, "patchcore.service")
    return caplog


def test_queue_limit(bundle, test_images):
    """Requests beyond the limit are answered 503 at once, with Retry-After; nothing else fails."""
    with app_server(bundle=bundle, queue=2) as server:
        with ThreadPoolExecutor(12) as pool:
            responses = list(pool.map(lambda _: predict(server.client, test_images[0]), range(80)))
        busy = [response for response in responses if response.status_code == 503]
        assert {response.status_code for response in responses} == {200, 503}
        assert all(response.headers["retry-after"] == "1" and response.json()["code"] == "busy" for response in busy)
        assert predict(server.client, test_images[0]).status_code == 200
        assert server.registry.get_sample_value("patchcore_rejected_total", {"code": "busy"}) == len(busy)
        assert server.registry.get_sample_value("patchcore_requests_inside") == 0


def test_key(bundle, test_images, log):
    with app_server(bundle=bundle, api_key="sésame") as server:
        for path in ("/metrics", "/docs.json", "/drift", "/samples", "/uix", "/x"):
            assert server.client.get(path).status_code == 401, path
        assert server.client.get("/", follow_redirects=True).status_code == 200, "the page asks for the key"
        for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": ""}):
            response = server.client.post("/predict", files={"image": test_images[0].read_bytes()}, headers=headers)
            assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
            assert server.client.get("/models", headers=headers).status_code == 401
        headers = {"x-api-key": "sésame".encode()}
        response = server.client.post("/predict", files={"image": test_images[0].read_bytes()}, headers=headers)
        assert response.status_code == 200
        assert server.client.get("/metrics", headers=headers).status_code == 200
    with app_server(bundle=bundle, api_key="sésame", open_metrics=True) as server:
        assert server.client.get("/metrics").status_code == 200
        assert server.client.get("/docs.json").status_code == 401
    lines = [LogFormatter(form).format(record) for record in log.records for form in ("text", "json")]
    assert lines
    assert not any("sésame" in line or "s\\u00e9same" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"default_model": "other"}, "PATCHCORE_DEFAULT_MODEL: there is no bundle 'other'; found: cells"),
        ({"bundle": None, "bundles": Path("absent")}, "PATCHCORE_BUNDLES: there is no folder absent"),
        ({"bundle": Path("absent")}, "There is no bundle folder absent"),
    ],
)
def test_wrong_settings_end_the_start(bundle, settings, message):
    with pytest.raises(BentoMLConfigException, match=message):
        check(Settings(**{"bundle": bundle, **settings}))


def test_single_damaged_bundle_ends_the_start(bundle_copy):
    (bundle_copy / "bank.faiss").write_bytes(b"")
    with pytest.raises(BentoMLConfigException, match=r"bank\.faiss has 0 bytes, its manifest says"):
        check(Settings(bundle=bundle_copy))


def test_start_prints_settings_and_damaged_bundles(bundles, tmp_path, capsys):
    (bundles / "left" / "bank.faiss").write_bytes(b"")
    check(Settings(bundles=bundles, queue=17, api_key="secret"))
    printed = capsys.readouterr().err
    assert "queue: 17" in printed
    assert "secret" not in printed
    assert "left cannot be served: " in printed
    assert "right cannot be served" not in printed
    (tmp_path / "empty").mkdir()
    check(Settings(bundles=tmp_path / "empty"))
    assert f"There is no bundle in {tmp_path / 'empty'} yet." in capsys.readouterr().err


def test_settings_configure_bentoml():
    service = make_service(Settings(workers=3, port=3123, timeout=7, runner="process", runner_workers=2))
    assert (service.config["workers"], service.config["http"]["port"], service.config["traffic"]["timeout"]) == (3, 3123, 32)
    assert service.all_services()["patchcore-runner"].config["workers"] == 2
    assert set(make_service(Settings()).all_services()) == {"patchcore"}


def test_log_line_as_json(bundle, log):
    with app_server(bundle=bundle) as server:
        predict(server.client, b"no image")
    (line,) = (json.loads(LogFormatter("json").format(record)) for record in log.records if record.message == "request")
    assert (line["level"], line["logger"]) == ("INFO", "patchcore.service")
    assert (line["status"], line["code"], line["path"]) == (400, "image_unreadable", "/predict")


class BrokenScorer:
    """A scorer with a bug."""

    def score(self, model, images):
        return images / 0

    def is_ready(self):
        return True


def test_bug_is_a_problem_without_details(bundle, test_images, log):
    settings, registry = Settings(bundle=bundle), CollectorRegistry()
    metrics = Metrics(registry)
    pipeline = Pipeline(
        make_repository(settings, metrics),
        BrokenScorer(),
        metrics,
        max_pixels=10**6,
        max_images=32,
        max_batch_pixels=10**7,
        parallel=1,
        parallel_large=1,
    )
    with serve_app(make_app(settings, pipeline)) as server:
        response = predict(server.client, test_images[0])
        assert (response.status_code, response.json()["code"]) == (500, "internal")
        assert response.json()["request_id"] == response.headers["x-request-id"]
        assert "TypeError" not in response.text
        assert server.client.get("/models").status_code == 200
    assert registry.get_sample_value("patchcore_rejected_total", {"code": "internal"}) == 1
    (record,) = (record for record in log.records if record.exc_info)
    assert response.json()["request_id"] in record.getMessage()
    assert "TypeError: unsupported operand" in LogFormatter("text").format(record)


class WaitingScorer:
    """A scorer that waits until it is let go, as one does that has a large image."""

    def __init__(self) -> None:
        self.let_go, self.running = threading.Event(), []

    def score(self, model, images):
        self.running.append(images)
        self.let_go.wait(60)
        self.running.pop()
        raise ProblemError("runner_unavailable", "This scorer has no scores.")

    def is_ready(self):
        return True


def test_work_of_requests_that_have_ended(bundle, test_images):
    """It keeps its place: requests that would come upon it are answered 503 at once, and the next one after it as ever."""
    settings, registry, scorer = Settings(bundle=bundle, timeout=0.5), CollectorRegistry(), WaitingScorer()
    metrics = Metrics(registry)
    pipeline = Pipeline(
        make_repository(settings, metrics),
        scorer,
        metrics,
        max_pixels=10**8,
        max_images=32,
        max_batch_pixels=10**9,
        parallel=2,
        parallel_large=2,
    )
    with serve_app(make_app(settings, pipeline)) as server:
        with ThreadPoolExecutor(2) as pool:
            ended = list(pool.map(lambda _: predict(server.client, test_images[0]), range(2)))
        assert [response.json()["code"] for response in ended] == ["timeout"] * 2
        for _ in range(5):
            response = predict(server.client, test_images[0])
            assert (response.status_code, response.json()["code"], response.headers["retry-after"]) == (503, "busy", "5")
        assert len(scorer.running) == 2
        large = predict(server.client, black_png(6000, 5000))
        assert large.json()["code"] == "timeout", "a large image has a place of its own"
        wait_for(lambda: len(scorer.running) == 3, 10)
        scorer.let_go.set()
        wait_for(lambda: not scorer.running, 10)
        wait_for(lambda: predict(server.client, test_images[0]).json()["code"] == "runner_unavailable", 10)


def test_several_bundles(bundle, bundles, test_images):
    with app_server(bundles=bundles) as server:
        response = predict(server.client, test_images[0])
        assert (response.status_code, response.json()["code"]) == (404, "model_unknown")
        for name in ("left", "right"):
            assert predict(server.client, test_images[0], model=name).json()["model"] == name
        shutil.copytree(bundle, bundles / "top")
        (bundles / "top" / "bank.faiss").write_bytes(b"")
        wait_for(lambda: server.client.get("/models").json()["models"][-1]["name"] == "top", 10)
        response = server.client.post("/predict?model=top", files={"image": test_images[0].read_bytes()})
        assert (response.status_code, response.json()["code"]) == (503, "model_unavailable")
        assert str(bundles) not in response.text
        (bundles / "top" / "manifest.json").write_text("{")
        listed = {model["name"]: model for model in server.client.get("/models").json()["models"]}
        assert listed["top"]["problem"].startswith("top/manifest.json")
        assert [model["problem"] for name, model in listed.items() if name != "top"] == [None, None]


def test_bundle_replaced_under_load(bundle, tmp_path, test_images, log):
    """No request fails; a damaged version is refused, a good one taken up."""
    place = tmp_path / "bundles" / "cells"
    shutil.copytree(bundle, place)
    with app_server(bundles=tmp_path / "bundles") as server, Load(server, test_images[0]) as load:
        (old,) = {version for version, _ in load.scores}
        weights = (place / "features.bin").read_bytes()
        (place / "features.bin").write_bytes(weights[:100])
        wait_for(lambda: "stays at version" in log.text)
        assert {version for version, _ in load.scores} == {old}
        new = Path(shutil.copytree(bundle, tmp_path / "new"))
        change_manifest(new, name="newer")
        place.rename(tmp_path / "old")
        new.rename(place)
        wait_for(lambda: len({version for version, _ in load.scores}) == 2)
        listed = server.client.get("/models").json()["models"][0]
        assert (listed["name"], listed["title"]) == ("cells", "newer")
    assert set(load.statuses) == {200}
    assert not load.errors
    assert len({score for _, score in load.scores}) == 1


@pytest.mark.parametrize("sensitivity", [0.3, 0.5, 0.8])
def test_every_way_to_ask_shows_the_same_threshold(bundle_copy, test_images, sensitivity):
    """The sensitivity included, as for the verdict: /models, /predict, /explain, the runtime and ``patchcore info``."""
    scales = {name: getattr(read_manifest(bundle_copy), name).model_dump() for name in ("image", "pixel")}
    change_manifest(bundle_copy, **{name: {**scale, "sensitivity": sensitivity} for name, scale in scales.items()})
    with app_server(bundle=bundle_copy) as server:
        (model,) = server.client.get("/models").json()["models"]
        answers = predict_batch(server.client, [path.read_bytes() for path in test_images[::5]])
        explanation = server.client.post("/explain", files={"image": test_images[0].read_bytes()}).json()
    assert {answer["threshold"] for answer in [*answers, explanation]} == {model["threshold"]}
    assert (model["threshold"] == scales["image"]["threshold"]) == (sensitivity == 0.5)
    for answer in answers:
        assert (answer["verdict"] == "anomalous") == (answer["score"] > model["threshold"])
    assert PatchcoreRuntime.load(bundle_copy).predict(test_images[:1])[0].threshold == model["threshold"]
    info = CliRunner().invoke(main, ["info", str(bundle_copy)], env={"COLUMNS": "200"}).output
    assert re.search(rf"image threshold\W+{model['threshold']:.4g}\b", info), info


def test_spans(bundle, test_images):
    """A request's span says how long each stage took. (What sends it is a package of its own.)"""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    pipeline = make_pipeline(Settings(bundle=bundle), Metrics(CollectorRegistry()))
    with provider.get_tracer("test").start_as_current_span("POST /predict"):
        answer = asyncio.run(pipeline.predict(ImageFile("cell.png", test_images[0].read_bytes()), None))
    (span,) = exporter.get_finished_spans()
    assert dict(span.attributes) == {
        **{f"patchcore.{stage}_ms": spent for stage, spent in answer.milliseconds.items()},
        "patchcore.model": "cells",
        "patchcore.version": answer.version,
        "patchcore.score": answer.score,
    }


def turned(path) -> bytes:
    return encoded(Image.open(path).rotate(90))


def test_p_values_and_drift(calibrated, test_images, log):
    good = [path for path in test_images if path.parent.name == "good"][:32]
    expected = PatchcoreRuntime.load(calibrated).predict(good)
    with app_server(bundle=calibrated) as server:
        client = server.client
        assert client.get("/models").json()["models"][0]["loaded"]
        assert client.get("/drift").json() == {"models": []}, "the image that warms a model up is not of production"
        answers = predict_batch(client, [path.read_bytes() for path in good])
        assert [answer["p_value"] for answer in answers] == [prediction.p_value for prediction in expected]
        (seen,) = client.get("/drift").json()["models"]
        assert (seen["model"], seen["version"]) == (answers[0]["model"], answers[0]["version"])
        assert client.post("/explain", files={"image": good[0].read_bytes()}).status_code == 200
        assert client.get("/drift").json()["models"] == [seen], "an explained image has been counted already"
        drift = seen["drift"]
        assert (drift["images"], drift["drifted"], drift["since"], drift["what"]) == (32, False, None, None)
        for _ in range(2):
            predict_batch(client, [turned(path) for path in good])
        drift = client.get("/drift").json()["models"][0]["drift"]
        assert (drift["images"], drift["drifted"]) == (96, True)
        assert drift["evidence"] >= drift["threshold"]
        assert drift["distance"] > drift["normal_distance"]
        assert server.registry.get_sample_value("patchcore_drifted", {"model": "my_part"}) == 1
        assert server.registry.get_sample_value("patchcore_drift_evidence", {"model": "my_part"}) >= 1
        assert log.text.count("Production has drifted from what the model my_part was calibrated on:") == 1
        for path, images in {"/predict": 97, "/heatmap": 98, "/explain": 98}.items():
            client.post(path, files={"image": good[0].read_bytes()})
            assert client.get("/drift").json()["models"][0]["drift"]["images"] == images, path
        verdicts = [server.registry.get_sample_value("patchcore_verdicts_total", {"model": "my_part", "verdict": verdict})
                    for verdict in ("normal", "anomalous")]  # fmt: skip
        assert sum(filter(None, verdicts)) == 98


def test_new_version_has_a_new_drift_monitor(calibrated, test_images, tmp_path):
    place = Path(shutil.copytree(calibrated, tmp_path / "bundle"))
    with app_server(bundle=place) as server:
        predict_batch(server.client, [path.read_bytes() for path in test_images[:3]])
        (before,) = server.client.get("/drift").json()["models"]
        change_manifest(place, name="newer")
        wait_for(lambda: predict(server.client, test_images[0]).json()["version"] != before["version"])
        (after,) = server.client.get("/drift").json()["models"]
        assert (after["model"], after["drift"]["images"]) == (before["model"], 1)


def test_model_without_calibration(bundle, test_images):
    with app_server(bundle=bundle) as server:
        assert predict(server.client, test_images[0]).json()["p_value"] is None
        (seen,) = server.client.get("/drift").json()["models"]
        assert (seen["model"], seen["drift"]) == ("cells", None)


def test_samples(bundle, samples):
    with app_server(bundle=bundle, samples=samples) as server:
        names = server.client.get("/samples").json()
        assert names == sorted(path.name for path in samples.iterdir())[:24]
        assert server.client.get(f"/samples/{names[3]}").content == (samples / names[3]).read_bytes()
        unknown = server.client.get("/samples/x.png")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "sample_unknown")
    with app_server(bundle=bundle) as server:
        assert server.client.get("/samples").json() == []


def test_cache_that_cannot_be_written(bundle, test_images, tmp_path):
    (tmp_path / "file").write_text("")
    with app_server(bundle=bundle, cache=tmp_path / "file" / "cache") as server:
        assert predict(server.client, test_images[0]).status_code == 200
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
