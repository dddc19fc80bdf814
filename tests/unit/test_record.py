"""The record without a service: what is written, kept, read and refused."""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import time
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from patchcore_plugin.record import (
    Answer,
    Filter,
    OtherImageError,
    RecordError,
    RecordWriter,
    UnknownAnswerError,
    prepare,
    read_history,
    read_image,
    read_said,
    read_totals,
    say,
)
from patchcore_plugin.record.ids import make_id
from patchcore_plugin.record.writer import WAITING_ANSWERS, WAITING_BYTES

MIB = 1 << 20
REGION = {"left": 1, "top": 2, "width": 3, "height": 4, "area": 10, "peak": 5.5}
NOW = datetime.now(timezone.utc)


def id_at(age: timedelta) -> str:
    """An id of an answer of some time ago."""
    return f"{int((NOW - age).timestamp() * 1000):012x}{make_id()[12:]}"


def make_answer(number=0, *, age=timedelta(), image=None, verdict="anomalous", model="cells", name=None, **fields):
    content = image or f"image {number}".encode()
    scored = {"score": 40.5, "ratio": 1.35, "verdict": verdict, "p_value": None, "model": model, "version": "3f2a9c01d4e5"}
    more = {"threshold": 30.0, "regions": [REGION], "milliseconds": {"decode": 1.0, "search": 2.5}, **fields}
    checksum = hashlib.sha256(content).hexdigest()
    return Answer(id_at(age), "request", name or f"cell{number}.png", checksum, {**scored, **more}, image)


def write(folder, *answers, days=30.0, limit=64 * MIB, **options) -> RecordWriter:
    """Write answers, and end the writer."""
    prepare(folder)
    writer = RecordWriter(folder, days=days, limit=limit, **options)
    for answer in answers:
        assert writer.put(answer)
    writer.close(60)
    return writer


