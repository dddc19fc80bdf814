"""The record of answers and the operators' words, over HTTP: on a real server with two workers, and in this process."""

import csv
import hashlib
import io
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import datetime, timedelta, timezone

import httpx
import psutil
import pytest
from bentoml.exceptions import BentoMLConfigException
from helpers.http import predict, wait_for
from helpers.server import SERVE, app_server, bentoml_serve
from patchcore_plugin.bento.schemas import ImageAnswer
from patchcore_plugin.bento.service import check
from patchcore_plugin.bento.settings import Settings

from patchcore_plugin.record import Filter, RecordWriter, prepare, read_history, read_said
from patchcore_plugin.record.ids import make_id

ABSENT = "0" * 24
NAMES = ["=1+1.png", "+a.png", "-b.png", "@c.png", "'d.png", 'e,f\n"g.png', "<script>.png", "电池.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recorded") / "record"


@pytest.fixture(scope="module")
def server(bundle, folder, tmp_path_factory):
    """A real server of two workers with a record."""
    environment = {"PATCHCORE_BUNDLE": str(bundle), "PATCHCORE_RECORD": str(folder), "PATCHCORE_WORKERS": "2"}
    with bentoml_serve(SERVE, tmp_path_factory.mktemp("serve"), **environment) as server:
        yield server
        assert "Traceback" not in server.log.read_text(errors="replace")
    assert not list(folder.glob("*-wal")), "the last worker has put the database's log away"


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def pair(runtime, test_images):
    """A normal image and one that is not, as the model calls them."""
    predictions = runtime.predict(test_images)
    verdicts = [prediction.verdict for prediction in predictions]
    return test_images[verdicts.index("normal")], test_images[verdicts.index("anomalous")]


@pytest.fixture
def served(bundle, tmp_path):
    """The application in this process, with a record."""
    prepare(tmp_path / "record")
    with app_server(bundle=bundle, record=tmp_path / "record", max_body=1) as server:
        yield server


def recorded(client, **query):
    response = client.get("/history", params=query)
    assert response.status_code == 200, response.text
    return response.json()["answers"]


def find(client, record):
    """The entry of an answer, once it is written."""
    wait_for(lambda: any(entry["record"] == record for entry in recorded(client)), 10)
    return next(entry for entry in recorded(client) if entry["record"] == record)


def wait_until_written(client, records):
    wait_for(lambda: set(records) <= {entry["record"] for entry in recorded(client, limit=1000)}, 15)


def say(client, record, word, note="", **options):
    fields = {"record": (None, record), "word": (None, word), "note": (None, note)}
    return client.post("/feedback", files={**options, **fields})


def is_problem(response, code):
    assert response.headers["content-type"] == "application/problem+json", response.text
    assert response.json()["code"] == code, response.text
    assert response.json()["request_id"] == response.headers["x-request-id"]
    return True


def test_what_is_recorded(client, pair):
    """What counts as production, with the image of what is not called normal."""
    normal, odd = pair
    answer = predict(client, odd, heatmap="true").json()
    entry = find(client, answer["record"])
    assert entry["answer"] == {**answer, "heatmap": None}
    assert entry["sha256"] == hashlib.sha256(odd.read_bytes()).hexdigest()
    age = datetime.now(timezone.utc) - datetime.fromisoformat(entry["time"].replace("Z", "+00:00"))
    assert timedelta(0) < age < timedelta(seconds=60)
    assert (entry["image"], entry["feedback"]) == (True, None)

    files = [("images", (path.name, path.read_bytes())) for path in pair] + [("images", ("text.png", b"no image"))]
    response = client.post("/predict_batch", files=files, headers={"x-request-id": "batch-7"})
    first, second, broken = response.json()["results"]
    entries = [find(client, item["answer"]["record"]) for item in (first, second)]
    assert [entry["name"] for entry in entries] == [normal.name, odd.name]
    assert [entry["image"] for entry in entries] == [False, True]
    assert {entry["request_id"] for entry in entries} == {"batch-7"}
    assert broken["answer"] is None

    response = client.post("/heatmap", files={"image": odd.read_bytes()})
    assert find(client, response.headers["x-record"])["answer"]["score"] == float(response.headers["x-score"])

    before = recorded(client)
    explained = client.post("/explain", files={"image": odd.read_bytes()}).json()
    assert explained["record"] is None, "an explained image has been answered before"
    predict(client, b"no image")
    time.sleep(1)
    assert recorded(client) == before
    assert client.get("/models").json()["record"] is True


