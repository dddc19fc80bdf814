"""A folder that is watched: which files are finished, what is noted, and what a kill at any moment leaves behind."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.http import wait_for
from helpers.receivers import free_port, lie, receive
from PIL import Image

from patchcore_plugin.drawings import save_drawing
from patchcore_plugin.errors import PatchcoreError, UsageError
from patchcore_plugin.images import ImageError, read_image
from patchcore_plugin.names import from_cell
from patchcore_plugin.watching import Options, watch
from patchcore_plugin.watching.looks import FileId, Looks, identify
from patchcore_plugin.watching.moves import free_name, move_file
from patchcore_plugin.watching.results import append, check_file, header
from patchcore_plugin.watching.scorers import Answer, ServiceDownError
from patchcore_plugin.watching.state import Answered, State, StateError
from patchcore_plugin.webhook import Receiver


class Brightness:
    """A scorer whose verdict is how bright an image is: what a watch needs of a scorer, without a trained model."""

    def check(self):
        pass

    def answers(self, files, *, heatmaps):
        for file in files:
            try:
                pixels = read_image(file)
            except (ImageError, OSError) as error:
                yield error
                continue
            score = float(pixels.mean())
            verdict = "anomalous" if score > 170 else "review" if score > 85 else "normal"
            fields = {
                "score": score,
                "verdict": verdict,
                "threshold": 170.0,
                "model": "light",
                "version": "1",
                "regions": [],
            }
            yield Answer(fields, partial(save_drawing, Image.fromarray(pixels)) if heatmaps else None)


def picture(path, level=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), level, np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def start(tmp_path, folder):
    """A function that watches ``folder`` in a thread, until the test's end or a call of ``stop``."""
    started = []

    def start(scorer=None, **options):
        end, outcome = threading.Event(), {}
        options = Options(tmp_path / "out", **{"poll": 0.02, "patience": 0.3, **options})

        def work():
            try:
                outcome["summary"] = watch(folder, scorer or Brightness(), options, end)
            except Exception as error:
                outcome["error"] = error

        thread = threading.Thread(target=work)
        thread.start()

        def stop():
            end.set()
            thread.join(60)
            assert not thread.is_alive()
            if "error" in outcome:
                raise outcome["error"]
            return outcome["summary"]

        started.append((end, thread))
        return stop

    yield start
    for end, thread in started:
        end.set()
        thread.join(60)


def rows(tmp_path, form="csv"):
    """The results, each with the image's name as it is."""
    file = tmp_path / "out" / f"results.{form}"
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    if form == "jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return [{**row, "image": from_cell(row["image"])} for row in csv.DictReader(text.splitlines())]


def once(tmp_path, folder, **options):
    options = {"poll": 0.02, "patience": 0.1, "once": True, **options}
    return watch(folder, Brightness(), Options(tmp_path / "out", **options), threading.Event())


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_each_file_is_answered_once(tmp_path, folder, form):
    """What is there before, in subfolders too; names that a spreadsheet would compute; a second run finds nothing to do."""
    levels = {"a.png": 0, "day 1/=1+1.png": 255, "day 1/é.bmp": 100, "B.JPG": 255}
    for name, level in levels.items():
        picture(folder / name, level)
    (folder / "notes.txt").write_text("no image")
    picture(folder / ".hidden.png")
    save_drawing(Image.new("RGB", (8, 8)), folder / "a.png.png")
    summary = once(tmp_path, folder, form=form)
    assert dict(summary.verdicts) == {"normal": 1, "anomalous": 2, "review": 1}
    found = {row["image"]: row for row in rows(tmp_path, form)}
    assert set(found) == set(levels)
    assert found["day 1/é.bmp"]["verdict"] == "review"
    assert float(found["B.JPG"]["score"]) == 255
    for name in levels:
        assert (tmp_path / "out" / found[name]["heatmap"]).is_file()
    assert once(tmp_path, folder, form=form).answers == 0
    assert len(rows(tmp_path, form)) == 4


