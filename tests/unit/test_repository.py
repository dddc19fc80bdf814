"""Many models in one process: loaded on demand, within a limit of memory, replaced while they answer."""

import json
import shutil
import threading
import time

import pytest
from helpers.http import wait_for
from patchcore_plugin.bento.repository import ModelRepository, UnknownModelError

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import BundleError, read_manifest, version_of


@pytest.fixture
def folder(bundle, tmp_path):
    for name in ("left", "right", "top"):
        shutil.copytree(bundle, tmp_path / name)
    return tmp_path


@pytest.fixture
def events():
    return []


@pytest.fixture
def make(folder, events):
    """Make a repository of the models in ``folder``, which looks for changes at every request."""

    def find():
        return {path.name: path for path in sorted(folder.iterdir()) if (path / "manifest.json").is_file()}

    def load(path):
        return PatchcoreRuntime.load(path, threads=1, cache=False)

    def make(find=find, max_bytes=1 << 40, default=None):
        return ModelRepository(
            find,
            load,
            max_bytes,
            default=default,
            check_interval=0,
            on_load=lambda name, result: events.append((name, result)),
        )

    return make


@pytest.fixture
def repository(make):
    return make()


def rename(folder, name):
    """Give a model another manifest, hence another version."""
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name": name}))


def test_loaded_on_demand(repository, folder, events, test_images):
    assert repository.loaded() == []
    model = repository.get(repository.resolve("left"))
    assert model.runtime.predict(test_images[:1])[0].score > 0
    assert model.version == version_of(folder / "left")
    assert repository.get("left") is model
    assert events == [("left", "loaded")]


def test_names(make, folder):
    assert make(default="top").resolve(None) == "top"
    assert make(default="top").resolve("left") == "left"
    repository = make()
    with pytest.raises(UnknownModelError, match=r"There is no model '\.\./left'\. Models: left, right, top\."):
        repository.resolve("../left")
    with pytest.raises(UnknownModelError, match="names no model, and there is not just one"):
        repository.resolve(None)
    shutil.rmtree(folder / "left")
    shutil.rmtree(folder / "right")
    assert repository.resolve(None) == "top"


def test_least_recently_used_is_dropped(make, folder, events):
    repository = make(max_bytes=2 * read_manifest(folder / "left").total_bytes)
    for name in ("left", "right", "left", "top"):
        repository.get(name)
    assert repository.loaded() == ["left", "top"]
    assert ("right", "dropped") in events


def test_one_model_is_kept_whatever_the_limit(make):
    repository = make(max_bytes=1)
    repository.get("left")
    repository.get("right")
    assert repository.loaded() == ["right"]


def test_preload(make, folder):
    repository = make(default="right")
    assert repository.preload()
    assert repository.loaded() == ["right"]
    assert make().preload(), "requests that name no model have none to wait for"
    (folder / "right" / "bank.faiss").write_bytes(b"")
    assert not make(default="right").preload()


def test_new_version_without_a_failed_request(repository, folder, test_images):
    old = repository.get("left")
    stop, answers, failures = threading.Event(), [], []

    def ask():
        while not stop.is_set():
            try:
                model = repository.get(repository.resolve("left"))
                model.runtime.predict(test_images[:1])
                answers.append(model.version)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    new = folder / ".new"
    shutil.copytree(folder / "left", new)
    rename(new, "newer")
    (folder / "left").rename(folder / ".old")
    time.sleep(0.2)  # the bundle is missing for a moment
    new.rename(folder / "left")
    wait_for(lambda: answers and answers[-1] != old.version)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert set(answers) == {old.version, version_of(folder / "left")}
    assert repository.get("left").version == version_of(folder / "left")


def test_damaged_version_is_refused_and_the_old_one_answers(repository, folder, events):
    old = repository.get("left")
    weights = (folder / "left" / "features.bin").read_bytes()
    (folder / "left" / "features.bin").write_bytes(weights[:-1])
    repository.get("left")
    wait_for(lambda: ("left", "refused") in events)
    wait_for(lambda: not any(thread.name == "load-left" for thread in threading.enumerate()))
    for _ in range(3):
        assert repository.get("left") is old
    assert events.count(("left", "refused")) == 1, "the same files are not tried again and again"
    (folder / "left" / "features.bin").write_bytes(weights)
    rename(folder / "left", "mended")
    wait_for(lambda: repository.get("left").version != old.version)


def test_folders_that_cannot_be_listed(make, folder):
    """A model in memory goes on answering; others cannot be found."""
    is_lost = threading.Event()

    def find():
        return {path.name: path for path in (folder / "absent" if is_lost.is_set() else folder).iterdir()}

    repository = make(find)
    model = repository.get("left")
    is_lost.set()
    assert repository.get(repository.resolve("left")) is model
    with pytest.raises(UnknownModelError, match="There is no model 'right'"):
        repository.resolve("right")


def test_damaged_from_the_start(repository, folder):
    (folder / "right" / "bank.faiss").write_bytes(b"")
    with pytest.raises(BundleError, match=r"bank\.faiss has 0 bytes"):
        repository.get("right")
    assert repository.loaded() == []
    assert repository.get("left").runtime.manifest.name == "cells"


def test_many_requests_load_a_model_once(repository, events):
    found = []
    threads = [threading.Thread(target=lambda: found.append(repository.get("top"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert len({id(model) for model in found}) == 1
    assert events == [("top", "loaded")]
