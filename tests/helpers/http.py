"""Requests to the service, on a real server or in this process: both have the same client."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx


def predict(client, image, **fields):
    """POST an image, a path or bytes, to /predict; the fields go into the form."""
    content = image.read_bytes() if isinstance(image, Path) else image
    return client.post("/predict", files={"image": content}, data=fields)


def predict_batch(client, contents) -> list[dict]:
    """Answers of /predict_batch for the bytes of several images, all of which must be answered."""
    files = [("images", (f"{number}.png", content)) for number, content in enumerate(contents)]
    response = client.post("/predict_batch", files=files)
    assert response.status_code == 200, response.text
    return [result["answer"] for result in response.json()["results"]]


def without_times(answer: dict) -> dict:
    """An answer without the times that it took, which differ each time."""
    return {**answer, "milliseconds": None}


def wait_for(condition, seconds=60) -> None:
    """Wait until a condition holds; an AssertionError if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no success within {seconds} seconds"
        time.sleep(0.02)


class Load:
    """Requests to /predict one after the other, from several threads, until the context ends.

    Attributes:
        statuses: Status of each answer.
        errors: Errors of connections.
        scores: Versions and scores, rounded to three digits, that were answered.
    """

    def __init__(self, url, image, threads=3) -> None:
        self.statuses, self.errors, self.scores = [], [], set()
        self._url, self._image, self._stop = url, image, threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(threads)]

    def _work(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    response = predict(client, self._image)
                except httpx.TransportError as error:
                    self.errors.append(error)
                    time.sleep(0.05)
                    continue
                self.statuses.append(response.status_code)
                if response.status_code == 200:
                    self.scores.add((response.json()["version"], round(response.json()["score"], 3)))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        wait_for(lambda: self.statuses)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"
