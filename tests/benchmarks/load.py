"""The service under load, on loopback, against the runtime in one process and against anomalib's own inferencer.

    python tests/benchmarks/load.py                 # highest rate; latency at 50 % and 80 % of it; twice the highest rate
    python tests/benchmarks/load.py --soak 20000    # only this number of requests, one in ten hostile, and the memory
    python tests/benchmarks/load.py --modes 8 --count 150    # only the modes, by turns with the runtime alone
    python tests/benchmarks/load.py --record 12     # only what the record costs: with and without, this number of turns each

The bundle has ELPV's 1 % bank. The clients run on the same cores as the service. The runtime's rate has no clients and no
HTTP; it is the limit for the service.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path

import bentoml
import click
import numpy as np
import psutil
from common import LAYERS, elpv_embeddings, heading
from helpers.http import predict
from helpers.pictures import black_png, jpeg_of_scans, jpeg_of_segments, tiff_of_strips
from helpers.server import BENTOML, SERVE, bentoml_serve
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

CLIENTS = 8
MODES = "auto", "latency", "throughput"


class Client:
    """A client that keeps one connection open, and does little work itself."""

    def __init__(self, url: str) -> None:
        self._address = url.removeprefix("http://")
        self._connection = http.client.HTTPConnection(self._address, timeout=60)

    def ask(self, content: bytes, path: str = "/predict", **headers: str) -> int:
        """Send an image, or anything else; returns the status of the answer, or 0 if there is no answer."""
        try:
            self._connection.request("POST", path, content, {"Content-Type": "image/png", **headers})
            response = self._connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return 0
        return response.status


def drive(
    url: str, contents: list[bytes], count: int, clients: int, rate: float | None = None
) -> tuple[list[float], Counter, float]:
    """Send requests from several clients.

    Args:
        url: Address of the service.
        contents: Image files to send in turn.
        count: Number of requests.
        clients: Number of clients.
        rate: Requests per second; None sends the next request as soon as a client has its answer.

    Returns:
        Milliseconds from the planned start of each answered request to its answer; the number of answers by status; and
        the seconds for all requests.
    """
    numbers, lock = iter(range(count)), threading.Lock()
    times, statuses = [], Counter()
    begin = time.perf_counter() + (0.2 if rate else 0)  # every client is ready for the first request

    def work() -> None:
        client = Client(url)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            due = begin + number / rate if rate else time.perf_counter()
            if (left := due - time.perf_counter()) > 0:
                time.sleep(left)
            status = client.ask(contents[number % len(contents)])
            with lock:
                statuses[status] += 1
                if status == 200:
                    times.append(1000 * (time.perf_counter() - due))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times, statuses, time.perf_counter() - begin


def saturate(url: str, contents: list[bytes], count: int) -> float:
    """Highest number of requests per second, with more clients than the service has threads."""
    _, statuses, spent = drive(url, contents, count, CLIENTS)
    if set(statuses) != {200}:
        msg = f"not answered: {statuses}"
        raise RuntimeError(msg)
    return count / spent


def steady(url: str, contents: list[bytes], rate: float, seconds: float, clients: int = 32) -> tuple[list[float], Counter]:
    """Milliseconds of the requests at a fixed rate per second, and the number of answers by status."""
    return drive(url, contents, int(rate * seconds), clients, rate)[:2]


def memory(server) -> float:
    """Resident memory of the server's processes, in MiB."""
    family = [server.process.pid, *(child.pid for child in psutil.Process(server.process.pid).children(recursive=True))]
    return sum(psutil.Process(pid).memory_info().rss for pid in family) / 2**20


def make_bundle(folder: Path) -> tuple[Path, list[Path]]:
    """Make a bundle with ELPV's 1 % bank; returns it with some test images."""
    from patchcore_plugin import FaissPatchcore
    from patchcore_plugin.coreset import GreedyCoreset
    from patchcore_plugin.elpv import lay_out
    from patchcore_plugin.export import export_bundle

    embeddings = elpv_embeddings()
    model = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS, normalization="imagenet").eval()
    model.model.memory_bank = embeddings[GreedyCoreset(ratio=0.01).fit(embeddings)]
    lay_out(folder / "elpv")
    good, bad = (sorted((folder / "elpv/test" / kind).iterdir()) for kind in ("good", "defective"))
    return export_bundle(model, folder / "bundle", images=good[:32]), good[32:82] + bad[:50]


