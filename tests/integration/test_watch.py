"""``patchcore watch``, run as a user runs it: by a bundle and through a service, with kills, signals and new bundles."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.bundles import change_manifest
from helpers.http import wait_for
from helpers.receivers import SECRET, free_port, lie, receive
from helpers.server import app_server
from patchcore_plugin.bento.schemas import ImageScore
from PIL import Image

from patchcore_plugin.cli import main
from patchcore_plugin.names import from_cell
from patchcore_plugin.runtime.network import Embedder

PATCHCORE = sys.executable, "-c", "from patchcore_plugin.cli import main; main()"
NEEDS_SIGNALS = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


def call(*arguments, **environment):
    """Run ``patchcore watch`` in this process, until it ends by itself."""
    return CliRunner(env={name: str(value) for name, value in environment.items()}).invoke(
        main, ["watch", *map(str, arguments)]
    )


def start(*arguments, **environment):
    """Start ``patchcore watch`` in a process of its own."""
    command = [*PATCHCORE, "watch", *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def rows(output):
    try:
        text = (output / "results.csv").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [{**row, "image": from_cell(row["image"])} for row in csv.DictReader(text.splitlines())]


@pytest.fixture
def camera(tmp_path):
    """The folder that a camera writes to."""
    (tmp_path / "camera").mkdir()
    return tmp_path / "camera"


def test_answers_are_those_of_predict(bundle, runtime, test_images, camera):
    """In both forms of results, which lie beside the folder; the second run has nothing to do."""
    for image in test_images[::20]:
        shutil.copy(image, camera)
    (camera / "broken.png").write_bytes(b"no image")
    result = call(bundle, camera, "--once", "--poll", 0.05, "--patience", 0.1, "--format", "jsonl")
    assert result.exit_code == 1, result.output
    assert "1 unreadable" in result.output
    output = camera.with_name("camera.watch")
    found = {(row := json.loads(line))["image"]: row for line in (output / "results.jsonl").read_text().splitlines()}
    for image, expected in zip(test_images[::20], runtime.predict(test_images[::20]), strict=True):
        row = found.pop(image.name)
        assert row["score"] == pytest.approx(expected.score, rel=1e-5)
        assert row["verdict"] == expected.verdict
        as_served = ImageScore.model_validate(expected).model_dump()
        assert [{**region, "peak": None} for region in row["regions"]] == [
            {**region, "peak": None} for region in as_served["regions"]
        ]
        assert (row["size"], row["small_regions"]) == (as_served["size"], as_served["small_regions"])
        assert (row["model"], row["version"]) == (runtime.manifest.name, runtime.version)
        assert (output / row["heatmap"]).is_file()
        assert f"{image.name}: {row['verdict']}" in result.output or row["verdict"] == "normal"
    assert set(found) == {"broken.png"}
    result = call(bundle, camera, "--once", "--poll", 0.05)
    assert result.exit_code == 0, result.output
    assert not (output / "results.csv").exists()


def test_image_that_takes_too_much_memory(bundle, test_images, camera, monkeypatch):
    """It is said once; those behind it are answered."""
    embed = Embedder.embed

    def embed_small_ones(embedder, image):
        if image.shape[0] == 777:
            raise MemoryError
        return embed(embedder, image)

    monkeypatch.setattr(Embedder, "embed", embed_small_ones)
    for image in test_images[:3]:
        shutil.copy(image, camera)
    Image.new("RGB", (10, 777)).save(camera / "large.png")
    os.utime(camera / "large.png", (1e9, 1e9))
    result = call(bundle, camera, "--once", "--poll", 0.05, "--patience", 0.1)
    assert result.exit_code == 1, result.output
    found = {row["image"]: row["error"] for row in rows(camera.with_name("camera.watch"))}
    assert found.pop("large.png") == "it cannot be scored: MemoryError()"
    assert list(found.values()) == [""] * 3


def feed(camera, images, count, stop, seconds):
    """Be a camera: write files in pieces, rename others into place, some into folders by day."""
    choose = random.Random(count)
    for number, image in zip(range(count), cycle(images), strict=False):
        if stop.is_set():
            return
        path = camera / choose.choice(["", "monday", "tuesday"]) / f"{number:05}.png"
        path.parent.mkdir(exist_ok=True)
        content = image.read_bytes()
        if choose.random() < 0.5:
            path.with_suffix(".tmp").write_bytes(content)
            path.with_suffix(".tmp").rename(path)
        else:
            with path.open("wb", buffering=0) as file:
                file.write(content[: len(content) // 2])
                time.sleep(seconds)
                file.write(content[len(content) // 2 :])
        time.sleep(seconds)


@NEEDS_SIGNALS
@pytest.mark.parametrize(
    ("count", "kills"), [(40, 2), pytest.param(10_000, 60, marks=pytest.mark.slow)], ids=["40", "10,000"]
)
def test_killed_while_a_camera_writes(bundle, test_images, camera, tmp_path, count, kills):
    """SIGKILL at random moments: in the end each file has one line and one place, and each defect was told."""
    choose, stop, killed = random.Random(7), threading.Event(), 0
    images, port, output, done = test_images[::7], free_port(), tmp_path / "out", tmp_path / "done"
    (camera / "broken.png").write_bytes(b"no image")
    arguments = [bundle, camera, "-o", output, "--move", done, "--poll", 0.2, "--patience", 1, "--no-heatmaps"]
    environment = {"PATCHCORE_WEBHOOK": f"http://127.0.0.1:{port}/", "PATCHCORE_WEBHOOK_SECRET": SECRET}
    thread = threading.Thread(target=feed, args=(camera, images, count, stop, 0.005 if count > 1000 else 0.03))
    thread.start()
    try:
        with receive(port=port) as (receiver, _):
            while killed < kills:
                process = start(*arguments, **environment)
                before = len(rows(output))
                if choose.random() < 0.8:  # at any moment of its work, else at any moment of its start
                    wait_for(lambda before=before: len(rows(output)) > before, 120)
                time.sleep(choose.uniform(0, 1 if count < 1000 else 5))
                process.send_signal(signal.SIGKILL)
                process.communicate()
                killed += 1
            thread.join(600)
            process = start(*arguments, "--once", **environment)
            said, _ = process.communicate(timeout=3600)
            assert "Traceback" not in said
            found = rows(output)
            told = {event["data"]["file"] for event in receiver.events}
    finally:
        stop.set()
        thread.join()
    names = [row["image"] for row in found]
    assert Counter(names).most_common(1)[0][1] == 1
    assert len(names) == count + 1
    assert told == {row["image"] for row in found if row["verdict"] != "normal"}
    assert len(set(receiver.ids)) == len(told)
    assert [path for path in camera.rglob("*") if path.is_file()] == []
    moved = sorted(path.relative_to(done).as_posix() for path in done.rglob("*") if path.is_file())
    assert moved == sorted(row["moved_to"] for row in found)
    print(f"{count} files, {killed} kills, {len(told)} told by {len(receiver.ids)} requests")


@NEEDS_SIGNALS
def test_bundle_that_is_replaced(bundle_copy, test_images, camera):
    """A damaged one is refused, and the old one goes on; the next good one answers. SIGTERM ends it with a summary."""
    output = camera.with_name("camera.watch")
    process = start(bundle_copy, camera, "--poll", 0.05, "--no-heatmaps")
    try:
        shutil.copy(test_images[0], camera / "0.png")
        wait_for(lambda: len(rows(output)) == 1)
        manifest = (bundle_copy / "manifest.json").read_text()
        (bundle_copy / "manifest.json").write_text("{}")
        time.sleep(1.1)
        shutil.copy(test_images[0], camera / "1.png")
        wait_for(lambda: len(rows(output)) == 2)
        (bundle_copy / "manifest.json").write_text(manifest)
        change_manifest(bundle_copy, name="another")
        time.sleep(1.1)
        shutil.copy(test_images[0], camera / "2.png")
        wait_for(lambda: len(rows(output)) == 3)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    first, second, third = rows(output)
    assert first["version"] == second["version"] != third["version"]
    assert (first["model"], third["model"]) == ("cells", "another")
    assert "The new bundle cannot be loaded" in said
    assert process.returncode == 0
    assert said.splitlines()[-1].startswith("3 files: 3 ")


def test_through_a_service(bundle, runtime, test_images, camera):
    """The same answers and heatmaps as by the bundle. An image that the service cannot read is said once."""
    for image in test_images[::25]:
        shutil.copy(image, camera)
    (camera / "broken.png").write_bytes(b"no image")
    (camera / "empty.png").write_bytes(b"")
    with app_server(bundle=bundle, api_key="geheim") as server:
        arguments = ["cells", camera, "--url", server, "--once", "--poll", 0.05, "--patience", 0.1]
        refused = call(*arguments)
        assert refused.exit_code == 1
        assert "answers 401" in refused.output
        unknown = call("absent", *arguments[1:], PATCHCORE_API_KEY="geheim")
        assert "has no model 'absent'. Its models: cells" in unknown.output
        result = call(*arguments, PATCHCORE_API_KEY="geheim")
    assert "2 unreadable" in result.output, result.output
    output = camera.with_name("camera.watch")
    found = {row["image"]: row for row in rows(output)}
    for image, expected in zip(test_images[::25], runtime.predict(test_images[::25]), strict=True):
        row = found.pop(image.name)
        assert float(row["score"]) == pytest.approx(expected.score, rel=1e-4)
        assert row["verdict"] == expected.verdict
        assert (row["model"], row["version"]) == ("cells", runtime.version)
        assert (output / row["heatmap"]).read_bytes().startswith(b"\x89PNG")
    assert set(found) == {"broken.png", "empty.png"}
    assert "cannot be read as an image" in found["broken.png"]["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"models": [{"name": "cells"}]}', None),
        (b"[]", "is no service of patchcore"),
        (b"\xff", "is no service of patchcore"),
        (b'{"models": 7}', "is no service of patchcore"),
        (b"[" * 100_000, "is no service of patchcore"),
    ],
)
def test_service_that_is_another_program(test_images, camera, body, message):
    """It may answer anything: nothing is taken for an answer, and the image waits."""
    shutil.copy(test_images[0], camera)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    with lie(lambda connection, stopped: connection.sendall(head + body)) as (url, _):
        result = call("cells", camera, "--url", url.removesuffix("/events"), "--once", "--poll", 0.05, "--patience", 0)
    assert result.exit_code == 1
    assert (message or "0 files: 0 unreadable, 1 not answered yet") in result.output
    assert rows(camera.with_name("camera.watch")) == []


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["{camera}/absent"], {}, "There is no folder"),
        (["{camera}", "--output", "{camera}/out"], {}, "lies in"),
        (["{camera}", "--output", "{bundle}/out"], {}, "lies in"),
        (["{camera}", "--move", "{bundle}/out"], {}, "lies in"),
        (["{camera}", "--poll", "0"], {}, "--poll"),
        (["{camera}", "--format", "xml"], {}, "--format"),
        (["{camera}", "--webhook", "mail@host"], {}, "webhook must be a URL"),
        (["{camera}"], {"PATCHCORE_WEBHOOK": "http://h/", "PATCHCORE_WEBHOOK_SECRET": "x"}, "webhook_secret must be whsec_"),
        (["{camera}", "--url", "127.0.0.1:3000"], {}, "--url must be a URL"),
        (["{camera}", "--url", "http://127.0.0.1/"], {"PATCHCORE_API_KEY": "a\nb"}, "no header can hold"),
    ],
)
def test_wrong_arguments(bundle, camera, arguments, environment, message):
    arguments = [text.format(camera=camera, bundle=bundle) for text in arguments]
    result = call(bundle, *arguments, "--once", **environment)
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert not Path(f"{camera}.watch").exists()


def test_bundle_that_is_none(camera):
    result = call(camera / "absent", camera, "--once")
    assert result.exit_code == 1
    assert "There is no bundle folder" in result.output


def test_exit_code_of_a_watch_that_goes_on(bundle, tmp_path):
    result = call(bundle, tmp_path, "--fail-on", "anomalous")
    assert result.exit_code == 1
    assert "--fail-on tells by the exit code of --once" in result.output