def test_file_that_is_still_written(tmp_path, folder, start):
    """It is waited for, however slowly it comes; an unreadable file meanwhile holds up no other."""
    stop = start(heatmaps=False, patience=1.0)
    content = picture(tmp_path / "slow.bmp", 255, 64).read_bytes()
    (folder / "broken.png").write_bytes(b"no image")
    with (folder / "slow.bmp").open("wb", buffering=0) as file:
        for begin in range(0, len(content), len(content) // 20 + 1):
            file.write(content[begin : begin + len(content) // 20 + 1])
            time.sleep(0.02)
            picture(folder / f"{begin}.png")
    wait_for(lambda: len(rows(tmp_path)) == 22)
    summary = stop()
    assert Counter(row["image"] for row in rows(tmp_path)).most_common(1)[0][1] == 1
    (slow,) = [row for row in rows(tmp_path) if row["image"] == "slow.bmp"]
    assert (slow["verdict"], slow["error"]) == ("anomalous", "")
    (broken,) = [row for row in rows(tmp_path) if row["image"] == "broken.png"]
    assert (broken["verdict"], broken["score"]) == ("", "")
    assert "not one of PNG" in broken["error"]
    assert summary.unreadable == 1


def test_rename_into_place(tmp_path, folder, start):
    stop = start(heatmaps=False)
    content = picture(tmp_path / "a.png", 255).read_bytes()
    (folder / "a.png.tmp").write_bytes(content[:50])
    time.sleep(0.1)
    (folder / "a.png.tmp").write_bytes(content)
    (folder / "a.png.tmp").rename(folder / "a.png")
    wait_for(lambda: rows(tmp_path))
    stop()
    assert [row["image"] for row in rows(tmp_path)] == ["a.png"]


def test_name_that_is_used_again(tmp_path, folder, start):
    """Each picture is answered, and keeps its heatmap."""
    stop = start()
    for number, level in enumerate([0, 255, 100]):
        picture(folder / "part.png", level)
        os.utime(folder / "part.png", (1e9 + number, 1e9 + number))
        wait_for(lambda number=number: len(rows(tmp_path)) == number + 1)
    stop()
    found = rows(tmp_path)
    assert [row["verdict"] for row in found] == ["normal", "anomalous", "review"]
    assert len({row["heatmap"] for row in found}) == 3
    assert all((tmp_path / "out" / row["heatmap"]).is_file() for row in found)
    assert "part.png.20010909T014641.png" in found[1]["heatmap"]


def test_file_that_changes_while_it_is_scored(tmp_path, folder):
    """The answer is for what was read, so it is not given: the file is answered anew."""

    class Slow(Brightness):
        def answers(self, files, *, heatmaps):
            for file, answer in zip(files, super().answers(files, heatmaps=heatmaps), strict=True):
                if answer.fields["score"] == 0:
                    picture(file, 255)
                    os.utime(file, (1e9, 1e9))
                yield answer

    picture(folder / "a.png", 0)
    watch(folder, Slow(), Options(tmp_path / "out", poll=0.02, once=True), threading.Event())
    assert [row["verdict"] for row in rows(tmp_path)] == ["anomalous"]


def test_moved_by_verdict(tmp_path, folder):
    """Nothing is replaced; subfolders are kept; the folder is empty afterwards, and the state too."""
    for name, level in {"a.png": 0, "b.png": 255, "sub/c.png": 100}.items():
        picture(folder / name, level)
    (folder / "d.png").write_bytes(b"")
    done = tmp_path / "done"
    (done / "normal").mkdir(parents=True)
    (done / "normal" / "a.png").write_bytes(b"something else")
    once(tmp_path, folder, move=done)
    found = {row["image"]: row for row in rows(tmp_path)}
    assert found["b.png"]["moved_to"] == "anomalous/b.png"
    assert found["sub/c.png"]["moved_to"] == "review/sub/c.png"
    assert found["d.png"]["moved_to"] == "unreadable/d.png"
    assert (done / "normal" / "a.png").read_bytes() == b"something else"
    assert found["a.png"]["moved_to"].startswith("normal/a.20")
    assert all((done / row["moved_to"]).is_file() for row in found.values())
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    state = State(tmp_path / "out" / "state.sqlite", folder)
    assert (state.answered, state.moves(10), state.unfinished_results()) == ({}, [], [])
    state.close()


def test_move_that_fails_is_done_later(tmp_path, folder, start, caplog):
    """The place is a file at first: images are answered all the same."""
    (tmp_path / "done").write_bytes(b"")
    stop = start(move=tmp_path / "done", heatmaps=False)
    for number in range(5):
        picture(folder / f"{number}.png")
    wait_for(lambda: len(rows(tmp_path)) == 5 and "is tried again" in caplog.text)
    (tmp_path / "done").unlink()
    wait_for(lambda: len(list((tmp_path / "done" / "normal").glob("*.png"))) == 5)
    assert stop().answers == len(rows(tmp_path)) == 5
    assert "It goes on" in caplog.text


def test_results_that_cannot_be_written_for_some_time(tmp_path, folder, start):
    """As while a spreadsheet has the file open: here a folder is in its place."""
    stop = start(heatmaps=False)
    picture(folder / "a.png")
    wait_for(lambda: rows(tmp_path))
    results = tmp_path / "out" / "results.csv"
    results.rename(tmp_path / "january.csv")
    results.mkdir()
    for number in range(5):
        picture(folder / f"{number}.png")
    time.sleep(0.3)
    results.rmdir()
    wait_for(lambda: len(rows(tmp_path)) == 5)
    assert stop().answers == 6
    assert results.read_bytes().startswith(header("csv"))


class FlakyService(Brightness):
    """A service that is down for some requests."""

    def __init__(self, down):
        self.down = down

    def answers(self, files, *, heatmaps):
        for answer in super().answers(files, heatmaps=heatmaps):
            if self.down:
                self.down -= 1
                message = "The service is down."
                raise ServiceDownError(message, wait=0.01)
            yield answer


def test_service_that_is_down(tmp_path, folder, start, caplog):
    for number in range(30):
        picture(folder / f"{number}.png")
    stop = start(FlakyService(2), heatmaps=False)
    wait_for(lambda: len(rows(tmp_path)) == 30)
    stop()
    assert caplog.text.count("The service is down.") == 2, "once when it is, and once when it goes on"


def test_service_that_fails_at_one_image(tmp_path, folder, start):
    """The oldest one, again and again: the others are answered."""

    class Failing(Brightness):
        def answers(self, files, *, heatmaps):
            for file, answer in zip(files, super().answers(files, heatmaps=heatmaps), strict=True):
                if file.name == "a.png":
                    message = "The service answers 500."
                    raise ServiceDownError(message, wait=0.01, one=True)
                yield answer

    os.utime(picture(folder / "a.png"), (1e9, 1e9))
    stop = start(Failing(), heatmaps=False)
    for number in range(5):
        picture(folder / f"{number}.png")
    wait_for(lambda: len(rows(tmp_path)) == 5)
    stop()
    assert "a.png" not in {row["image"] for row in rows(tmp_path)}


def test_service_that_stays_down(tmp_path, folder):
    """``once`` ends, and says what it left."""
    picture(folder / "a.png")
    options = Options(tmp_path / "out", poll=0.01, patience=0, once=True)
    summary = watch(folder, FlakyService(10**9), options, threading.Event())
    assert (summary.answers, summary.left) == (0, 1)


def test_once_leaves_what_is_still_written(tmp_path, folder):
    """It ends, although the file never does; the other one is answered."""
    picture(folder / "a.png")
    done = threading.Event()

    def write():
        with (folder / "b.png").open("wb", buffering=0) as file:
            while not done.wait(0.005):
                file.write(b"x")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        wait_for((folder / "b.png").exists)
        summary = once(tmp_path, folder)
    finally:
        done.set()
        thread.join()
    assert (summary.answers, summary.left) == (1, 1)
    assert [row["image"] for row in rows(tmp_path)] == ["a.png"]


def test_file_that_is_deleted_before_it_is_read(tmp_path, folder):
    """There is nothing to say of it, even without patience."""

    class Deleting(Brightness):
        def answers(self, files, *, heatmaps):
            for file in files:
                file.unlink()
            yield from super().answers(files, heatmaps=heatmaps)

    picture(folder / "a.png")
    options = Options(tmp_path / "out", poll=0.02, patience=0, once=True)
    assert watch(folder, Deleting(), options, threading.Event()).answers == 0
    assert rows(tmp_path) == []


def test_full_disk(tmp_path, folder, monkeypatch, start, caplog):
    """The state cannot grow for some time: images wait, and are answered afterwards, once each."""
    opened, connect = [], sqlite3.connect

    def connect_and_keep(file, *arguments, **options):
        opened.append(connect(file, *arguments, **options, check_same_thread=False))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", connect_and_keep)

    class Full(Brightness):
        def answers(self, files, *, heatmaps):
            full = "disk is full" not in caplog.text
            (pages,) = opened[0].execute("PRAGMA page_count").fetchone()
            opened[0].execute(f"PRAGMA max_page_count={pages if full else 10**6}")
            yield from super().answers(files, heatmaps=heatmaps)

    for number in range(40):
        picture(folder / f"{number}-{'x' * 200}.png", 255)
    stop = start(Full(), heatmaps=False)
    wait_for(lambda: len(rows(tmp_path)) == 40)
    stop()
    assert len({row["image"] for row in rows(tmp_path)}) == 40
    assert "images wait: database or disk is full" in caplog.text


def test_webhook_is_told(tmp_path, folder):
    """Of what is not normal, and of what cannot be read; each file once."""
    for number in range(9):
        picture(folder / f"{number}.png", 127 * (number % 3))
    (folder / "broken.png").write_bytes(b"no image")
    with receive() as (receiver, url):
        summary = once(tmp_path, folder, receiver=Receiver(url), move=tmp_path / "done")
    assert summary.events == 0
    told = {event["data"]["file"]: event for event in receiver.events}
    assert len(told) == len(receiver.events) == 7
    assert Counter(event["type"] for event in told.values()) == {
        "image.anomalous": 3,
        "image.review": 3,
        "image.unreadable": 1,
    }
    assert told["1.png"]["data"].items() >= {"verdict": "review", "moved_to": "review/1.png", "score": 127.0}.items()
    assert "not one of PNG" in told["broken.png"]["data"]["error"]


def hang(connection, stopped):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not stopped.wait(0.01):
        connection.sendall(b"a: b\r\n")


def test_receiver_that_lies_slows_no_image(tmp_path, folder, start):
    """All images are answered while the first event still hangs."""
    with lie(hang) as (url, taken):
        stop = start(receiver=Receiver(url), heatmaps=False)
        picture(folder / "first.png", 255)
        wait_for(lambda: taken)
        for number in range(50):
            picture(folder / f"{number}.png", 255)
        wait_for(lambda: len(rows(tmp_path)) == 51)
        assert len(taken) == 1
        end = threading.Thread(target=stop)
        end.start()
        end.join(30)
        assert not end.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["down", "slow", "lying"])
def test_receiver_for_a_minute(tmp_path, folder, start, kind):
    """With the pauses that users have: a minute of trouble, while files come. All are answered meanwhile, and told after."""
    port, good = free_port(), time.monotonic() + 60

    def status(event):
        if time.monotonic() < good:
            time.sleep(12 if kind == "slow" else 0)
            return 200 if kind == "slow" else (500, {"Retry-After": "9" * 12})
        return 200

    with ExitStack() as stack:
        if kind != "down":
            receiver, _ = stack.enter_context(receive(status, port=port))
        stop = start(receiver=Receiver(f"http://127.0.0.1:{port}/"), heatmaps=False)
        for number in range(100):
            picture(folder / f"{number}.png", 255)
            time.sleep(0.5)
        wait_for(lambda: len(rows(tmp_path)) == 100)
        assert time.monotonic() < good, "all are answered while the receiver is in trouble"
        time.sleep(max(0, good - time.monotonic()))
        if kind == "down":
            receiver, _ = stack.enter_context(receive(status, port=port))
        wait_for(lambda: len({event["data"]["file"] for event in receiver.events}) == 100, 400)
        assert stop().events == 0
        print(kind, len(receiver.requests), "requests for", len(set(receiver.ids)), "events")
        assert len(set(receiver.ids)) == 100


def test_webhook_that_is_down_is_told_at_the_next_start(tmp_path, folder):
    port = free_port()
    for number in range(5):
        picture(folder / f"{number}.png", 255)
    summary = once(tmp_path, folder, receiver=Receiver(f"http://127.0.0.1:{port}/"))
    assert (summary.answers, summary.events) == (5, 5)
    with receive(port=port) as (receiver, url):
        assert once(tmp_path, folder, receiver=Receiver(url)).events == 0
    assert {event["data"]["file"] for event in receiver.events} == {f"{number}.png" for number in range(5)}


KILLS = r"""
import json, os, random, sys, threading
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from test_watching import Brightness, kill_run, picture
import shutil

root, seed, runs = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
choose = random.Random(seed)
for run in range(runs):
    place = root / str(run)
    (place / "in").mkdir(parents=True)
    for number in range(6):
        picture(place / "in" / f"{number}.png", 51 * number)
    (place / "in" / "broken.png").write_bytes(b"no image")
    kills = 0
    while kill_run(place, choose.randrange(1, 3000)):
        kills += 1
    print(run, kills, flush=True)
"""


def kill_run(place, lines):
    """Watch in a process of its own that ends, as if killed, at one of its lines; returns whether it was killed."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    left = [lines]

    def trace(frame, event, _):
        if "/watching/" not in frame.f_code.co_filename and "/webhook/" not in frame.f_code.co_filename:
            return None
        left[0] -= 1
        if not left[0]:
            os._exit(9)
        return trace

    options = Options(
        place / "out", poll=0.01, patience=0.02, once=True, move=place / "done", receiver=Receiver("http://127.0.0.1:9/")
    )
    sys.settrace(trace)
    try:
        watch(place / "in", Brightness(), options, threading.Event())
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
@pytest.mark.parametrize("runs", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_at_any_line(tmp_path, runs):
    """Each file has one line, one heatmap, one place and, if it is not normal, one event, wherever the kills were."""
    command = [sys.executable, "-c", KILLS, str(Path(__file__).parent), str(tmp_path), str(runs), str(runs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode == 0, result.stderr
    kills = [int(line.split()[1]) for line in result.stdout.splitlines()]
    assert len(kills) == runs
    assert sum(kills) >= runs
    names = [*(f"{number}.png" for number in range(6)), "broken.png"]
    for run in range(runs):
        place = tmp_path / str(run)
        found = rows(place)
        assert sorted(row["image"] for row in found) == sorted(names), run
        assert list((place / "in").iterdir()) == []
        moved = sorted(path.relative_to(place / "done").as_posix() for path in (place / "done").rglob("*") if path.is_file())
        assert moved == sorted(row["moved_to"] for row in found)
        assert (place / "done" / "unreadable" / "broken.png").read_bytes() == b"no image"
        drawn = {path.relative_to(place / "out").as_posix() for path in (place / "out" / "heatmaps").rglob("*.png")}
        assert drawn == {row["heatmap"] for row in found} - {""}
        events = sqlite3.connect(place / "out" / "webhook.sqlite").execute("SELECT body FROM events").fetchall()
        told = sorted(json.loads(body)["data"]["file"] for (body,) in events)
        assert told == sorted(row["image"] for row in found if row["verdict"] != "normal"), run


# Pieces


def test_second_watch_is_refused(tmp_path, folder, start):
    stop = start()
    wait_for((tmp_path / "out" / "state.sqlite").exists)
    time.sleep(0.1)
    code = f"""
from pathlib import Path
from patchcore_plugin.watching.state import State
State(Path({str(tmp_path / "out" / "state.sqlite")!r}), Path({str(folder)!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "StateError: Another patchcore watch is at work in" in result.stderr
    stop()
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)


def test_state_of_another_folder(tmp_path, folder):
    State(tmp_path / "state.sqlite", folder).close()
    with pytest.raises(StateError, match="results of another folder"):
        State(tmp_path / "state.sqlite", tmp_path)


@pytest.mark.parametrize("content", [b"no database" * 1000, 99])
def test_file_that_is_no_state(tmp_path, folder, content):
    if isinstance(content, int):
        database = sqlite3.connect(tmp_path / "state.sqlite")
        database.execute(f"PRAGMA user_version={content}")
        database.close()
    else:
        (tmp_path / "state.sqlite").write_bytes(content)
    with pytest.raises(StateError, match="Choose another --output"):
        State(tmp_path / "state.sqlite", folder)


def test_names_of_any_bytes(tmp_path, folder):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        picture(tmp_path / "a.png", 255).rename(folder / name)
    except OSError:
        pytest.skip("this file system has no such names")
    with receive() as (receiver, url):
        once(tmp_path, folder, move=tmp_path / "done", receiver=Receiver(url))
    (row,) = rows(tmp_path)
    assert row["image"] == r"caf\udce9.png"
    assert receiver.events[0]["data"]["file"] == r"caf\udce9.png"
    assert (tmp_path / "done" / "anomalous" / name).is_file()


def test_files_that_have_gone_are_forgotten_after_a_week(tmp_path, folder):
    """And not before: a share that is away for a day must not be answered again."""
    state, day, now = State(tmp_path / "state.sqlite", folder), 86_400, 1e9
    state.answer([Answered(name, FileId(1, 1), b"") for name in "abc"], "results.csv")
    state.forget_missing({"a"}, now)
    state.forget_missing({"a", "b"}, now + 6 * day)
    state.forget_missing({"a"}, now + 8 * day)
    assert set(state.answered) == {"a", "b"}
    state.forget_missing({"a"}, now + 16 * day)
    assert set(state.answered) == {"a"}
    state.close()


@pytest.mark.parametrize("written", [b"", b"t", b"time,image", b"1;a\n", b"1;a\n2;", b"1;a\n2;b\n"])
def test_append_goes_on_where_a_killed_process_ended(tmp_path, written):
    file = tmp_path / "results.csv"
    whole = header("csv") + b"1;a\n2;b\n"
    file.write_bytes(written if written in whole[: len(written)] else header("csv") + written)
    assert append(file, 0, b"1;a\n2;b\n", "csv") == len(whole)
    assert append(file, 0, b"1;a\n2;b\n", "csv") == len(whole)
    assert file.read_bytes() == whole
    append(file, len(whole), b"3;c\n", "csv")
    append(file, len(whole), b"3;c\n", "csv")
    assert file.read_bytes() == whole + b"3;c\n"


def test_append_to_a_file_that_somebody_changed(tmp_path):
    """Nothing of theirs is lost, and nothing of ours is there twice."""
    file = tmp_path / "results.csv"
    file.write_bytes(header("csv") + b"1;a\nnote without an end")
    for _ in range(2):
        append(file, len(header("csv")) + 4, b"2;b\n", "csv")
    assert file.read_bytes() == header("csv") + b"1;a\nnote without an end\n2;b\n"


def test_results_of_another_program(tmp_path):
    (tmp_path / "results.csv").write_bytes(b"image,score\n")
    with pytest.raises(UsageError, match="not written by patchcore watch"):
        check_file(tmp_path / "results.csv", "csv")
    (tmp_path / "results.jsonl").write_bytes(b"[1, 2]\n")
    with pytest.raises(UsageError, match="not written by patchcore watch"):
        check_file(tmp_path / "results.jsonl", "jsonl")


def test_move_to_another_disk(tmp_path):
    """Where a rename cannot go: the copy is whole before the file is removed, and keeps its time."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other disk")
    target = other / f"patchcore-test-{os.getpid()}" / "a.png"
    source = picture(tmp_path / "a.png", 7)
    os.utime(source, (1e9, 1e9))
    content, found = source.read_bytes(), identify(source)
    try:
        assert move_file(source, found, target)
        assert (target.read_bytes(), target.stat().st_mtime) == (content, 1e9)
        assert not source.exists()
        assert [path.name for path in target.parent.iterdir()] == ["a.png"]
        assert move_file(source, found, target), "what is done stays so"
        shutil.copy2(target, source)
        assert move_file(source, found, target), "killed before the file was removed"
        assert not source.exists()
        picture(source, 9)
        assert not move_file(source, identify(source), target), "another file is there"
        assert target.read_bytes() == content
    finally:
        shutil.rmtree(target.parent)


def test_free_name(tmp_path):
    assert free_name(tmp_path, "a/b.png", 0) == "a/b.png"
    picture(tmp_path / "a" / "b.png")
    assert free_name(tmp_path, "a/b.png", 0) == "a/b.19700101T000000.png"
    picture(tmp_path / "a" / "b.19700101T000000.png")
    assert free_name(tmp_path, "a/b.png", 0) == "a/b.19700101T000000-2.png"
    assert free_name(tmp_path, "c.png", 0, {"c.png"}.__contains__) == "c.19700101T000000.png"


def test_look_follows_links_and_finds_each_file_once(tmp_path, folder, caplog):
    picture(folder / "sub" / "a.png")
    picture(tmp_path / "elsewhere" / "b.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "round").symlink_to(folder)
    (folder / "again.png").symlink_to(folder / "sub" / "a.png")
    (folder / "dead.png").symlink_to(folder / "nothing.png")
    (folder / "folder.png").mkdir()
    looks = Looks(folder, settle=0, patience=0)
    for _ in range(2):
        listed, ready = looks.look({})
    assert set(listed) == set(ready) == {"sub/a.png", "link/b.png"}
    assert caplog.text.count("dead.png is left out") == 1


@pytest.mark.parametrize(
    ("output", "move", "message"),
    [("in/out", None, "lies in"), ("out", "in/done", "lies in"), ("out", ".", "files that are moved there")],
)
def test_folders_that_do_not_fit(tmp_path, folder, output, move, message):
    options = Options(tmp_path / output, move=None if move is None else tmp_path / move)
    with pytest.raises(PatchcoreError, match=message):
        watch(folder, Brightness(), options, threading.Event())
    assert not (tmp_path / "out").exists()


def test_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for name, message in {"absent": "There is no folder", "file": "is a file"}.items():
        with pytest.raises(UsageError, match=message):
            watch(tmp_path / name, Brightness(), Options(tmp_path / "out"), threading.Event())


@pytest.mark.parametrize(
    ("name", "value"), [("poll", 0), ("poll", float("nan")), ("patience", -1), ("patience", "1"), ("form", "xml")]
)
def test_wrong_options(tmp_path, name, value):
    with pytest.raises(UsageError, match=name):
        Options(tmp_path, **{name: value})


def test_share_that_goes_away(tmp_path, folder, start, caplog):
    """Its files are not answered again when it is back."""
    stop = start(heatmaps=False)
    picture(folder / "a.png")
    wait_for(lambda: rows(tmp_path))
    folder.rename(tmp_path / "away")
    wait_for(lambda: "cannot be read, and is tried again" in caplog.text)
    (tmp_path / "away").rename(folder)
    picture(folder / "b.png")
    wait_for(lambda: len(rows(tmp_path)) == 2)
    assert stop().answers == 2