def make_peer(bundle: Path, folder: Path) -> None:
    """Write anomalib's model with the same weights and bank for its TorchInferencer, and a BentoML service around it.

    anomalib's OpenVINO export is no peer here: it takes exactly two images, and anomalib's OpenVINOInferencer gives it one.
    """
    import torch
    from anomalib.models import Patchcore

    from patchcore_plugin import FaissPatchcore
    from patchcore_plugin.memory_bank import MemoryBank

    weights = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS).model.feature_extractor.net.state_dict()
    model = Patchcore(backbone="tf_efficientnet_lite0", layers=LAYERS, pre_trained=False, evaluator=False)
    model.model.feature_extractor.feature_extractor.load_state_dict(weights)
    model.model.memory_bank = torch.from_numpy(MemoryBank.load(bundle / "bank.faiss").vectors.copy())
    model.eval().to_torch(folder)
    (path,) = folder.rglob("*.pt")
    (folder / "peer.py").write_text(PEER.format(path=str(path)))


PEER = """
import os
os.environ["TRUST_REMOTE_CODE"] = "1"
import io
import bentoml
import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.applications import Starlette
from starlette.routing import Route
from anomalib.deploy import TorchInferencer
import anyio.to_thread


async def predict(request: Request) -> JSONResponse:
    content = await request.body()
    score = await anyio.to_thread.run_sync(bentoml.get_current_service().score, content)
    return JSONResponse({{"score": score}})


@bentoml.service(name="peer")
@bentoml.asgi_app(Starlette(routes=[Route("/predict", predict, methods=["POST"])]), path="/", name="peer")
class Peer:
    def __init__(self) -> None:
        self.inferencer = TorchInferencer({path!r}, device="cpu")

    def score(self, content: bytes) -> float:
        image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        return float(self.inferencer.predict(image).pred_score)
"""


def runtime_rate(bundle: Path, contents: list[bytes], mode: str, count: int) -> float:
    """Images per second of the runtime in its own process."""
    import subprocess

    code = (
        "import io, pickle, sys, time\n"
        "from patchcore_plugin import PatchcoreRuntime\n"
        f"runtime = PatchcoreRuntime.load({str(bundle)!r}, mode={mode!r})\n"
        "contents = pickle.load(sys.stdin.buffer)\n"
        f"files = lambda: (io.BytesIO(contents[number % len(contents)]) for number in range({count}))\n"
        "runtime.predict([io.BytesIO(content) for content in contents[:10]])\n"
        "started = time.perf_counter()\n"
        "for answer in runtime.stream(files()): answer.regions\n"
        f"print({count} / (time.perf_counter() - started))\n"
    )
    import pickle

    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(contents), capture_output=True, check=True)
    return float(done.stdout)


