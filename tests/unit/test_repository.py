"""Many models in one process: loaded on demand, within a limit of memory, replaced while they answer."""

import contextlib
import json
import shutil
import threading
import time

import pytest
from helpers.bundles import renew_checksums
from helpers.http import wait_for
from patchcore_plugin.bento import repository as repositories
from patchcore_plugin.bento.pipeline import _summary
from patchcore_plugin.bento.repository import ModelRepository, UnknownModelError, find_bundles
from patchcore_plugin.bento.settings import Settings

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
def make(folder, events, monkeypatch):
    """Make a repository of the models in ``folder``, which looks for changes at every request, and not in between."""
    monkeypatch.setattr(repositories, "_SECONDS_BETWEEN_LOOKS", 3600)

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
    assert repository.loaded() == {}
    model = repository.get(repository.resolve("left"))
    assert model.predict(test_images[:1])[0].score > 0
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
    assert [(name, model.device) for name, model in repository.loaded().items()] == [("left", "CPU"), ("top", "CPU")]
    assert ("right", "dropped") in events


def test_one_model_is_kept_whatever_the_limit(make):
    repository = make(max_bytes=1)
    repository.get("left")
    repository.get("right")
    assert list(repository.loaded()) == ["right"]


def test_preload(make, folder):
    repository = make(default="right")
    assert repository.preload()
    assert list(repository.loaded()) == ["right"]
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
                model.predict(test_images[:1])
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
    (summary,) = (_summary(name, folder / name, model) for name, model in repository.loaded().items())
    assert (summary.version, summary.loaded) == (old.version, True), "what answers"
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
    assert repository.loaded() == {}
    assert repository.get("left").manifest.name == "cells"


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


def spoil_neighbors(folder) -> None:
    """A bundle whose checksums are right, and whose array begins as no array does: NumPy's tokenizer fails on it."""
    file = folder / "bank.npy"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"), }", b"    ", 1))
    renew_checksums(folder)


def test_whatever_a_load_raises_refuses_the_bundle_once(repository, folder, events):
    spoil_neighbors(folder / "right")
    for _ in range(3):
        with pytest.raises(BundleError, match=r"bank\.npy is damaged: it does not begin as an array"):
            repository.get("right")
    assert events == [("right", "refused")]
    old = repository.get("left")
    spoil_neighbors(folder / "left")
    repository.get("left")
    wait_for(lambda: events.count(("left", "refused")) == 1)
    wait_for(lambda: not any(thread.name == "load-left" for thread in threading.enumerate()))
    assert all(repository.get("left") is old for _ in range(5))
    assert events.count(("left", "refused")) == 1


def test_error_that_no_check_foresaw(folder, events):
    """An exception of any kind is the reason of a refusal."""

    def load(path):
        raise ZeroDivisionError(path.name)

    repository = ModelRepository(
        lambda: {"left": folder / "left"}, load, 1, on_load=lambda name, result: events.append((name, result))
    )
    assert not any(repository.preload() for _ in range(3))
    with pytest.raises(BundleError, match=r"left cannot be loaded: ZeroDivisionError"):
        repository.get("left")
    assert events == [("left", "refused")]


def swap(folder) -> None:
    (folder / "left").rename(folder / ".away")
    (folder / ".other").rename(folder / "left")
    (folder / ".away").rename(folder / ".other")


@pytest.fixture
def swapped(folder):
    """The folder of the models, with another version of the left one beside it."""
    shutil.copytree(folder / "left", folder / ".other")
    rename(folder / ".other", "newer")
    return folder


def test_swapped_while_it_is_loaded(swapped):
    """A model names the version that was loaded, and is loaded again if that is no longer the one in the folder."""
    loads = []

    def load(path):
        loads.append(path)
        if len(loads) > 1:
            return PatchcoreRuntime.load(path, cache=False)
        swap(swapped)  # there and back, so that the folder looks as before
        runtime = PatchcoreRuntime.load(path, cache=False)
        swap(swapped)
        return runtime

    repository = ModelRepository(lambda: {"left": swapped / "left"}, load, 1, check_interval=0)
    model = repository.get("left")
    assert (model.manifest.name, model.version) == ("newer", version_of(swapped / ".other"))
    wait_for(lambda: repository.get("left").manifest.name == "cells")
    assert repository.get("left").version == version_of(swapped / "left")


def test_swaps_while_models_are_read(repository, swapped):
    """However fast two versions change places, an answer names the version that it is from, and the last one stays."""
    folder = swapped
    versions = {read_manifest(path).name: version_of(path) for path in (folder / "left", folder / ".other")}
    stop, seen = threading.Event(), []

    def ask():
        while not stop.is_set():
            with contextlib.suppress(BundleError, UnknownModelError):
                model = repository.get(repository.resolve("left"))
                seen.append((model.manifest.name, model.version))
            time.sleep(0.002)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    swaps = 0
    while swaps < 41 or (swaps < 401 and len(set(seen)) < 2):  # on a busy machine, loading takes longer than a swap
        swap(folder)
        time.sleep(0.05)
        swaps += 1
    if swaps % 2 == 0:
        swap(folder)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert set(seen) <= set(versions.items())
    assert len(set(seen)) == 2

    def is_settled():
        is_loading = any(thread.name == "load-left" for thread in threading.enumerate())
        return repository.get("left").version == version_of(folder / "left") and not is_loading

    wait_for(is_settled)
    assert repository.get("left").manifest == read_manifest(folder / "left")


def test_links_to_nothing(folder, caplog):
    """A link to nothing, in a bundle or beside it, does not keep new versions out, and is named once."""
    (folder / "gone").symlink_to(folder / "nowhere")
    settings = Settings(bundles=folder)
    repository = ModelRepository(
        lambda: find_bundles(settings), lambda path: PatchcoreRuntime.load(path, cache=False), 1 << 40, check_interval=0
    )
    old = repository.get("left")
    (folder / "left" / "notes").symlink_to(folder / "nowhere")
    rename(folder / "left", "newer")
    wait_for(lambda: repository.get("left").version != old.version)
    assert [record.getMessage() for record in caplog.records if "link to nothing" in record.getMessage()] == [
        f"{folder / 'gone'} is a link to nothing, and is left out of the bundles."
    ]


def test_bundle_that_a_killed_export_moved_away(folder, caplog):
    (folder / "left").rename(folder / ".left.0123abcd.old")
    assert set(find_bundles(Settings(bundles=folder))) == {"right", "top"}
    assert f"{folder / 'left'} is missing. It lies in {folder / '.left.0123abcd.old'} since" in caplog.text


def test_folder_of_bundles_that_cannot_be_listed():
    """Whatever keeps the service from its bundles is an error of bundles, and no end of the process."""

    def find():
        raise PermissionError("not yours")

    repository = ModelRepository(find, PatchcoreRuntime.load, 1)
    assert not repository.preload()
    with pytest.raises(BundleError, match="not yours"):
        repository.resolve(None)


def test_new_version_is_loaded_without_a_request(repository, folder, monkeypatch):
    """The first image after a swap gets the new version, however long the service was idle."""
    monkeypatch.setattr(repositories, "_SECONDS_BETWEEN_LOOKS", 0.05)
    before = repository.get("left").version
    shutil.copytree(folder / "left", folder / ".new")
    rename(folder / ".new", "renamed")
    (folder / "left").rename(folder / ".old")
    (folder / ".new").rename(folder / "left")
    wait_for(lambda: repository._entries["left"].runtime.version != before, 30)
    assert repository.get("left").version == version_of(folder / "left")