def test_image_of_an_answer(client, pair):
    normal, odd = pair
    answer = predict(client, odd).json()
    response = client.get(f"/history/{answer['record']}/image")  # at once: it need not be written yet
    assert response.content == odd.read_bytes()
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-security-policy"] == "default-src 'none'; sandbox"
    record = predict(client, normal).json()["record"]
    assert is_problem(client.get(f"/history/{record}/image"), "record_image_missing")
    assert is_problem(client.get(f"/history/{ABSENT}/image"), "answer_unknown")


def test_words(client, folder, pair):
    """At once, from any worker; the last word counts; an image that the record lacks can come with the word."""
    normal, odd = pair
    record = predict(client, odd).json()["record"]
    said = say(client, record, "bad")
    assert said.status_code == 200, said.text
    said = say(client, record, "good", "=water drop").json()
    assert (said["record"], said["word"], said["note"], said["image"]) == (record, "good", "=water drop", True)
    entry = find(client, record)
    assert entry["feedback"] == {name: said[name] for name in ("word", "note", "time")}
    assert entry["time"] < said["time"]

    missed = predict(client, normal).json()["record"]
    assert say(client, missed, "bad").json()["image"] is False
    assert is_problem(say(client, missed, "bad", image=odd.read_bytes()), "record_image_differs")
    assert say(client, missed, "bad", image=normal.read_bytes()).json()["image"] is True
    assert client.get(f"/history/{missed}/image").content == normal.read_bytes()
    assert [found["record"] for found in recorded(client, feedback="any")] == [missed, record]
    assert [found["record"] for found in recorded(client, feedback="good")] == [record]
    (good,), (bad,) = read_said(folder, "good"), read_said(folder, "bad")
    assert (good.content(), bad.content()) == (odd.read_bytes(), normal.read_bytes())
    assert (good.model, good.verdict, good.name) == ("cells", "anomalous", "upload")
    assert is_problem(say(client, ABSENT, "good"), "answer_unknown")
    future = f"{int(time.time() * 1000) + 1000:012x}{0:012x}"
    assert is_problem(say(client, future, "good"), "answer_unknown")
    totals = client.get("/history/totals").json()["totals"]
    assert sum(total["good"] for total in totals) == sum(total["bad"] for total in totals) == 1


def test_csv(client, pair):
    """All answers, in pages; no cell is a formula."""
    content = pair[1].read_bytes()
    sent = [client.post("/predict", files={"image": (name, content)}).json()["record"] for name in NAMES]
    wait_until_written(client, sent)
    response = client.get("/history.csv")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(response.text)))
    entries = recorded(client, limit=1000)
    assert [row["record"] for row in rows] == [entry["record"] for entry in entries]
    for row, entry in zip(rows, entries, strict=True):
        assert not any(cell and cell[0] in "=+-@\t\r" for cell in row.values()), row
        assert row["name"].removeprefix("'") == entry["name"] or entry["name"][0] == "'"
        assert float(row["score"]) == entry["answer"]["score"]
        assert row["regions"] == str(len(entry["answer"]["regions"]))
    assert rows[-1]["word"] == ""
    filtered = client.get("/history.csv", params={"feedback": "good"})
    assert [row["note"] for row in csv.DictReader(io.StringIO(filtered.text))] == ["'=water drop"]


