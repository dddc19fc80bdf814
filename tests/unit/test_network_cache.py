"""Compiled networks on disk: found again, never believed when damaged, never needed."""

import hashlib
import logging
import os

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from patchcore_plugin.runtime.device import device_facts
from patchcore_plugin.runtime.network_cache import cache_file, compile_or_restore

OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
FACTS = device_facts(ov.Core(), "CPU")


def network(factor: float) -> ov.Model:
    values = ops.parameter([1, 4], np.float32)
    return ov.Model([ops.matmul(values, ops.constant(np.full((4, 4), factor, np.float32)), False, False)], [values])


def unread() -> ov.Model:
    msg = "the network was compiled again"
    raise AssertionError(msg)


@pytest.fixture
def core():
    return ov.Core()


@pytest.fixture
def file(core, tmp_path):
    ov.save_model(network(2), tmp_path / "network.xml")
    return cache_file(tmp_path / "cache", checksums(tmp_path), OPTIONS, FACTS)


def checksums(folder) -> list[str]:
    return [hashlib.sha256((folder / f"network.{suffix}").read_bytes()).hexdigest() for suffix in ("xml", "bin")]


def answer(compiled: ov.CompiledModel) -> float:
    return float(compiled([np.ones((1, 4), np.float32)])[0][0, 0])


def test_found_again(core, file):
    assert answer(compile_or_restore(core, lambda: network(2), "CPU", OPTIONS, file)) == 8
    assert [kept.name for kept in file.parent.iterdir()] == [file.name]
    assert answer(compile_or_restore(core, unread, "CPU", OPTIONS, file)) == 8
    assert answer(compile_or_restore(core, lambda: network(3), "CPU", OPTIONS, None)) == 12


@pytest.mark.parametrize("damage", ["empty", "garbage", "half", "one byte less", "flipped", "checksum alone", "foreign"])
def test_damaged(core, file, damage, caplog):
    compile_or_restore(core, lambda: network(2), "CPU", OPTIONS, file)
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    foreign = b"no network"
    file.write_bytes(
        {
            "empty": b"",
            "garbage": b"\x80" * 4096,
            "half": content[: len(content) // 2],
            "one byte less": content[:-1],
            "flipped": bytes(flipped),
            "checksum alone": content[:32],
            "foreign": hashlib.sha256(foreign).digest() + foreign,
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert answer(compile_or_restore(core, lambda: network(2), "CPU", OPTIONS, file)) == 8
    assert "compiled again" in caplog.text
    assert answer(compile_or_restore(core, unread, "CPU", OPTIONS, file)) == 8, "it was not mended"


def test_folder_that_cannot_be_written(core, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for _ in range(2):
        assert answer(compile_or_restore(core, lambda: network(2), "CPU", OPTIONS, tmp_path / "file" / "x.blob")) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_network_or_option_is_another_file(core, file, tmp_path):
    path = checksums(tmp_path)
    files = {file, cache_file(tmp_path / "cache", path, {**OPTIONS, "NUM_STREAMS": 2}, FACTS)}
    assert cache_file(tmp_path / "cache", path, dict(OPTIONS), FACTS) == file
    ov.save_model(network(3), tmp_path / "network.xml")
    files.add(cache_file(tmp_path / "cache", checksums(tmp_path), OPTIONS, FACTS))
    assert len(files) == 3


def plant(core, file) -> None:
    """A sound file in the cache, but of another network."""
    compile_or_restore(core, lambda: network(3), "CPU", OPTIONS, file)
    assert answer(compile_or_restore(core, unread, "CPU", OPTIONS, file)) == 12


needs_owners = pytest.mark.skipif(os.name == "nt", reason="Windows has access control lists instead")


@needs_owners
@pytest.mark.parametrize("target", ["folder", "file"])
@pytest.mark.parametrize("harm", ["others can write", "others own"])
def test_planted_by_others(core, file, target, harm, caplog):
    plant(core, file)
    planted = file.parent if target == "folder" else file
    if harm == "others can write":
        planted.chmod(0o777)
    elif os.geteuid():
        pytest.skip("only root can give a file away")
    else:
        os.chown(planted, 65534, -1)
    content = file.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert answer(compile_or_restore(core, lambda: network(2), "CPU", OPTIONS, file)) == 8
    assert "others own it or can write it" in caplog.text
    assert (file.read_bytes() == content) == (target == "folder"), "a folder of others is left as it is"


@needs_owners
def test_nobody_else_can_read_or_write(core, file):
    plant(core, file)
    assert [path.stat().st_mode & 0o777 for path in (file.parent, file)] == [0o700, 0o600]


def test_file_of_another_network_under_this_name(core, file):
    other = file.with_name("other.blob")
    plant(core, other)
    other.replace(file)
    assert answer(compile_or_restore(core, lambda: network(2), "CPU", OPTIONS, file)) == 8


@needs_owners
def test_pipe_in_the_place_of_a_file(core, file):
    file.parent.mkdir(mode=0o700)
    os.mkfifo(file)
    assert answer(compile_or_restore(core, lambda: network(2), "CPU", OPTIONS, file)) == 8


def test_draft_of_a_killed_process_is_removed(core, file):
    file.parent.mkdir(mode=0o700)
    old, new = (file.with_name(f".{file.name}.{age}.tmp") for age in ("old", "new"))
    for draft in (old, new):
        draft.write_bytes(b"half")
    os.utime(old, (0, 0))
    compile_or_restore(core, lambda: network(2), "CPU", OPTIONS, file)
    assert {path.name for path in file.parent.iterdir()} == {file.name, new.name}