def everything(folder, **options):
    return read_history(folder, Filter(**options), 10_000)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def database(folder):
    return closing(sqlite3.connect(folder / "answers.sqlite"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a record #1? 100%"  # signs that an address of a database would take for its own


def test_answers_are_read_as_they_were_written(folder):
    answers = [make_answer(number, image=b"\x89PNG%d" % number if number % 2 else None) for number in range(5)]
    write(folder, *answers)
    entries = everything(folder)
    assert [entry["record"] for entry in entries] == sorted((answer.record for answer in answers), reverse=True)
    found = {entry["record"]: entry for entry in entries}
    for answer in answers:
        entry = found[answer.record]
        assert entry["answer"] == answer.fields
        assert (entry["name"], entry["sha256"], entry["request_id"]) == (answer.name, answer.sha256, "request")
        assert entry["image"] == (answer.image is not None)
        assert abs(datetime.fromisoformat(entry["time"].replace("Z", "+00:00")) - NOW) < timedelta(seconds=1)
        assert read_image(folder, answer.record) == (answer.image and (answer.image, "image/png"))
    with pytest.raises(UnknownAnswerError):
        read_image(folder, make_id())


def test_pages_are_stable_while_answers_come(folder):
    old = [make_answer(number, age=timedelta(seconds=100 - number)) for number in range(25)]
    write(folder, *old)
    names, before = [], None
    while page := read_history(folder, Filter(), 10, before):
        names += [entry["name"] for entry in page]
        before = page[-1]["record"]
        write(folder, make_answer(1000 + len(names)))
    assert names == [answer.name for answer in reversed(old)]


def test_filters(folder):
    hour = timedelta(hours=1)
    verdicts = ["normal", "anomalous", "review", None]
    answers = [
        make_answer(number, age=number * hour, verdict=verdicts[number % 4], model=f"m{number % 3}") for number in range(24)
    ]
    write(folder, *answers)
    for number, word in ((3, "good"), (8, "bad")):
        say(folder, answers[number].record, word, "", None, 64 * MIB)

    def numbers(**options):
        return [int(entry["name"][4:-4]) for entry in everything(folder, **options)]

    assert numbers(model="m1") == list(range(1, 24, 3))
    assert numbers(model="m9") == []
    assert numbers(model="' OR 1=1 --") == []
    assert numbers(verdict="review") == list(range(2, 24, 4))
    assert numbers(verdict="none") == list(range(3, 24, 4))
    assert numbers(since=NOW - 4.5 * hour) == [0, 1, 2, 3, 4]
    assert numbers(until=(NOW - 21.5 * hour).replace(tzinfo=None)) == [22, 23], "without a time zone it is UTC"
    assert numbers(since=NOW - 4.5 * hour, until=NOW - 2.5 * hour, verdict="none") == [3]
    assert (numbers(feedback="good"), numbers(feedback="any"), len(numbers(feedback="none"))) == ([3], [3, 8], 22)
    assert numbers(since=datetime.max, until=datetime.min) == []
    totals = read_totals(folder, Filter())
    assert [total["answers"] for total in totals] == [1] * 24
    assert totals == sorted(totals, key=lambda total: total["hour"])
    (total,) = read_totals(folder, Filter(feedback="bad"))
    assert (total["model"], total["verdict"], total["good"], total["bad"]) == ("m2", "normal", 0, 1)
    assert total["hour"] == f"{NOW - 8 * hour:%Y-%m-%dT%H}:00:00Z"
    begin = NOW.replace(minute=0, second=0, microsecond=0)
    assert len(read_totals(folder, Filter(since=NOW - 2 * hour, until=begin))) == 2, "the hours before this one"


def test_words(folder):
    shown, unseen = make_answer(1, image=b"BM1", age=timedelta(seconds=1)), make_answer(2, name="../'\udce9\0=1.png")
    write(folder, shown, unseen)
    first = say(folder, shown.record, "bad", "scratch", None, 64 * MIB)
    assert (first["record"], first["word"], first["note"], first["image"]) == (shown.record, "bad", "scratch", True)
    say(folder, shown.record, "good", "no, \x00 a drop \udce9", None, 64 * MIB)
    assert not say(folder, unseen.record, "good", "", None, 64 * MIB)["image"]
    assert read_said(folder, "bad") == []
    one, two = read_said(folder, "good")
    assert (one.record, one.content(), one.path.suffix, one.regions) == (shown.record, b"BM1", ".bmp", [REGION])
    assert (one.model, one.version, one.sha256, one.verdict) == ("cells", "3f2a9c01d4e5", shown.sha256, "anomalous")
    assert one.note == "no, \x00 a drop \\udce9"
    assert (two.path, two.content(), two.name) == (None, None, "../'\\udce9\0=1.png")
    assert read_said(folder, "good", "other") == []
    with pytest.raises(OtherImageError):
        say(folder, unseen.record, "bad", "", b"another", 64 * MIB)
    assert read_said(folder, "bad") == [], "nothing is said with a wrong image"
    assert say(folder, unseen.record, "bad", "", b"image 2", 64 * MIB)["image"]
    assert read_said(folder, "bad")[0].content() == b"image 2"
    with pytest.raises(UnknownAnswerError):
        say(folder, make_id(), "good", "", None, 64 * MIB)


def test_damaged_image_is_none(folder):
    """As after a failure of the current, which a kill of the process cannot do."""
    answer = make_answer(image=b"BM whole")
    write(folder, answer)
    say(folder, answer.record, "good", "", None, 64 * MIB)
    (said,) = read_said(folder, "good")
    said.path.write_bytes(b"BM wh")
    assert said.content() is None
    assert read_image(folder, answer.record) is None
    said.path.unlink()
    assert said.content() is None
    assert not say(folder, answer.record, "good", "", None, 64 * MIB)["image"]
    assert say(folder, answer.record, "good", "", b"BM whole", 64 * MIB)["image"]
    assert said.content() == b"BM whole"


def test_old_answers_go(folder):
    day = timedelta(days=1)
    answers = [make_answer(number, age=number * day / 2, image=b"BM%d" % number) for number in range(2000)]
    write(folder, *answers)
    say_late = answers[30]
    assert [entry["record"] for entry in everything(folder)] == [answer.record for answer in answers[:60]]
    assert len(list(folder.glob("images/*/*"))) == 60
    say(folder, say_late.record, "good", "", None, 64 * MIB)
    write(folder, days=10)
    assert [entry["record"] for entry in everything(folder)] == [answer.record for answer in answers[:20]]
    assert len(list(folder.glob("images/*/*"))) == 20


def test_size_is_kept(folder):
    """The oldest images go first, those with an operator's word last, and their answers stay."""
    prepare(folder)
    limit, image = 64 * MIB, bytes(MIB)
    writer = RecordWriter(folder, days=30, limit=limit)
    answers = [
        make_answer(number, age=timedelta(seconds=300 - number), image=b"BM%d" % number + image) for number in range(100)
    ]
    for start in range(0, 100, 20):
        for answer in answers[start : start + 20]:
            assert writer.put(answer)
        wait_until(lambda end=start + 20: len(everything(folder)) == end)
        if start == 0:
            say(folder, answers[3].record, "good", "", None, limit)
        assert size_of(folder) <= limit
    writer.close()
    stored = [entry["record"] for entry in everything(folder) if entry["image"]]
    assert len(everything(folder)) == 100
    assert len(stored) > 50
    assert stored == [*(answer.record for answer in reversed(answers[-len(stored) + 1 :])), answers[3].record]
    assert {path.stem for path in folder.glob("images/*/*")} == set(stored)
    with database(folder) as connection:
        counted, summed = connection.execute("SELECT (SELECT * FROM usage), sum(image_bytes) FROM answers").fetchone()
    assert counted == summed == sum(path.stat().st_size for path in folder.glob("images/*/*"))


def test_answers_leave_room_for_images(folder):
    """Half of the size; the file becomes smaller when the limit does."""
    regions = [REGION] * 400  # 35 KiB
    answers = [make_answer(number, age=timedelta(seconds=9000 - number), regions=regions) for number in range(1500)]
    write(folder, *answers)
    assert 24 * MIB < size_of(folder) <= 36 * MIB
    kept = everything(folder)
    assert [entry["record"] for entry in kept] == [answer.record for answer in reversed(answers[-len(kept) :])]
    say(folder, kept[-1]["record"], "good", "", None, 64 * MIB)
    write(folder, limit=16 * MIB)
    assert size_of(folder) <= 9 * MIB
    assert everything(folder)[-1]["record"] == kept[-1]["record"]


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def write_many(folder, numbers):
    writer = RecordWriter(folder, days=30, limit=64 * MIB)
    for number in numbers:
        assert writer.put(make_answer(number, image=b"BM%d" % number))
        time.sleep(0.002)
    writer.close(60)


def test_several_processes(folder):
    prepare(folder)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(folder, range(start, start + 400))) for start in (0, 1000, 2000)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    entries = everything(folder)
    assert sorted(int(entry["name"][4:-4]) for entry in entries) == [*range(400), *range(1000, 1400), *range(2000, 2400)]
    assert all(entry["image"] for entry in entries)


def test_slow_disk_loses_answers_and_says_so_once(folder, caplog):
    """Another program holds the database: nobody waits, the queue fills up to its end, and all of the queue is written."""
    prepare(folder)
    lost, states = [], []
    writer = RecordWriter(folder, days=30, limit=64 * MIB, on_loss=lost.append, on_state=states.append)
    with database(folder) as other:
        other.execute("BEGIN EXCLUSIVE")
        answers = [make_answer(number) for number in range(WAITING_ANSWERS + 50)]
        accepted = [writer.put(answer) for answer in answers]
        other.execute("ROLLBACK")
    assert accepted == [True] * WAITING_ANSWERS + [False] * 50
    assert lost == ["answer"] * 50
    writer.close(60)
    assert len(read_history(folder, Filter(), 20_000)) == WAITING_ANSWERS
    assert len([record for record in caplog.records if "loses answers" in record.message]) == 1
    assert not writer.put(make_answer()), "it is closed"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two MiB, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk(small_disk, caplog):
    """The record stops, says so once, loses only what has no place in the queue, and goes on by itself."""
    folder = small_disk / "record"
    prepare(folder)
    states, lost = [], []
    writer = RecordWriter(folder, days=30, limit=64 * MIB, on_state=states.append, on_loss=lost.append)
    first = [make_answer(number, image=b"BM%d" % number) for number in range(50)]
    for answer in first:
        assert writer.put(answer)
    wait_until(lambda: len(everything(folder)) == 50)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    later = [make_answer(number, image=b"BM%d" % number + bytes(50_000)) for number in range(50, 60)]
    for answer in later:
        assert writer.put(answer)
    wait_until(lambda: states == [False])

    def say_much():
        for answer in first:
            say(folder, answer.record, "good", "a" * 500, None, 64 * MIB)

    with pytest.raises((sqlite3.Error, RecordError)):
        say_much()
    with database(folder) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    (small_disk / "filler").unlink()
    wait_until(lambda: states == [False, True])
    writer.close()
    entries = {entry["record"]: entry for entry in everything(folder)}
    assert set(entries) == {answer.record for answer in (*first, *later)}
    assert all(entries[answer.record]["image"] for answer in later)
    assert lost == []
    assert caplog.text.count("cannot be written; the inspection goes on") == 1
    assert caplog.text.count("goes on; 0 answers or images were lost") == 1


def test_images_that_wait_are_limited(folder):
    prepare(folder)
    lost = []
    writer = RecordWriter(folder, days=30, limit=1024 * MIB, on_loss=lost.append)
    with database(folder) as other:
        other.execute("BEGIN EXCLUSIVE")
        image = bytes(WAITING_BYTES // 4)
        assert all(writer.put(make_answer(number, age=timedelta(seconds=9 - number), image=image)) for number in range(6))
        other.execute("ROLLBACK")
    assert lost == ["image"] * 2
    writer.close(60)
    assert [entry["image"] for entry in everything(folder)] == [False, False, True, True, True, True]


def test_image_that_cannot_be_written(folder, caplog):
    """Its answer is written all the same."""
    prepare(folder)
    (folder / "images").write_text("")
    lost = []
    write(folder, *[make_answer(number, image=b"BM") for number in range(3)], on_loss=lost.append)
    assert lost == ["image"] * 3
    assert [entry["image"] for entry in everything(folder)] == [False] * 3
    assert caplog.text.count("loses images") == 1


def test_database_that_is_deleted_is_made_again(folder, caplog):
    prepare(folder)
    writer = RecordWriter(folder, days=30, limit=64 * MIB)
    writer.put(make_answer(1))
    wait_until(lambda: everything(folder))
    for path in folder.iterdir():
        path.unlink()
    writer.put(make_answer(2))
    writer.close()
    assert [entry["name"] for entry in everything(folder)] == ["cell2.png"]


def test_an_answer_that_cannot_be_written_does_not_stop_others(folder, caplog):
    class Odd:
        pass

    prepare(folder)
    lost = []
    writer = RecordWriter(folder, days=30, limit=64 * MIB, on_loss=lost.append)
    writer.put(make_answer(1, odd=Odd()))
    wait_until(lambda: lost)
    writer.put(make_answer(2))
    writer.close()
    assert [entry["name"] for entry in everything(folder)] == ["cell2.png"]
    assert lost == ["answer"]
    assert "not JSON serializable" in caplog.text


def damage(folder):
    """Overwrite pages in the middle."""
    path = folder / "answers.sqlite"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8192] = b"\xff" * 8192
    path.write_bytes(content)


def other_program(folder):
    (folder / "answers.sqlite").unlink()
    with database(folder) as connection:
        connection.execute("CREATE TABLE answers (id)")


def newer(folder):
    with database(folder) as connection:
        connection.execute("PRAGMA user_version = 9")


def no_database(folder):
    (folder / "answers.sqlite").write_text("no database " * 1000)


def a_folder(folder):
    (folder / "answers.sqlite").unlink()
    (folder / "answers.sqlite").mkdir()


def truncated(folder):
    path = folder / "answers.sqlite"
    path.write_bytes(path.read_bytes()[:30_000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, "is damaged|malformed"),
        (truncated, "is damaged|malformed"),
        (other_program, r"its answers\.sqlite is of another program"),
        (newer, r"of a newer version of patchcore-plugin \(format 9; this version knows 1\)\. Update"),
        (no_database, "file is not a database"),
        (a_folder, "unable to open database file"),
    ],
)
def test_what_is_no_record_is_refused(folder, change, message):
    """And left as it is; the message says the way out."""
    write(folder, *(make_answer(number) for number in range(300)))
    change(folder)
    file = folder / "answers.sqlite"
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(RecordError, match=message) as caught:
        prepare(folder)
    assert "choose another folder" in str(caught.value)
    assert str(folder) in str(caught.value)
    assert before is None or file.read_bytes() == before


