"""What the service's processes listen at: the port of HTTP, and nothing that another user of the computer can reach."""

import json
import os
import pickle
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import zmq
from helpers.http import predict
from helpers.server import BENTOML, SERVE, SERVICE, bentoml_serve, serve_app
from patchcore_plugin.bento.runner import make_runner
from patchcore_plugin.bento.settings import Settings

NOBODY = 65534


@contextmanager
def another_user():
    """Work as another user, where the tests run as root; elsewhere as the same user."""
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


def addresses(server) -> tuple[set[int], set[str]]:
    """Ports and Unix sockets of the server's processes."""
    processes = [psutil.Process(server.process.pid), *server.children()]
    connections = [connection for process in processes for connection in process.net_connections("all")]
    inet = [item for item in connections if item.family in (socket.AF_INET, socket.AF_INET6)]
    ports = {item.laddr.port for item in inet if item.status == psutil.CONN_LISTEN or item.type == socket.SOCK_DGRAM}
    return ports, {item.laddr for item in connections if item not in inet and item.laddr}


def send_command(port: int, canary: Path) -> None:
    """Tell a supervisor behind a port, if one is there, to run a program that makes a file."""
    command = f"{sys.executable} -c \"import pathlib; pathlib.Path(r'{canary}').touch()\""
    properties = {"name": f"canary{port}", "cmd": command, "start": True}
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.linger, client.rcvtimeo = 0, 1000
        with another_user():
            client.connect(f"tcp://127.0.0.1:{port}")
            client.send(json.dumps({"id": "1", "command": "add", "properties": properties}).encode())
            try:
                client.recv()
            except zmq.Again:
                return
    time.sleep(2)  # the program starts


def pickle_of(canary: Path) -> dict:
    """A request whose body makes a file where it is unpickled."""

    class Touch:
        def __reduce__(self):
            return (Path.touch, (canary,))

    headers = {"content-type": "application/vnd.bentoml+pickle", "payload-container": "DefaultContainer"}
    return {"content": pickle.dumps(Touch()), "headers": headers}


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither Unix sockets nor these modes of folders")
@pytest.mark.parametrize("runner", ["inside", "process"])
def test_nothing_is_open_but_http(bundle, test_images, tmp_path, runner):
    """No command is taken at any port, and no file of a socket or of metrics can be reached by others."""
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_RUNNER=runner) as server:
        assert predict(server.client, test_images[0]).status_code == 200
        ports, sockets = addresses(server)
        for port in ports:
            send_command(port, tmp_path / "canary")
        assert not (tmp_path / "canary").exists()
        assert ports == {int(server.rsplit(":", 1)[1])}
        assert bool(sockets) == (runner == "process")
        metrics = {child.environ()["PROMETHEUS_MULTIPROC_DIR"] for child in server.children()}
        for folder in {Path(path).parent for path in sockets} | set(map(Path, metrics)):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert folder.stat().st_uid == os.getuid()
        if os.geteuid() == 0:
            for path in sockets:
                with another_user(), socket.socket(socket.AF_UNIX) as client, pytest.raises(PermissionError):
                    client.connect(path)
    assert not any(Path(folder).exists() for folder in metrics)


def test_runner_over_tcp_ends_the_start(bundle, tmp_path):
    """Where BentoML uses no Unix sockets, as on Windows."""
    environment = {"PATCHCORE_BUNDLE": str(bundle), "PATCHCORE_RUNNER": "process", "BENTOML_NO_UDS": "1"}
    with (
        pytest.raises(RuntimeError, match=r"PATCHCORE_RUNNER=process needs Unix sockets.* Set PATCHCORE_RUNNER=inside\."),
        bentoml_serve(SERVE, tmp_path, **environment),
    ):
        pytest.fail("it must not start")


def test_runner_alone_unpickles_nothing(bundle, tmp_path):
    """BentoML can start it without the service, for a cluster, at a TCP port."""
    runner = make_runner(Settings(bundle=bundle, runner="process"))
    with serve_app(runner.to_asgi(is_main=False)) as server:
        response = server.client.post("/score", **pickle_of(tmp_path / "canary"))
    assert not (tmp_path / "canary").exists()
    assert response.status_code == 403


def test_port_that_is_taken_ends_the_start(bundle, tmp_path):
    """In a sentence that names it, and the way out."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = (*BENTOML, "serve", "--port", str(port), SERVICE)
        environment = os.environ | {"PATCHCORE_BUNDLE": str(bundle), "BENTOML_HOME": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode
    said = done.stdout + done.stderr
    assert f"cannot listen at port {port} of 127.0.0.1: " in said
    assert "bentoml serve --port" in said
    assert "Traceback" not in said


def test_reload_ends_the_start(bundle, tmp_path):
    """It cannot do without a port for commands."""
    command = (*BENTOML, "serve", "--reload", SERVICE)
    with (
        pytest.raises(RuntimeError, match="--reload needs a port for commands"),
        bentoml_serve(command, tmp_path, PATCHCORE_BUNDLE=str(bundle)),
    ):
        pytest.fail("it must not start")