def test_pages(client, pair):
    sent = [predict(client, pair[0]).json()["record"] for _ in range(7)]
    wait_until_written(client, sent)
    everything, seen, query = recorded(client, limit=1000), [], {"limit": 3}
    while True:
        page = client.get("/history", params=query).json()
        seen += page["answers"]
        if page["next"] is None:
            break
        query["before"] = page["next"]
        sent.append(predict(client, pair[0]).json()["record"])
    assert seen == everything
    wait_until_written(client, sent)
    assert [len(recorded(client, verdict=verdict, limit=1000)) for verdict in ("normal", "anomalous", "none")] == [
        sum(entry["answer"]["verdict"] == verdict for entry in recorded(client, limit=1000))
        for verdict in ("normal", "anomalous", None)
    ]


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_FSIZE"), reason="no limit for the size of files here")
def test_full_disk(server, client, pair):
    """No file may grow: the inspection goes on, log and metrics tell of it, and afterwards nothing is lost."""

    def limit_files(size):
        for child in server.children():
            child.rlimit(psutil.RLIMIT_FSIZE, (size, psutil.RLIM_INFINITY))

    def failing():
        return "patchcore_record_failing 1.0" in client.get("/metrics").text

    answers, written = [], recorded(client)[0]["record"]
    limit_files(100_000)
    try:
        while not failing():
            response = predict(client, pair[0])
            assert response.status_code == 200
            answers.append(response.json()["record"])
            assert len(answers) < 300
        time.sleep(3)  # both workers try again meanwhile
        problem = say(client, written, "bad")
        assert problem.status_code == 200 or is_problem(problem, "record_unavailable")
    finally:
        limit_files(psutil.RLIM_INFINITY)
    wait_for(lambda: not failing(), 15)
    wait_until_written(client, answers)
    log = server.log.read_text()
    assert 1 <= log.count("cannot be written; the inspection goes on") <= 2, "once from each worker"
    assert "goes on; 0 answers or images were lost" in log
    assert "patchcore_record_lost_total" not in client.get("/metrics").text