def test_places_without_a_record(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "record"):
        with pytest.raises(RecordError, match="it cannot be opened"):
            prepare(place)
    with pytest.raises(RecordError, match=r"There is no record in .*absent"):
        read_said(tmp_path / "absent", "good")
    assert not (tmp_path / "absent").exists(), "reading makes nothing"


def test_hostile_database(folder):
    """One that somebody else has filled leads to no other file."""
    answer = make_answer(image=b"BM")
    write(folder, answer)
    with database(folder) as connection:
        for ending in ("../../../etc/passwd", "png/../../x", "svg"):
            connection.execute("UPDATE answers SET image_type = ?, word = 'good'", (ending,))
            connection.commit()
            with pytest.raises(RecordError):
                read_image(folder, answer.record)
            with pytest.raises(RecordError):
                read_said(folder, "good")
            with pytest.raises(RecordError):
                say(folder, answer.record, "bad", "", None, 64 * MIB)
        for details in ("{", "[]", "1"):
            connection.execute("UPDATE answers SET image_type = 'png', details = ?", (details,))
            connection.commit()
            with pytest.raises(RecordError, match="cannot be read"):
                everything(folder)


def test_images_without_an_answer_are_removed_at_the_start(folder):
    kept, lost, fresh = (make_answer(number, image=b"BM", age=timedelta(hours=3)) for number in range(3))
    write(folder, kept, lost, fresh)
    for answer in (kept, lost):
        (path,) = folder.glob(f"images/*/{answer.record}.bmp")
        os.utime(path, (time.time() - 7200,) * 2)
    with database(folder) as connection:
        connection.execute("DELETE FROM answers WHERE id != ?", (kept.record,))
        connection.commit()
    (folder / "images" / "00").mkdir(exist_ok=True)
    (folder / "images" / "00" / "notes.txt").write_text("of the user")
    prepare(folder)
    left = {path.stem for path in folder.glob("images/*/*")}
    assert left == {kept.record, fresh.record, "notes"}, "another service may just be writing the fresh one"


