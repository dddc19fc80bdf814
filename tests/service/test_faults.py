"""What goes wrong in a factory: too many requests, killed processes, full disks, replaced bundles, wrong settings."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from helpers.server import SERVE, bentoml_serve


def ask(url, content, timeout=60, **options):
    return httpx.post(f"{url}/predict", files={"image": content}, timeout=timeout, **options)


def children(server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


class Load:
    """Requests one after the other, from several threads, until it is left."""

    def __init__(self, url, content, threads=3):
        self.url, self.content = url, content
        self.statuses, self.errors, self.scores = [], [], set()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(threads)]

    def _work(self):
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                try:
                    response = client.post(f"{self.url}/predict", files={"image": self.content})
                except httpx.TransportError as error:
                    self.errors.append(error)
                    time.sleep(0.05)
                    continue
                self.statuses.append(response.status_code)
                if response.status_code == 200:
                    self.scores.add((response.json()["version"], round(response.json()["score"], 3)))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        wait_for(lambda: self.statuses)
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def test_past_the_queue(bundle, test_images, tmp_path):
    """503 at once, with Retry-After; nothing else fails."""
    content = test_images[0].read_bytes()
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_QUEUE="2") as url:
        with ThreadPoolExecutor(12) as pool:
            responses = list(pool.map(lambda _: ask(url, content), range(80)))
        busy = [response for response in responses if response.status_code == 503]
        assert {response.status_code for response in responses} == {200, 503}
        assert all(response.headers["retry-after"] == "1" and response.json()["code"] == "busy" for response in busy)
        assert ask(url, content).status_code == 200
        assert f'patchcore_rejected_total{{code="busy"}} {len(busy)}.0' in httpx.get(f"{url}/metrics").text


def test_slow_and_silent_senders(bundle, test_images, tmp_path):
    """A body that never ends is not waited for, and takes nobody's place for ever."""
    import socket

    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_QUEUE="2", PATCHCORE_TIMEOUT="1.5") as url:
        host, port = url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port)), timeout=20) for _ in range(2)]
        for connection in silent:
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc"
            )
        for connection in silent:
            assert b"504" in connection.recv(65536).split(b"\r\n")[0]
            connection.close()
        assert ask(url, test_images[0].read_bytes()).status_code == 200


def test_key(bundle, test_images, tmp_path):
    content = test_images[0].read_bytes()
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_API_KEY="sésame") as url:
        for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": ""}):
            response = ask(url, content, headers=headers)
            assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
            assert httpx.get(f"{url}/models", headers=headers).status_code == 401
        assert ask(url, content, headers={"x-api-key": "sésame".encode()}).status_code == 200
        assert httpx.get(f"{url}/ui/").status_code == 200
        assert "sésame" not in url.log.read_text()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PATCHCORE_THREADS", "none", "PATCHCORE_THREADS"),
        ("PATCHCORE_THREDS", "2", "There is no setting PATCHCORE_THREDS"),
        ("PATCHCORE_DEFAULT_MODEL", "other", "there is no bundle 'other'; found: cells"),
        ("PATCHCORE_BUNDLES", "absent", "there is no folder absent"),
    ],
)
def test_wrong_settings_end_the_start(bundle, tmp_path, name, value, message):
    """With the setting's name, at once, and no process left behind."""
    environment = {"PATCHCORE_BUNDLE": "" if name == "PATCHCORE_BUNDLES" else str(bundle), name: value}
    with pytest.raises(RuntimeError, match=message) as caught, bentoml_serve(SERVE, tmp_path, **environment):
        pytest.fail("it must not start")
    assert "Traceback" not in str(caught.value)


def test_settings_are_printed(bundle, tmp_path):
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_QUEUE="17", PATCHCORE_LOG="json") as url:
        ask(url, b"no image")
        wait_for(lambda: "image_unreadable" in url.log.read_text())
        text = url.log.read_text()
    assert "queue: 17" in text
    (line,) = (json.loads(line) for line in text.splitlines() if line.startswith("{") and '"request"' in line)
    assert (line["status"], line["code"], line["path"]) == (400, "image_unreadable", "/predict")


