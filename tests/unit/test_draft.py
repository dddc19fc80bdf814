"""Folders that are whole or absent, whatever else happens at their place, and however their writer ends."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from patchcore_plugin.bundle import MANIFEST, BundleError, atomic_folder, find_left_behind, read_manifest

posix = pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal, and locks no folder")

WRITER = """
import sys, time
from pathlib import Path
from patchcore_plugin.bundle import MANIFEST, atomic_folder

if sys.argv[2] == "between":  # the two renames
    rename = Path.rename
    def slow(self, target):
        result = rename(self, target)
        if Path(target).name.startswith(".bundle."):
            print("ready", flush=True)
            time.sleep(60)
        return result
    Path.rename = slow
with atomic_folder(sys.argv[1], overwrite=True) as draft:
    (draft / MANIFEST).write_text("new")
    if sys.argv[2] == "draft":
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bundle"


def fill(path, text="new", **arguments) -> None:
    with atomic_folder(path, **arguments) as draft:
        (draft / MANIFEST).write_text(text)


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def appear(path, content: str | None) -> None:
    """Let a folder appear: empty, with a manifest, or a file instead."""
    if content == "a file":
        path.write_text("dear")
        return
    path.mkdir()
    if content is not None:
        (path / MANIFEST).write_text(content)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [None, "theirs", "a file"])
def test_what_appears_meanwhile_is_not_replaced(path, overwrite, content):
    def write():
        with atomic_folder(path, overwrite=overwrite) as draft:
            (draft / MANIFEST).write_text("ours")
            appear(path, content)

    with pytest.raises(BundleError, match="bundle has appeared since the writing of the bundle began; it is not replaced"):
        write()
    assert names(path.parent) == ["bundle"]
    assert path.is_file() if content == "a file" else names(path) == ([MANIFEST] if content else [])


def test_two_writers_to_one_new_folder(path):
    """One of them succeeds, and the other one is told."""
    together, errors = threading.Barrier(2), []

    def write(text):
        try:
            with atomic_folder(path) as draft:
                (draft / MANIFEST).write_text(text)
                together.wait(10)
        except BundleError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 1
    assert "it is not replaced" in str(errors[0])
    assert (path / MANIFEST).read_text() in {"one", "other"}
    assert names(path.parent) == ["bundle"]


@pytest.mark.parametrize("change", ["another bundle", "another file"])
def test_bundle_that_changes_meanwhile_is_not_overwritten(path, change):
    fill(path, "old")

    def write():
        with atomic_folder(path, overwrite=True) as draft:
            (draft / MANIFEST).write_text("ours")
            if change == "another file":
                (path / "holiday.jpg").write_text("dear")
            else:
                fill(path, "theirs", overwrite=True)

    with pytest.raises(BundleError, match="it is not overwritten"):
        write()
    assert (path / MANIFEST).read_text() == ("old" if change == "another file" else "theirs")
    assert names(path.parent) == ["bundle"]


def ended(path, place, number) -> int:
    """Exit code of a writer that gets a signal at a place of its work."""
    command = [sys.executable, "-c", WRITER, str(path), place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        return process.wait(30)


@posix
@pytest.mark.parametrize("place", ["draft", "between"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_leaves_nothing(path, place, number):
    fill(path, "old")
    code = ended(path, place, number)
    assert code == (128 + number if number == signal.SIGTERM else -number)
    assert (path / MANIFEST).read_text() == "old"
    assert names(path.parent) == ["bundle"]


@posix
def test_draft_of_a_killed_writer_is_removed_by_the_next(path):
    assert ended(path, "draft", signal.SIGKILL) == -signal.SIGKILL
    (left,) = names(path.parent)
    assert left.startswith(".bundle.")
    with atomic_folder(path) as draft:
        (draft / MANIFEST).write_text("ours")
        assert not (path.parent / left).exists()
        fill(path.with_name("other"))
        assert draft.exists(), "the draft of a writer that lives stays"
    assert names(path.parent) == ["bundle", "other"]


@posix
def test_bundle_of_a_killed_writer_is_found_and_put_back(path):
    fill(path, "old")
    assert ended(path, "between", signal.SIGKILL) == -signal.SIGKILL
    (old,) = path.parent.glob(".bundle.*.old")
    assert find_left_behind(path.parent) == {path: old}
    with pytest.raises(BundleError, match=r"no bundle folder .*bundle. Its last one lies in .*\.bundle\.\w{8}\.old, since"):
        read_manifest(path)
    with pytest.raises(BundleError, match="exists already"):
        fill(path)
    assert (path / MANIFEST).read_text() == "old"
    assert names(path.parent) == ["bundle"]
    assert find_left_behind(path.parent) == {}


@posix
def test_writer_at_work_is_left_alone(path):
    """Neither a reader nor another writer takes a living writer's work for left behind."""
    fill(path, "old")
    command = [sys.executable, "-c", WRITER, str(path), "between"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        before = names(path.parent)
        assert find_left_behind(path.parent) == {}
        fill(path, "theirs")
        assert names(path.parent) == sorted([*before, "bundle"])
        process.terminate()
        process.wait(30)
    (kept,) = path.parent.glob("bundle.*.old")
    assert (path / MANIFEST).read_text() == "theirs"
    assert (kept / MANIFEST).read_text() == "old"


def test_signals_that_a_program_handles_stay_its_own(path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with atomic_folder(path) as draft:
            (draft / MANIFEST).write_text("new")
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
