"""The service's webhook: a real server tells a real receiver, and no answer waits for it."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from bentoml.exceptions import BentoMLConfigException
from helpers.http import predict, predict_batch, wait_for
from helpers.receivers import SECRET, free_port, lie, receive
from helpers.server import SERVE, app_server, bentoml_serve
from patchcore_plugin.bento.settings import Settings, read_settings
from pydantic import ValidationError


@pytest.fixture(scope="module")
def by_verdict(runtime, test_images):
    """Images by their verdict."""
    found = {}
    for image, prediction in zip(test_images, runtime.predict(test_images), strict=True):
        found.setdefault(prediction.verdict, []).append(image)
    assert set(found) >= {"normal", "anomalous"}
    return found


def test_every_image_that_is_not_normal_is_told_once(bundle, by_verdict, tmp_path):
    """With two processes that answer. One request fails at first: the receiver is down when the service starts."""
    port, images = free_port(), by_verdict["anomalous"][:6]
    environment = {
        "PATCHCORE_BUNDLE": str(bundle),
        "PATCHCORE_WORKERS": "2",
        "PATCHCORE_WEBHOOK": f"http://127.0.0.1:{port}/events",
        "PATCHCORE_WEBHOOK_SECRET": SECRET,
        "PATCHCORE_WEBHOOK_QUEUE": str(tmp_path / "queue" / "events.sqlite"),
    }
    with bentoml_serve(SERVE, tmp_path, **environment) as server:
        responses = [predict(server.client, image) for image in images]
        answers = {one.headers["X-Request-ID"]: one.json() for one in responses}
        assert predict(server.client, by_verdict["normal"][0]).json()["verdict"] == "normal"
        assert predict(server.client, b"no image").status_code == 400
        assert server.client.post("/explain", files={"image": images[0].read_bytes()}).status_code == 200
        with receive(port=port) as (receiver, _):
            batch = predict_batch(server.client, [by_verdict["normal"][1].read_bytes(), images[0].read_bytes()])
            drawn = server.client.post(
                "/heatmap", content=images[1].read_bytes(), headers={"Content-Type": "image/png", "X-Request-ID": "line-7"}
            )
            wait_for(lambda: len(receiver.requests) >= 8)
            wait_for(lambda: "patchcore_webhook_waiting 0.0" in server.client.get("/metrics").text)
        metrics = server.client.get("/metrics").text
        log = server.log.read_text()
    assert Counter(receiver.ids).most_common(1)[0][1] == 1
    told = {event["data"]["request_id"]: event for event in receiver.events}
    assert len(told) == 8
    for request_id, answer in answers.items():
        event = told.pop(request_id)
        assert event["type"] == "image.anomalous"
        assert event["data"]["file"] == "upload"
        assert event["data"]["regions"] == answer["regions"][:16]
        for name in ("score", "threshold", "ratio", "verdict", "model", "version", "p_value"):
            assert event["data"][name] == answer[name]
        assert "heatmap" not in event["data"]
    assert told.pop("line-7")["data"]["score"] == float(drawn.headers["X-Score"])
    (rest,) = told.values()
    assert rest["data"]["score"] == batch[1]["score"]
    assert rest["data"]["file"] == "1.png"
    assert all("webhook-signature" in headers for headers, _ in receiver.requests)
    for result in ("queued", "delivered"):
        assert re.search(rf'^patchcore_webhook_events_total{{result="{result}"}} 8.0$', metrics, re.MULTILINE)
    assert SECRET not in log
    assert f"{port}/events" not in log, "a URL may hold a token"
    assert "The webhook's receiver is down" in log


def test_receiver_that_hangs_slows_no_answer(bundle, by_verdict, tmp_path):
    """Nothing waits for it: while the first event hangs, all images are answered."""
    image = by_verdict["anomalous"][0]
    with lie(lambda connection, stopped: stopped.wait(60)) as (url, taken):
        settings = {"webhook": url, "webhook_queue": tmp_path / "queue.sqlite"}
        with app_server(bundle=bundle, **settings) as server:
            predict(server.client, image)
            wait_for(lambda: taken)
            assert [predict(server.client, image).json()["verdict"] for _ in range(10)] == ["anomalous"] * 10
            assert len(taken) == 1, "the first event still hangs"
            count = server.registry.get_sample_value("patchcore_webhook_events_total", {"result": "queued"})
            assert count == 11


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({"webhook": "127.0.0.1/x"}, "WEBHOOK", "must begin with http"),
        ({"webhook": "http://u:geheim@127.0.0.1/"}, "WEBHOOK", "no user and password"),
        ({"webhook": "http://127.0.0.1/"}, "WEBHOOK_QUEUE", "name a file for the queue"),
        ({"webhook_queue": "queue.sqlite"}, "WEBHOOK_QUEUE", "nobody to tell"),
        ({"webhook_secret": SECRET}, "WEBHOOK_QUEUE", "nobody to tell"),
        ({"webhook": "http://127.0.0.1/", "webhook_secret": "geheim"}, "WEBHOOK_SECRET", "whsec_"),
    ],
)
def test_wrong_settings(monkeypatch, settings, name, message):
    for setting, value in settings.items():
        monkeypatch.setenv(f"PATCHCORE_{setting.upper()}", value)
    with pytest.raises(BentoMLConfigException, match=rf"PATCHCORE_{name}: .*{message}") as caught:
        read_settings()
    assert "geheim" not in str(caught.value)
    with pytest.raises(ValidationError):
        Settings()


def test_queue_that_cannot_be_opened(bundle, tmp_path):
    """The service does not start, and says why."""
    from patchcore_plugin.bento.service import check

    (tmp_path / "queue").write_bytes(b"something else" * 1000)
    settings = Settings(bundle=bundle, webhook="http://127.0.0.1/", webhook_queue=tmp_path / "queue")
    with pytest.raises(BentoMLConfigException, match=r"queue.* cannot be opened: file is not a database"):
        check(settings)