def test_killed_at_any_point(bundle, test_images, tmp_path):
    """The database is whole, and lacks no answer that is older than a second."""
    record = tmp_path / "record"
    environment = {"PATCHCORE_BUNDLE": str(bundle), "PATCHCORE_RECORD": str(record), "PATCHCORE_RECORD_IMAGES": "all"}
    answered, ended = [], threading.Event()

    def ask(url):
        with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
            while not ended.is_set():
                try:
                    response = predict(client, test_images[len(answered) % 100])
                except httpx.TransportError:
                    return
                answered.append((time.time(), response.json()["record"]))

    with bentoml_serve(SERVE, tmp_path, **environment, PATCHCORE_WORKERS="2") as server:
        threads = [threading.Thread(target=ask, args=(server,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(3.3)
        family = [psutil.Process(server.process.pid), *server.children()]
        for member in family:
            member.kill()
        killed_at = time.time()
        ended.set()
        psutil.wait_procs(family, 10)
        for thread in threads:
            thread.join(20)
    with closing(sqlite3.connect(record / "answers.sqlite")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    entries = {entry["record"]: entry for entry in read_history(record, Filter(), 10_000)}
    old = [identity for moment, identity in answered if moment < killed_at - 1]
    assert len(old) > 20
    assert set(old) <= set(entries)
    assert all(entries[identity]["image"] for identity in old)
    prepare(record)


@pytest.mark.parametrize("content", [b"no database " * 1000, None])
def test_start_with_what_is_no_record(bundle, tmp_path, content):
    place = tmp_path / "record"
    place.mkdir()
    if content is None:
        with closing(sqlite3.connect(place / "answers.sqlite")) as connection:
            connection.execute("PRAGMA user_version = 7")
            connection.execute("CREATE TABLE answers (id)")
    else:
        (place / "answers.sqlite").write_bytes(content)
    with pytest.raises(BentoMLConfigException, match=r"PATCHCORE_RECORD: The record .* choose another folder"):
        check(Settings(bundle=bundle, record=place))


def test_without_a_record(bundle, pair):
    with app_server(bundle=bundle) as server:
        assert predict(server.client, pair[0]).json()["record"] is None
        assert "x-record" not in server.client.post("/heatmap", files={"image": pair[0].read_bytes()}).headers
        for path in ("/history", "/history.csv", "/history/totals", f"/history/{ABSENT}/image"):
            assert is_problem(server.client.get(path), "record_off")
        assert is_problem(say(server.client, ABSENT, "good"), "record_off")
        assert server.client.get("/models").json()["record"] is False


@pytest.mark.parametrize(("images", "stored"), [("none", [False, False]), ("all", [True, True])])
def test_which_images_are_stored(bundle, pair, tmp_path, images, stored):
    prepare(tmp_path / "record")
    with app_server(bundle=bundle, record=tmp_path / "record", record_images=images) as server:
        records = [predict(server.client, path).json()["record"] for path in pair]
        assert [find(server.client, record)["image"] for record in records] == stored


def test_last_answers_are_written_at_the_end(bundle, pair, tmp_path):
    with app_server(bundle=bundle, record=tmp_path / "record") as server:
        record = predict(server.client, pair[0]).json()["record"]
    assert [entry["record"] for entry in read_history(tmp_path / "record", Filter(), 10)] == [record]
    assert not [thread for thread in threading.enumerate() if thread.name == "record"]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=nan", "limit"),
        ("limit=1e999", "limit"),
        ("before=", "before"),
        ("before=0123", "before"),
        (f"before={'0' * 23}g", "before"),
        (f"before={'٣' * 24}", "before"),
        (f"before={ABSENT}%0a", "before"),
        ("verdict=good", "verdict"),
        ("verdict=normal%00", "verdict"),
        ("since=yesterday", "since"),
        ("since=nan", "since"),
        ("until=1e400", "until"),
        ("until=2026-13-01T00:00:00", "until"),
        ("feedback=perhaps", "feedback"),
        (f"model={'a' * 201}", "model"),
    ],
)
def test_wrong_filters(served, query, named):
    for path in ("/history", "/history.csv", "/history/totals"):
        if path != "/history" and named in ("limit", "before"):
            continue
        response = served.client.get(f"{path}?{query}")
        assert is_problem(response, "field_invalid")
        assert response.json()["detail"].startswith(f"{named}: ")


@pytest.mark.parametrize(
    "query", ["since=0001-01-01&until=9999-12-31T23:59:59-23:59", "model=%00", "model=%FF%27", "since=1"]
)
def test_odd_filters(served, query):
    for path in ("/history", "/history.csv", "/history/totals"):
        assert served.client.get(f"{path}?{query}").status_code == 200


def test_wrong_feedback(served, pair):
    client = served.client
    record = predict(client, pair[1]).json()["record"]

    def post(code, **options):
        assert is_problem(client.post("/feedback", **options), code)

    def form(**fields):
        return {"files": {name: (None, value) for name, value in fields.items()}}

    post("unsupported_media_type", json={"record": record, "word": "good"})
    post("unsupported_media_type", content=b"x", headers={"content-type": "image/png"})
    post("form_invalid", content=b"x", headers={"content-type": "multipart/form-data; boundary=a"})
    post("field_invalid", **form(word="good"))
    post("field_invalid", **form(record=record))
    post("field_invalid", **form(record=record.upper() if record.upper() != record else "X" * 24, word="good"))
    post("field_invalid", **form(record="../../etc/passwd", word="good"))
    post("field_invalid", **form(record="a" * 5000, word="good"))
    post("field_invalid", **form(record=record, word="GOOD"))
    post("field_invalid", **form(record=record, word="good", notes="a scratch"))
    post("field_invalid", **form(record=record, word="good", note="a" * 501))
    post("field_invalid", **form(record=record, word="good", image="text"))
    post("field_invalid", files={"record": ("a.txt", record), "word": (None, "good")})
    post("body_too_large", files={"image": bytes(2 << 20)}, data={"record": record, "word": "good"})
    post("record_image_differs", files={"image": b""}, data={"record": record, "word": "good"})
    for method in ("GET", "PUT", "DELETE"):
        assert is_problem(client.request(method, "/feedback"), "method_not_allowed")
    assert find(client, record)["feedback"] is None, "nothing was said"
    note = "<b>\0\u202e'\"; DROP TABLE answers; --" + "电" * 400
    said = client.post("/feedback", **form(record=record, word="good", note=note))
    assert (said.status_code, said.json()["note"]) == (200, note)
    assert find(client, record)["feedback"]["note"] == note


def test_paths_of_images(served):
    for path in ("../answers.sqlite", "%2e%2e", "x", "0" * 25, "٣" * 24, f"{ABSENT}%0a", "A" * 24):
        response = served.client.get(f"/history/{path}/image")
        assert response.json()["code"] in ("field_invalid", "not_found"), path


def test_key_and_hosts(bundle, tmp_path):
    with app_server(bundle=bundle, record=tmp_path / "record", api_key="secret") as server:
        for path in ("/history", "/history.csv", "/history/totals", f"/history/{ABSENT}/image"):
            assert is_problem(server.client.get(path), "unauthorized")
            assert is_problem(server.client.get(path, headers={"host": "evil.example"}), "host_unknown")
        assert is_problem(say(server.client, ABSENT, "good"), "unauthorized")
        foreign = server.client.post("/feedback", headers={"origin": "http://evil.example"})
        assert is_problem(foreign, "origin_foreign")


def test_record_that_is_gone(served, tmp_path, pair):
    """Its routes say so; the inspection goes on."""
    for path in sorted((tmp_path / "record").rglob("*"), reverse=True):
        path.unlink()
    (tmp_path / "record").rmdir()
    (tmp_path / "record").write_text("a file in its place")
    for path in ("/history", "/history.csv", "/history/totals", f"/history/{ABSENT}/image"):
        response = served.client.get(path)
        assert is_problem(response, "record_unavailable")
        assert str(tmp_path) not in response.text
        assert response.headers["retry-after"] == "5"
    assert is_problem(say(served.client, ABSENT, "good"), "record_unavailable")
    assert predict(served.client, pair[0]).status_code == 200
    wait_for(lambda: served.registry.get_sample_value("patchcore_record_failing") == 1, 10)


def test_answer_of_an_older_version(bundle, tmp_path):
    """Fields that it did not have are null."""
    from patchcore_plugin.record import Answer

    prepare(tmp_path / "record")
    writer = RecordWriter(tmp_path / "record", days=1, limit=64 << 20)
    writer.put(Answer(make_id(), "r", "old.png", "0" * 64, {"model": "cells", "version": "1", "score": 1.0, "gone": 2}))
    writer.close()
    with app_server(bundle=bundle, record=tmp_path / "record") as server:
        (entry,) = recorded(server.client)
        assert set(entry["answer"]) == set(ImageAnswer.model_fields)
        assert (entry["answer"]["score"], entry["answer"]["regions"]) == (1.0, None)
        (row,) = csv.DictReader(io.StringIO(server.client.get("/history.csv").text))
        assert (row["score"], row["regions"], row["milliseconds"]) == ("1.0", "", "0")


def test_schemathesis(server, tmp_path):
    """Requests made from the OpenAPI document, right ones and wrong ones."""
    command = [
        sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", f"{server}/docs.json",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--include-path-regex", "history|feedback", "--max-examples", "5", "--seed", "1", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
