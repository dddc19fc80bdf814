"""Requests to the service, on a real server or in this process: both have the same client."""

from __future__ import annotations

import time
from pathlib import Path


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


def wait_for(condition, seconds=60) -> None:
    """Wait until a condition holds; an AssertionError if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no success within {seconds} seconds"
        time.sleep(0.02)