def row(table: Table, title: str, server, contents: list[bytes], count: int, best: float | None) -> float:
    """Measure a service at its highest rate, and at 50 % and 80 % of that rate."""
    saturate(server, contents, max(20, count // 10))
    rate = saturate(server, contents, count)
    cells = [title, f"{rate:.0f}", f"{rate / best:.0%}" if best else ""]
    for share in (0.5, 0.8):
        times, statuses = steady(server, contents, share * rate, count / rate)
        low, high = np.percentile(times, [50, 99])
        cells.append(f"{low:.0f} / {high:.0f}" + ("" if set(statuses) == {200} else f" {dict(statuses)}"))
    table.add_row(*cells)
    return rate


def hostile_requests(image: bytes) -> list[tuple[dict, int]]:
    """Arguments of :meth:`Client.ask` for hostile requests, and the status that each must be answered with."""
    form, fields = "multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
    files = [
        image[: len(image) // 2],
        b"",
        b"no image" * 1000,
        jpeg_of_scans(6000, 6000, 300),
        jpeg_of_segments(60_000, b"Exif\0\0II*\0\x08\0\0\0\0\0"),
        tiff_of_strips(200_000),
    ]
    return [
        *[({"content": file}, 400) for file in files],
        ({"content": black_png(20_000, 20_000)}, 413),
        ({"content": image, "path": "/" + "nowhere/" * 100}, 404),
        ({"content": image, "Host": "elsewhere.example"}, 421),
        ({"content": image, "Origin": "http://elsewhere.example"}, 403),
        ({"content": image, "Filler": "a" * 60_000}, 431),
        ({"content": fields + b"a-" * 100_000 + b"\r\n--b--\r\n", "Content-Type": f"{form}; charset=punycode"}, 415),
        ({"content": fields + b"no end", "Content-Type": form}, 400),
        ({"content": image, "Content-Type": "text/plain"}, 415),
    ]


def soak(server, images: list[Path], count: int) -> None:
    """Send images of mixed sizes and formats, one request in ten hostile; print the memory then."""
    rng = np.random.default_rng(0)
    requests = []
    for number in range(200):
        picture = Image.open(images[number % len(images)]).convert(str(rng.choice(["L", "RGB"])))
        width, height = rng.choice([64, 100, 256, 300, 512, 640, 1024, 1600], 2)
        stream = io.BytesIO()
        picture.resize((int(width), int(height))).save(stream, str(rng.choice(["PNG", "JPEG", "BMP", "TIFF", "WEBP"])))
        requests.append(({"content": stream.getvalue()}, 200))
    hostile, sent = hostile_requests(images[0].read_bytes()), Counter()
    client, early, failed, started = Client(server), 0, Counter(), time.perf_counter()
    for number in track(range(count), description="Soak"):
        kind = hostile if number % 10 == 9 else requests
        arguments, expected = kind[int(rng.integers(len(kind)))]
        status = client.ask(**arguments)
        sent[status] += 1
        if status != expected:
            failed[f"{status} instead of {expected}"] += 1
        if number == min(1000, count // 2):
            early = memory(server)
    late = memory(server)
    click.echo(
        f"{count:,} requests in {time.perf_counter() - started:.0f} s; answers: {dict(sorted(sent.items()))}; unexpected: "
        f"{dict(failed) or 'none'}; resident memory {early:.0f} MiB after the first {min(1000, count // 2):,}, "
        f"{late:.0f} MiB at the end ({late / early - 1:+.1%})"
    )


def cpu_seconds(server) -> float:
    """Processor time of the server's processes so far."""
    return sum(sum(child.cpu_times()[:2]) for child in server.children())


def record_cost(folder: Path, images: str, server, contents: list[bytes], count: int = 500, rate: float = 100) -> float:
    """CPU seconds that the record takes for an answer, in this process and at a steady rate, without network and search."""
    from patchcore_plugin.bento.metrics import Metrics
    from patchcore_plugin.bento.record import AnswerRecord
    from patchcore_plugin.bento.schemas import ImageAnswer
    from patchcore_plugin.bento.settings import Settings
    from prometheus_client import CollectorRegistry

    answers = [ImageAnswer.model_validate(predict(server.client, content).json()) for content in contents]
    record = AnswerRecord(folder, Settings(record=folder, record_images=images), Metrics(CollectorRegistry()))
    time.sleep(2)  # the database is there
    begin, started = time.perf_counter(), time.process_time()
    for number in range(count):
        place = number % len(contents)
        record.add("cell.png", contents[place], answers[place], "request")
        time.sleep(max(0, begin + number / rate - time.perf_counter()))
    record.close()
    return (time.process_time() - started) / count


def compare_records(environment: dict[str, str], folder: Path, contents: list[bytes], count: int, turns: int) -> None:
    """Measure services without a record, with one, and with one that keeps all images, by turns."""
    kinds = {
        "without a record": {},
        "record without images": {"PATCHCORE_RECORD": str(folder / "none"), "PATCHCORE_RECORD_IMAGES": "none"},
        "record of all images": {"PATCHCORE_RECORD": str(folder / "all"), "PATCHCORE_RECORD_IMAGES": "all"},
    }
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(bentoml_serve(SERVE, folder, **environment, **options))
            for name, options in kinds.items()
        }
        for server in servers.values():
            saturate(server, contents, count)
        rates, costs = ({name: [] for name in kinds} for _ in range(2))
        for turn in track(range(turns), description="Turns"):
            for name in list(kinds)[:: 1 if turn % 2 else -1]:
                before = cpu_seconds(servers[name])
                rates[name].append(saturate(servers[name], contents, count))
                time.sleep(1)  # the last answers are written
                costs[name].append((cpu_seconds(servers[name]) - before) / count)
        alone = [
            record_cost(folder / f"alone-{images}", images, servers["without a record"], contents)
            for images in ("none", "all")
        ]
        lost = [server for server in servers.values() if "patchcore_record_lost_total" in server.client.get("/metrics").text]
    table = Table("service", "requests/s, median", "of that without (quartiles)", "CPU ms a request", "of that without")
    bare = next(iter(kinds))
    for name in kinds:
        shares = [np.divide(values[name], values[bare]) for values in (rates, costs)]
        low, middle, high = np.percentile(shares[0], [25, 50, 75])
        table.add_row(
            name,
            f"{np.median(rates[name]):.1f}",
            f"{middle:.1%} ({low:.1%} to {high:.1%})",
            f"{1000 * np.median(costs[name]):.2f}",
            f"{np.median(shares[1]):.1%}",
        )
    Console(width=125).print(table)
    request = np.median(costs[bare])
    told = " and ".join(f"{1000 * cost:.2f} ms ({cost / request:.1%} of a request)" for cost in alone)
    click.echo(f"CPU time of the record alone, an answer, without and with its image: {told}")
    with closing(sqlite3.connect(folder / "all" / "answers.sqlite")) as connection:
        (rows,) = connection.execute("SELECT count(*) FROM answers WHERE image_bytes IS NOT NULL").fetchone()
    click.echo(
        f"{count} requests a turn, {turns} turns; {rows:,} of {count * (turns + 1):,} images are recorded, and {len(lost)} "
        f"services lost any; load of the machine in the last 5 minutes: {os.getloadavg()[1]:.1f}"
    )


def compare_modes(environment: dict[str, str], folder: Path, contents: list[bytes], count: int, turns: int) -> None:
    """Measure the service in each mode and the runtime alone, by turns; then latency at shares of the default's rate."""
    with ExitStack() as stack:
        servers = {
            mode: stack.enter_context(bentoml_serve(SERVE, folder, **environment, PATCHCORE_MODE=mode)) for mode in MODES
        }
        for server in servers.values():
            saturate(server, contents, count)
        rates, alone, costs = ({mode: [] for mode in MODES} for _ in range(3))
        for turn in track(range(turns), description="Turns"):
            for mode in MODES[:: 1 if turn % 2 else -1]:
                before = cpu_seconds(servers[mode])
                rates[mode].append(saturate(servers[mode], contents, count))
                costs[mode].append(1000 * (cpu_seconds(servers[mode]) - before) / count)
                alone[mode].append(runtime_rate(Path(environment["PATCHCORE_BUNDLE"]), contents, mode, count))
        best = np.max(list(alone.values()), axis=0)
        rate = float(np.median(rates[MODES[0]]))
        table = Table(
            "mode", "runtime alone", "service", "of the runtime's best", "CPU ms", "p50 / p99 ms at 50 %", "at 80 %"
        )
        for mode in MODES:
            cells = [f"{np.median(values):.1f}" for values in (alone[mode], rates[mode])]
            low, middle, high = np.percentile(np.divide(rates[mode], best), [25, 50, 75])
            cells += [f"{middle:.0%} ({low:.0%} to {high:.0%})", f"{np.median(costs[mode]):.1f}"]
            for share in (0.5, 0.8):
                times, _ = steady(servers[mode], contents, share * rate, 10)
                cells.append(" / ".join(f"{value:.0f}" for value in np.percentile(times, [50, 99])))
            table.add_row(mode, *cells)
    Console(width=125).print(table)
    click.echo(f"Images a second, medians of {turns} turns of {count}; shares are of the same turn, with quartiles.")


DEPENDENT = """
import time
import bentoml
from pathlib import Path
from patchcore_plugin.bento.service import PatchcoreService

@bentoml.service
class Dependent:
    patchcore = bentoml.depends(PatchcoreService)

    @bentoml.api
    async def times(self, path: str, count: int) -> list[float]:
        content, spent = Path(path).read_bytes(), []
        for _ in range(count):
            started = time.perf_counter()
            await self.patchcore.predict(image=content)
            spent.append(time.perf_counter() - started)
        return spent
"""


def compare_callers(environment: dict[str, str], folder: Path, image: Path, count: int) -> None:
    """Measure one image at a time by a raw POST, by BentoML's client, and by a service that depends on this one."""
    content = image.read_bytes()
    times: dict[str, list[float]] = {"raw POST": [], "bentoml.SyncHTTPClient": []}
    with bentoml_serve(SERVE, folder, **environment) as server, bentoml.SyncHTTPClient(str(server)) as client:
        calls = [lambda: server.client.post("/predict", files={"image": content}), lambda: client.predict(image=image)]
        for _ in track(range(count), description="Calls"):
            for call, spent in zip(calls, times.values(), strict=True):
                started = time.perf_counter()
                call()
                spent.append(time.perf_counter() - started)
    (folder / "dependent.py").write_text(DEPENDENT)
    with bentoml_serve([*BENTOML, "serve", "dependent:Dependent"], folder, **environment) as server:
        asked = server.client.post("/times", json={"path": str(image), "count": count}, timeout=600)
        times["bentoml.depends"] = asked.raise_for_status().json()
    raw = np.median(times["raw POST"])
    for name, spent in times.items():
        middle = np.median(spent)
        click.echo(f"{name}: {1000 * middle:.2f} ms, median of {count}; {middle / raw:.2f} of a raw POST")


@click.command()
@click.option("--count", default=1000, show_default=True, help="Requests that measure the highest rate.")
@click.option("--seconds", default=60.0, show_default=True, help="Seconds at twice the highest rate.")
@click.option("--soak", "soaked", default=0, help="Only send this number of requests, one in ten hostile.")
@click.option("--record", "turns", default=0, help="Only measure what the record costs, with this number of turns.")
@click.option("--modes", "mode_turns", default=0, help="Only compare the modes, with this number of turns.")
@click.option("--callers", is_flag=True, help="Only measure a call by BentoML's client, and by bentoml.depends.")
def main(count: int, seconds: float, soaked: int, turns: int, mode_turns: int, callers: bool) -> None:
    """Print throughput and latency, and what happens at twice the highest rate."""
    click.echo(heading("bentoml", "openvino", "faiss-cpu"))
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle, images = make_bundle(folder)
        contents = [image.read_bytes() for image in images]
        environment = {"PATCHCORE_BUNDLE": str(bundle)}
        if soaked:
            with bentoml_serve(SERVE, folder, **environment) as server:
                soak(server, images, soaked)
            return
        if callers:
            compare_callers(environment, folder, images[0], count)
            return
        if turns:
            compare_records(environment, folder, contents, count, turns)
            return
        if mode_turns:
            compare_modes(environment, folder, contents, count, mode_turns)
            return
        best = {mode: runtime_rate(bundle, contents, mode, count) for mode in MODES}
        for mode, rate in best.items():
            click.echo(f"runtime alone, mode {mode}: {rate:.0f} images/s")
        table = Table("service", "requests/s", "share of the runtime's best", "p50 / p99 ms at 50 %", "at 80 %")
        rates = {}
        for runner in ("inside", "process"):
            for mode in best:
                options = {**environment, "PATCHCORE_RUNNER": runner, "PATCHCORE_MODE": mode}
                with bentoml_serve(SERVE, folder, **options) as server:
                    rates[runner, mode] = row(
                        table, f"ours, runner {runner}, {mode}", server, contents, count, max(best.values())
                    )
        peer = folder / "peer"
        peer.mkdir()
        make_peer(bundle, peer)
        with bentoml_serve([*BENTOML, "serve", "peer:Peer"], folder, cwd=peer) as server:
            theirs = row(table, "anomalib's TorchInferencer", server, contents, max(60, count // 10), None)
        Console(width=125).print(table)
        click.echo(f"ratio to anomalib's: {rates['inside', 'auto'] / theirs:.1f}")

        with bentoml_serve(SERVE, folder, **environment, PATCHCORE_QUEUE="8") as server:
            rate = saturate(server, contents, count)
            normal = np.median(steady(server, contents, 0.5 * rate, 5)[0])
            before = memory(server)
            _, statuses = steady(server, contents, 2 * rate, seconds, clients=64)
            after = memory(server)
            again = np.median(steady(server, contents, 0.5 * rate, 5)[0])
        click.echo(
            f"twice the rate for {seconds:.0f} s: {json.dumps(statuses)}; memory {before:.0f} to {after:.0f} MiB; p50 at "
            f"half the highest rate {normal:.1f} ms before, {again:.1f} ms in the five seconds after"
        )


if __name__ == "__main__":
    main()
