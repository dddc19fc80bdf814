"""Many bundles in one process: on demand, within a limit, replaced while they are used."""

import json
import shutil
import threading
import time

import pytest
from patchcore_plugin.bento.repository import Shelf, UnknownModelError, describe

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import BundleError


@pytest.fixture
def folder(bundle, tmp_path):
    for name in ("left", "right", "top"):
        shutil.copytree(bundle, tmp_path / name)
    return tmp_path


@pytest.fixture
def events():
    return []


@pytest.fixture
def shelf(folder, events, monkeypatch):
    monkeypatch.setattr("patchcore_plugin.bento.repository._CHECK_EVERY", 0.0)

    def places():
        return {path.name: path for path in sorted(folder.iterdir()) if (path / "manifest.json").is_file()}

    def load(path):
        return PatchcoreRuntime.load(path, threads=1, cache=False)

    return Shelf(places, load, 1 << 40, lambda name, result: events.append((name, result)))


def rename(folder, name):
    """Another manifest, hence another version, of the same model."""
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name": name}))


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_on_demand(shelf, folder, events, test_images):
    assert shelf.names() == []
    entry = shelf.get(shelf.resolve("left"))
    assert entry.runtime.predict(test_images[:1])[0].score > 0
    assert entry.version == describe(folder / "left")[1]
    assert shelf.get("left") is entry
    assert events == [("left", "loaded")]


def test_names(shelf, folder):
    assert shelf.resolve(None, "top") == "top"
    with pytest.raises(UnknownModelError, match=r"There is no model '\.\./left'\. Models: left, right, top\."):
        shelf.resolve("../left")
    with pytest.raises(UnknownModelError, match="names no model, and there is not just one"):
        shelf.resolve(None)
    shutil.rmtree(folder / "left")
    shutil.rmtree(folder / "right")
    assert shelf.resolve(None) == "top"


def test_least_recently_used_gives_way(shelf, events):
    shelf._limit = 2 * shelf.get("left").size
    shelf.get("right")
    shelf.get("left")
    shelf.get("top")
    assert shelf.names() == ["left", "top"]
    assert ("right", "dropped") in events
    shelf._limit = 1  # one is always held
    shelf.get("right")
    assert shelf.names() == ["right"]


def test_new_version_without_a_failed_request(shelf, folder, test_images):
    old = shelf.get("left")
    stop, answers, failures = threading.Event(), [], []

    def ask():
        while not stop.is_set():
            try:
                entry = shelf.get(shelf.resolve("left"))
                entry.runtime.predict(test_images[:1])
                answers.append(entry.version)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    new = folder / ".new"
    shutil.copytree(folder / "left", new)
    rename(new, "newer")
    (folder / "left").rename(folder / ".old")
    time.sleep(0.2)  # the bundle is gone for a moment
    new.rename(folder / "left")
    wait_for(lambda: answers and answers[-1] != old.version)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert set(answers) == {old.version, describe(folder / "left")[1]}
    assert shelf.get("left").version == describe(folder / "left")[1]


def test_damaged_version_is_refused_and_the_old_one_goes_on(shelf, folder, events):
    old = shelf.get("left")
    weights = (folder / "left" / "features.bin").read_bytes()
    (folder / "left" / "features.bin").write_bytes(weights[:-1])
    shelf.get("left")
    wait_for(lambda: ("left", "refused") in events)
    wait_for(lambda: not shelf.get("left")._loading)
    for _ in range(3):
        assert shelf.get("left") is old
    assert events.count(("left", "refused")) == 1, "it is not tried again and again"
    (folder / "left" / "features.bin").write_bytes(weights)
    rename(folder / "left", "mended")
    wait_for(lambda: shelf.get("left").version != old.version)


def test_folder_that_is_gone(shelf, folder):
    """What is in memory goes on; nothing else can be found."""
    entry = shelf.get("left")
    shelf._places = lambda: next(iter((folder / "absent").iterdir()))
    assert shelf.get(shelf.resolve("left")) is entry
    with pytest.raises(UnknownModelError, match="There is no model 'right'"):
        shelf.resolve("right")


def test_damaged_from_the_start(shelf, folder):
    (folder / "right" / "bank.faiss").write_bytes(b"")
    with pytest.raises(BundleError, match=r"bank\.faiss has 0 bytes"):
        shelf.get("right")
    assert shelf.names() == []
    assert shelf.get("left").runtime.manifest.name == "cells"


def test_loaded_once_by_many(shelf, events):
    found = []
    threads = [threading.Thread(target=lambda: found.append(shelf.get("top"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert len({id(entry) for entry in found}) == 1
    assert events == [("top", "loaded")]