def test_long_search_ends(folder):
    write(folder, *(make_answer(number) for number in range(3000)))
    with pytest.raises(TimeoutError, match="took longer than 0 seconds"):
        read_history(folder, Filter(model="absent"), 10, seconds=0)


def test_details_are_plain_json(folder):
    """For those who read the database by SQL."""
    write(folder, make_answer())
    with database(folder) as connection:
        (row,) = connection.execute("SELECT model, verdict, score, ratio, details FROM answers").fetchall()
    assert row[:4] == ("cells", "anomalous", 40.5, 1.35)
    assert json.loads(row[4])["regions"] == [REGION]


def test_log_is_quiet(folder, caplog):
    caplog.set_level(logging.INFO)
    write(folder, *(make_answer(number, image=b"BM") for number in range(10)))
    assert not caplog.records


def test_writer_outlives_a_hostile_database(folder):
    """A row that no service has written goes by its age as others do, without a file; writing goes on."""
    old = make_answer(1, age=timedelta(days=20), image=b"BM")
    write(folder, old)
    with database(folder) as connection:
        connection.execute("UPDATE answers SET image_type = '../../../answers.sqlite'")
        connection.commit()
    write(folder, make_answer(2), days=10)
    assert [entry["name"] for entry in everything(folder)] == ["cell2.png"]
