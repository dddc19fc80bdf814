"""What another client sees while one loads the service with hostile requests.

    python tests/benchmarks/adversary.py BUNDLE IMAGE

A client sends a small image five times a second. Meanwhile another one sends, for some seconds each: unknown paths, forms in
odd character sets, files that are slow to decode, batches of huge images, heads without end, bodies one byte at a time, and
connections that say nothing. Every load is bounded in time and connections, and stays on this machine.
"""

from __future__ import annotations

import itertools
import secrets
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click
import common
import httpx
import numpy as np
import psutil
from helpers.pictures import black_png, encoded, jpeg_of_scans, jpeg_of_segments, tiff_of_strips
from helpers.server import SERVE, bentoml_serve
from PIL import Image
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PROBE_SECONDS = 0.2
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
WITHOUT_END = httpx.Timeout(60, connect=10)


class Probe:
    """The other client: its times and statuses, and the server's memory, while the context lasts."""

    def __init__(self, server, image: bytes) -> None:
        self._server, self._image = server, image
        self.milliseconds: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.peak = memory(server)
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask), threading.Thread(target=self._watch)]

    def __enter__(self) -> Probe:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._server, timeout=60, trust_env=False) as client:
            while True:
                started = time.perf_counter()
                with suppress(httpx.TransportError):
                    self.statuses[client.post("/predict", files={"image": self._image}).status_code] += 1
                self.milliseconds.append(1000 * (time.perf_counter() - started))
                if self._ended.wait(PROBE_SECONDS):
                    return

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.peak = max(self.peak, memory(self._server))


def memory(server) -> float:
    """Resident memory of the server's processes, in MiB."""
    total = 0
    for process in [psutil.Process(server.process.pid), *server.children()]:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


def post(server, path: str, seconds: float, clients: int, make: Callable[[], dict], most: int = 10**6) -> Counter:
    """POST from several clients for some seconds; returns the number of answers by status."""
    statuses, numbers, end = Counter(), itertools.count(), time.monotonic() + seconds

    def work() -> None:
        with httpx.Client(base_url=server, timeout=WITHOUT_END, trust_env=False) as client:
            while time.monotonic() < end and next(numbers) < most:
                try:
                    statuses[client.post(path, **make()).status_code] += 1
                except httpx.TransportError:
                    statuses[0] += 1

    with ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(work)
    return statuses


def unknown_paths(server, seconds: float) -> Counter:
    """Paths that nobody serves, some of 20 KB."""
    statuses, end = Counter(), time.monotonic() + seconds
    with httpx.Client(base_url=server, timeout=60, trust_env=False) as client:
        while time.monotonic() < end:
            path = f"/{secrets.token_hex(8)}" * (1 if secrets.randbelow(10) else 1000)
            with suppress(httpx.TransportError):
                statuses[client.get(path).status_code] += 1
    return statuses


def odd_forms(server, seconds: float) -> Counter:
    """Forms of 300 KB in punycode, which takes quadratic time."""
    body = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"a-" * 150_000 + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; charset=punycode; boundary=b"}
    return post(server, "/predict", seconds, 4, lambda: {"content": body, "headers": headers})


def slow_files(server, seconds: float) -> Counter:
    """Files that a decoder would work on for minutes."""
    files = itertools.cycle(
        [jpeg_of_scans(6000, 6000, 300), tiff_of_strips(2_000_000), jpeg_of_segments(60_000, b"Exif\0\0II*\0\x08\0\0\0\0\0")]
    )
    return post(server, "/predict", seconds, 6, lambda: {"files": {"image": next(files)}})


def heavy_images(server, seconds: float) -> Counter:
    """Six at a time of the largest images that are allowed: 88 megapixels in a small file."""
    image = black_png(11_000, 8000)
    return post(server, "/predict", seconds, 6, lambda: {"files": {"image": image}})


def heavy_batches(server, seconds: float) -> Counter:
    """Batches of 32 images of 90 megapixels, and of 32 images of 11."""
    huge, large = black_png(9000, 9900), encoded(Image.effect_noise((3600, 3000), 60), "JPEG")
    batches = itertools.cycle([[("images", huge)] * 32, [("images", large)] * 32])
    return post(server, "/predict_batch", seconds, 2, lambda: {"files": next(batches)})


def heads_without_end(server, seconds: float) -> Counter:
    """Headers, 8 MiB on each of eight connections."""
    piece, ended, end = (b"X-Filler: " + b"a" * 4000 + b"\r\n") * 16, Counter(), time.monotonic() + seconds
    while time.monotonic() < end:
        ended += trickle(server, end - time.monotonic(), 8, [HEAD, *[piece] * 128], 0)
    return ended


def slow_bodies(server, seconds: float) -> Counter:
    """Thirty-two bodies that come one byte a second."""
    return trickle(server, seconds, 32, [HEAD + b"Content-Length: 1000\r\n\r\n", *[b"a"] * 1000], 1)


def silent_connections(server, seconds: float) -> Counter:
    """Three hundred connections that say nothing."""
    return trickle(server, seconds, 300, [b""], seconds)


def trickle(server, seconds: float, connections: int, pieces: Iterable[bytes], pause: float) -> Counter:
    """Send pieces on several connections, with a pause after each; counts connections by how they ended."""
    host, port = server.removeprefix("http://").split(":")
    ended, end = Counter(), time.monotonic() + seconds
    with ExitStack() as stack:
        opened = {stack.enter_context(socket.create_connection((host, int(port)), timeout=5)) for _ in range(connections)}
        for piece in pieces:
            for connection in list(opened):
                try:
                    connection.sendall(piece)
                except OSError:
                    ended["closed by the service"] += 1
                    opened.discard(connection)
            time.sleep(min(pause, max(0, end - time.monotonic())))
            if time.monotonic() > end:
                break
        ended["not seen closed"] = len(opened)
    return ended


LOADS = [
    unknown_paths,
    odd_forms,
    slow_files,
    heavy_images,
    heavy_batches,
    heads_without_end,
    slow_bodies,
    silent_connections,
]


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("image", type=click.Path(exists=True, path_type=Path))
@click.option("--seconds", default=10.0, show_default=True, help="Time of each load.")
@click.option(
    "--only", multiple=True, type=click.Choice([load.__name__ for load in LOADS]), help="A load to run, or several."
)
def main(bundle: Path, image: Path, seconds: float, only: tuple[str, ...]) -> None:
    """Print what a small image saw under each load, and the service's memory at its peak and afterwards."""
    console, content = Console(width=150), image.read_bytes()
    console.print(common.heading("bentoml", "openvino"))
    table = Table("load", "answers", "small image: p50 / p99 ms", "its statuses", "peak MiB", "growth MiB")
    with tempfile.TemporaryDirectory() as folder, bentoml_serve(SERVE, Path(folder), PATCHCORE_BUNDLE=str(bundle)) as server:
        with Probe(server, content):
            heavy_images(server, seconds / 2)  # what the first large image takes for good is not growth
        for load in LOADS:
            if only and load.__name__ not in only:
                continue
            time.sleep(1)
            before = memory(server)
            with Probe(server, content) as probe:
                answers = load(server, seconds)
            time.sleep(2)
            p50, p99 = np.percentile(probe.milliseconds, [50, 99])
            numbers = [
                f"{p50:.0f} / {p99:.0f}",
                str(dict(probe.statuses)),
                f"{probe.peak:.0f}",
                f"{memory(server) - before:+.0f}",
            ]
            table.add_row(load.__name__.replace("_", " "), str(dict(answers)), *numbers)
    console.print(table)


if __name__ == "__main__":
    main()
