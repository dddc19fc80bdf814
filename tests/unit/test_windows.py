"""What Windows does otherwise, tried where it can be: open files, names, encodings, the start of processes, odd times."""

import ast
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path, PureWindowsPath

import pytest
from click.testing import CliRunner
from helpers.old_files import IMAGES, OLD
from helpers.training import ROOT
from helpers.windows import held_files, obey_windows

from patchcore_plugin import PatchcoreRuntime, moving
from patchcore_plugin.bundle import FILES, MANIFEST, BundleError, atomic_folder
from patchcore_plugin.cli import main
from patchcore_plugin.record import Answer, Filter, RecordWriter, prepare, read_history
from patchcore_plugin.record.ids import make_id
from patchcore_plugin.watching.moves import free_name

RUN = """
import ast, sys
from patchcore_plugin.cli import main
for command in ast.literal_eval(sys.argv[1]):
    try:
        main(command)
    except SystemExit as end:
        assert not end.code
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell what is open")


@pytest.fixture
def old_bundle(tmp_path):
    return Path(shutil.copytree(OLD / "bundle-hnsw", tmp_path / "bundle"))


@pytest.fixture
def rules(monkeypatch):
    obey_windows(monkeypatch)


@needs_proc
def test_the_rules(rules, tmp_path):
    file = tmp_path / "folder" / "file"
    file.parent.mkdir()
    file.touch()
    with file.open(), pytest.raises(PermissionError, match="in use"):
        file.parent.rename(tmp_path / "other")
    file.parent.rename(tmp_path / "other")


@needs_proc
def test_bundle_in_use_is_replaced(rules, old_bundle):
    """A loaded runtime holds no file of its bundle, so the service need not end for a new one."""
    runtime = PatchcoreRuntime(old_bundle, cache=old_bundle.with_name("cache"))
    again = PatchcoreRuntime(old_bundle, cache=old_bundle.with_name("cache"))
    assert not [path for path in held_files() if path.startswith(str(old_bundle.parent))]
    with atomic_folder(old_bundle, overwrite=True) as draft:
        shutil.copytree(OLD / "bundle-format-2", draft, dirs_exist_ok=True)
    assert [one.score for one in again.predict(IMAGES)] == [one.score for one in runtime.predict(IMAGES)]
    assert [path.name for path in old_bundle.parent.iterdir() if path.name.startswith(".")] == []


@needs_proc
def test_commands(rules, old_bundle, tmp_path):
    """They write tables and heatmaps over earlier ones, and move images, while nothing of them is open."""
    shutil.copytree(OLD / "images", tmp_path / "images")
    for _ in range(2):
        commands = (
            ["predict", str(old_bundle), str(tmp_path / "images"), "--output", str(tmp_path / "out")],
            [
                "watch",
                str(old_bundle),
                str(tmp_path / "images"),
                "--once",
                "--move",
                str(tmp_path / "moved"),
                "--poll",
                "0.05",
            ],
        )
        for command in commands:
            result = CliRunner().invoke(main, command, catch_exceptions=False)
            assert result.exit_code == 0, result.output
        shutil.copytree(OLD / "images", tmp_path / "images", dirs_exist_ok=True)
    assert len(list((tmp_path / "moved").rglob("*.png"))) == 2 * len(IMAGES)


@needs_proc
def test_record(rules, tmp_path):
    """Images go when there are too many, and the folder when the service has ended."""
    prepare(tmp_path / "record")
    writer = RecordWriter(tmp_path / "record", days=1, limit=16 << 20)
    fields = {"model": "cells", "version": "1", "score": 1.0, "ratio": 1.0, "verdict": "normal", "p_value": None}
    for _ in range(3):
        writer.put(Answer(make_id(), "request", "a.png", "0" * 64, fields, bytes(5 << 20)))
        time.sleep(0.7)  # or they are written together
    writer.close(20)
    assert sorted(answer["image"] for answer in read_history(tmp_path / "record", Filter(), 10)) == [False, True, True]
    assert len(list((tmp_path / "record" / "images").rglob("*.bin"))) == 2
    (tmp_path / "record").rename(tmp_path / "old")


@needs_proc
@pytest.mark.parametrize("seconds", [0.2, None])
def test_file_that_a_scanner_looks_at(rules, tmp_path, monkeypatch, seconds):
    """A rename waits for it, though not for ever."""
    monkeypatch.setattr(moving, "_PAUSES", (0.05, 0.1, 0.2))
    path = tmp_path / "bundle"
    scanner = []

    def write():
        with atomic_folder(path) as draft:
            (draft / MANIFEST).write_text("new")
            scanner.append((draft / MANIFEST).open())
            if seconds:
                threading.Timer(seconds, scanner[0].close).start()

    monkeypatch.setattr("patchcore_plugin.bundle.draft._move", moving.rename)
    if seconds:
        write()
        assert (path / MANIFEST).read_text() == "new"
    else:
        with pytest.raises(BundleError, match=r"cannot be moved to .*in use"):
            write()
        scanner[0].close()


def test_no_name_of_ours_is_refused():
    """Of the files that this package writes, and of those in the repository, which is cloned there."""
    tracked = [path.relative_to(ROOT).as_posix() for folder in ("bento", "configs", "patchcore_plugin", "tests")
               for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]  # fmt: skip
    names = {*FILES, MANIFEST, *(part for path in tracked for part in path.split("/"))}
    bad = [name for name in names if PureWindowsPath(name).is_reserved() or name[-1] in ". " or set('<>:"\\|?*') & set(name)]
    assert bad == []
    assert len({path.lower() for path in tracked}) == len(tracked)
    assert max(map(len, tracked)) < 120


@pytest.mark.parametrize("changed", [-1, -11_644_473_600 * 10**9, 2**63 - 1, 10**25])
def test_time_that_no_clock_shows(tmp_path, changed):
    """As of a camera whose clock was never set."""
    (tmp_path / "a.png").touch()
    assert free_name(tmp_path, "a.png", changed).startswith("a.")


def test_console_without_the_characters_of_a_name(old_bundle, tmp_path):
    """What a console cannot show is escaped, and the tables have it as it is."""
    folder = tmp_path / "Gehäuse 外観 [1]"
    shutil.copytree(OLD / "images", folder)
    shutil.copy(next(folder.iterdir()), folder / "欠陥.png")
    commands = (
        ["info", str(old_bundle)],
        ["predict", str(old_bundle), str(folder), "--output", str(tmp_path / "出力")],
        ["watch", str(old_bundle), str(folder), "--once", "--poll", "0.05", "--output", str(tmp_path / "見た")],
    )
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", RUN, ascii(commands)], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"\u51fa\u529b" in done.stdout
    assert "Gehäuse".encode("cp1252") in done.stdout
    assert "欠陥.png" in (tmp_path / "出力" / "results.csv").read_text(encoding="utf-8")
    assert "欠陥.png" in (tmp_path / "見た" / "results.csv").read_text(encoding="utf-8")


def test_every_text_file_has_an_encoding():
    """The system's own is rarely UTF-8 on Windows."""
    found = []
    for path in (path for folder in ("bento", "patchcore_plugin") for path in (ROOT / folder).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)):
            name, of = getattr(call.func, "attr", getattr(call.func, "id", "")), ast.unparse(call.func)
            texts = [getattr(value, "value", None) for value in call.args] + [word.arg for word in call.keywords]
            is_open = name == "open" and of not in ("Image.open", "os.open") and not any("b" in str(text) for text in texts)
            if is_open or name in ("read_text", "write_text"):
                explicit = "encoding" in texts or (name == "read_text" and call.args)
                found += [] if explicit else [f"{path.name}:{call.lineno} {ast.unparse(call)}"]
    assert found == []


def test_settings_are_utf_8_whatever_the_system_has(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("bundle: Gehäuse\n", encoding="utf-8")
    code = "from patchcore_plugin.bento.settings import read_settings; print(ascii(str(read_settings().bundle)))"
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PATCHCORE_SETTINGS": str(file),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == r"'Geh\xe4use'"
