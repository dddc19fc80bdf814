"""What goes wrong in a factory, on real servers: killed processes, full disks, ended servers, wrong settings."""

import os
import pickle
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from helpers.http import Load, predict, wait_for
from helpers.server import SERVE, bentoml_serve


def test_wrong_setting_ends_the_start(bundle, tmp_path):
    """At once, with the setting's name and no traceback, and no process left behind."""
    environment = {"PATCHCORE_BUNDLE": str(bundle), "PATCHCORE_THREADS": "none"}
    before = psutil.Process().children(recursive=True)
    with (
        pytest.raises(RuntimeError, match=r"PATCHCORE_THREADS: .*valid integer") as caught,
        bentoml_serve(SERVE, tmp_path, **environment),
    ):
        pytest.fail("it must not start")
    assert "Traceback" not in str(caught.value)
    assert psutil.Process().children(recursive=True) == before


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # in between
        return False


def pickle_is_refused_everywhere(server, canary: Path):
    """Post a pickle that would make a file to every TCP port that the server's processes listen at."""

    class Touch:
        def __reduce__(self):
            return (Path.touch, (canary,))

    ports = {
        connection.laddr.port
        for process in [psutil.Process(server.process.pid), *server.children()]
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
    score = runtime.predict(test_images[:1])[0].score
    with bentoml_serve(
        SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_RUNNER=runner, PATCHCORE_TIMEOUT="10"
    ) as server:
        assert predict(server.client, test_images[0]).json()["score"] == pytest.approx(score, rel=1e-6)
        pickle_is_refused_everywhere(server, tmp_path / "canary")
        wanted = "patchcore-runner" if runner == "process" else "--service-name patchcore"
        with Load(server, test_images[0]) as load:
            victims = [child for child in server.children() if wanted in " ".join(child.cmdline())]
            assert victims
            for victim in victims:
                victim.kill()
            before = len(load.statuses)
            wait_for(lambda: len(load.statuses) > before + 20 and load.statuses[-10:] == [200] * 10)
        assert {status for status in load.statuses if status != 200} <= {500, 502, 503, 504}
        assert predict(server.client, test_images[0]).json()["score"] == pytest.approx(score, rel=1e-6)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_terminated_under_load(bundle, test_images, tmp_path):
    """What it has taken in is answered, it ends with 0, and nothing is left behind."""
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle)) as server:
        family = server.children()
        with Load(server, test_images[0]) as load:
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0
            time.sleep(0.3)
        assert set(load.statuses) == {200}
        wait_for(lambda: not any(map(runs, family)), 10)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_terminated_while_a_client_reads_nothing(bundle, tmp_path):
    """The client's connection is closed, and the service ends."""
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_TIMEOUT="1") as server:
        host, port = server.removeprefix("http://").split(":")
        requests = f"GET /docs.json HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode() * 3000
        with socket.create_connection((host, port), timeout=20) as client:
            client.sendall(requests)  # their answers are more than the buffers on the way can hold
            time.sleep(1)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0


def test_killed_supervisor(bundle, tmp_path):
    """Its processes end too: one that goes on would keep the port."""
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_RUNNER="process") as server:
        family = server.children()
        server.process.kill()
        try:
            wait_for(lambda: not any(map(runs, family)), 20)
        finally:
            for member in filter(runs, family):
                member.kill()


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
    with bentoml_serve([sys.executable, str(script)], tmp_path, **environment) as server:
        for _ in range(3):
            assert predict(server.client, test_images[0]).status_code == 200
        assert predict(server.client, b"no image").status_code == 400
        assert predict(server.client, b"").status_code == 400