def pickle_is_refused_everywhere(server, canary: Path):
    """Post a pickle that would make a file to every TCP port that the server's processes listen at."""

    class Touch:
        def __reduce__(self):
            return (Path.touch, (canary,))

    ports = {
        connection.laddr.port
        for process in [psutil.Process(server.process.pid), *children(server)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert int(server.rsplit(":", 1)[1]) in ports
    for port in ports:
        try:
            httpx.get(f"http://127.0.0.1:{port}/livez", timeout=2)
        except httpx.TransportError:  # no HTTP is spoken there
            continue
        for route in ("predict", "score", "predict_batch", "heatmap", ""):
            response = httpx.post(
                f"http://127.0.0.1:{port}/{route}",
                content=pickle.dumps(Touch()),
                headers={"content-type": "application/vnd.bentoml+pickle", "payload-container": "DefaultContainer"},
                timeout=20,
            )
            assert response.status_code in (400, 404, 405, 415), (port, route, response.text)
    assert not canary.exists()


@pytest.mark.parametrize("runner", ["inside", "process"])
def test_killed_under_load(bundle, runtime, test_images, tmp_path, runner):
    """The process that computes is killed: requests end, by an error or an answer, and it recovers by itself."""
    content = test_images[0].read_bytes()
    score = runtime.predict(test_images[:1])[0].score
    with bentoml_serve(
        SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_RUNNER=runner, PATCHCORE_TIMEOUT="10"
    ) as url:
        assert ask(url, content).json()["score"] == pytest.approx(score, rel=1e-6)
        pickle_is_refused_everywhere(url, tmp_path / "canary")
        wanted = "patchcore-runner" if runner == "process" else "--service-name patchcore"
        with Load(url, content) as load:
            victims = [child for child in children(url) if wanted in " ".join(child.cmdline())]
            assert victims
            for victim in victims:
                victim.kill()
            before = len(load.statuses)
            wait_for(lambda: len(load.statuses) > before + 20 and load.statuses[-10:] == [200] * 10)
        assert {status for status in load.statuses if status != 200} <= {500, 502, 503, 504}
        assert ask(url, content).json()["score"] == pytest.approx(score, rel=1e-6)


def test_bundle_replaced_under_load(bundle, test_images, tmp_path):
    """No request fails; a damaged version is refused, a good one taken up."""
    shutil.copytree(bundle, tmp_path / "bundles" / "cells")
    place = tmp_path / "bundles" / "cells"
    environment = {"PATCHCORE_BUNDLES": str(tmp_path / "bundles"), "PATCHCORE_BUNDLE": ""}
    with bentoml_serve(SERVE, tmp_path, **environment) as url, Load(url, test_images[0].read_bytes()) as load:
        (old,) = {version for version, _ in load.scores}
        weights = (place / "features.bin").read_bytes()
        (place / "features.bin").write_bytes(weights[:100])
        wait_for(lambda: "stays at version" in url.log.read_text())
        assert {version for version, _ in load.scores} == {old}
        manifest = json.loads((place / "manifest.json").read_text())
        new = shutil.copytree(bundle, tmp_path / "new")
        (new / "manifest.json").write_text(json.dumps(manifest | {"name": "newer"}))
        place.rename(tmp_path / "old")
        new.rename(place)
        wait_for(lambda: len({version for version, _ in load.scores}) == 2)
        listed = httpx.get(f"{url}/models").json()["models"][0]
        assert (listed["name"], listed["title"]) == ("cells", "newer")
    assert set(load.statuses) == {200}
    assert not load.errors
    assert len({score for _, score in load.scores}) == 1


def test_several_bundles(bundle, test_images, tmp_path):
    for name in ("left", "right"):
        shutil.copytree(bundle, tmp_path / "bundles" / name)
    content = test_images[0].read_bytes()
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLES=str(tmp_path / "bundles"), PATCHCORE_BUNDLE="") as url:
        response = ask(url, content)
        assert (response.status_code, response.json()["code"]) == (404, "model_unknown")
        for name in ("left", "right"):
            form = httpx.post(f"{url}/predict", files={"image": content}, data={"model": name}, timeout=60)
            assert form.json()["model"] == name
        shutil.copytree(bundle, tmp_path / "bundles" / "top")
        (tmp_path / "bundles" / "top" / "bank.faiss").write_bytes(b"")
        wait_for(lambda: httpx.get(f"{url}/models").json()["models"][-1]["name"] == "top", 10)
        response = httpx.post(f"{url}/predict?model=top", files={"image": content}, timeout=60)
        assert (response.status_code, response.json()["code"]) == (503, "model_unavailable")
        assert str(tmp_path) not in response.text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_terminated_under_load(bundle, test_images, tmp_path):
    """What it has taken in is answered, it ends with 0, and nothing is left behind."""
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle)) as url:
        family = children(url)
        with Load(url, test_images[0].read_bytes()) as load:
            time.sleep(0.5)
            url.process.send_signal(signal.SIGTERM)
            assert url.process.wait(30) == 0
            time.sleep(0.3)
        assert set(load.statuses) == {200}
        wait_for(lambda: not any(member.is_running() and member.status() != "zombie" for member in family), 10)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk(bundle, test_images, tmp_path):
    """For the log and the cache of compiled networks: requests are answered all the same."""
    (tmp_path / "file").write_text("")
    environment = {"PATCHCORE_BUNDLE": str(bundle), "PATCHCORE_CACHE": str(tmp_path / "file" / "cache")}
    script = tmp_path / "serve.py"
    script.write_text(
        "import os, sys\n"
        "full = os.open('/dev/full', os.O_WRONLY)\n"
        "os.dup2(full, 1), os.dup2(full, 2)\n"
        f"os.execv(sys.executable, [{', '.join(map(repr, SERVE))}, *sys.argv[1:]])\n"
    )
    with bentoml_serve([sys.executable, str(script)], tmp_path, **environment) as url:
        for _ in range(3):
            assert ask(url, test_images[0].read_bytes()).status_code == 200
        assert ask(url, b"no image").status_code == 400
        assert ask(url, io.BytesIO(b"")).status_code == 400


def test_import_is_light(bundle):
    """The service's module is imported several times at a start."""
    code = (
        "import sys, patchcore_plugin.bento.service; print(len({'torch', 'anomalib', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
