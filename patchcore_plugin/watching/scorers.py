"""Who answers: the runtime in this process, or a running service."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from patchcore_plugin.bundle import MANIFEST, BundleError, file_states
from patchcore_plugin.drawings import save_drawing
from patchcore_plugin.errors import PatchcoreError, UsageError
from patchcore_plugin.http_client import HttpError, Reply, check_url, send
from patchcore_plugin.images import ImageError
from patchcore_plugin.runtime import PatchcoreRuntime
from patchcore_plugin.runtime.device import CPU

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from patchcore_plugin.runtime import Outcome
    from patchcore_plugin.scoring.regions import Region

_BUNDLE_LOOK_SECONDS = 1.0
_REQUEST_SECONDS = 120.0  # the service gives up after a minute itself, by default
_MOST_ANSWER_BYTES = 512 << 20  # with the heatmap of the largest image
_ABOUT_THE_IMAGE = frozenset({"image_missing", "image_unreadable", "image_too_large", "body_too_large"})
_ABOUT_ONE_REQUEST = frozenset({408, 500, 504})
_NO_ANSWER = ValueError, TypeError, LookupError, RecursionError  # of JSON that is none, or of something else
_THRESHOLDS = "threshold", "review_threshold", "pixel_threshold"
_NUMBERS = "score", "normalized_score", "p_value", *_THRESHOLDS, "ratio", "small_regions"

logger = logging.getLogger(__name__)


class ServiceDownError(PatchcoreError):
    """The service does not answer now.

    Args:
        message: What is wrong.
        wait: Seconds that the service asks to wait; None if it asks for nothing.
        one: The service fails at this image, and may answer for others.
    """

    def __init__(self, message: str, wait: float | None = None, *, one: bool = False) -> None:
        super().__init__(message)
        self.wait, self.one = wait, one


@dataclass(frozen=True)
class Answer:
    """The answer for an image.

    Attributes:
        fields: The answer as ``/predict`` gives it: score, verdict, regions, model, version, ...
        draw: Function that writes the heatmap as a PNG file; None if it was not asked for.
    """

    fields: dict[str, Any]
    draw: Callable[[Path], None] | None = None


class Scorer(Protocol):
    """Answers for image files."""

    def check(self) -> None:
        """Find out before the first image what would go wrong with every one.

        Raises:
            PatchcoreError: If something would; the message says what.
        """

    def answers(self, files: Iterable[Path], *, heatmaps: bool) -> Iterator[Answer | ImageError | OSError]:
        """Answer for files, one after the other.

        Args:
            files: Paths of images.
            heatmaps: Whether heatmaps are wanted.

        Returns:
            For each file its answer, or why it cannot be read.

        Raises:
            ServiceDownError: If no answer can be had now.
        """


class RuntimeScorer:
    """Answers by a bundle, in this process. A bundle that replaces it answers from the next image on.

    Args:
        bundle: Folder of the bundle.
        device: Device that computes the network.

    Raises:
        BundleError: If it cannot be loaded.
        UsageError: If there is no such device.
    """

    def __init__(self, bundle: Path, device: str = CPU) -> None:
        self._bundle, self._device = bundle, device
        self._runtime = PatchcoreRuntime.load(bundle, mode="auto", device=device)
        self._states, self._look_at = self._runtime.states, 0.0

    def check(self) -> None:
        """Warn of a bundle that gives no verdicts."""
        if self._runtime.manifest.image.threshold is None:
            logger.warning("%s has no threshold: it gives scores, and no verdict on any image.", self._bundle)

    def answers(self, files: Iterable[Path], *, heatmaps: bool) -> Iterator[Answer | ImageError | OSError]:
        """Answer for files, as :meth:`Scorer.answers` says."""
        self._replace_if_changed()
        runtime = self._runtime
        files, done = list(files), 0
        while done < len(files):
            try:
                for outcome in runtime.stream_outcomes(files[done:]):
                    yield outcome.error or self._describe(runtime, outcome, heatmaps=heatmaps)
                    done += 1
            except (MemoryError, RuntimeError) as error:  # of OpenVINO and FAISS too; others may be smaller
                reason = f"it cannot be scored: {error!r}"
                yield ImageError(f"{files[done]}: {reason}", reason)
                done += 1

    def _replace_if_changed(self) -> None:
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _BUNDLE_LOOK_SECONDS
        states = file_states(self._bundle)
        if MANIFEST not in states or states == self._states:  # absent for the moment, or unchanged, or refused before
            return
        try:
            self._runtime = PatchcoreRuntime.load(self._bundle, mode="auto", device=self._device)
        except (BundleError, OSError, MemoryError) as error:
            logger.error("The new bundle cannot be loaded, version %s goes on: %s", self._runtime.version, error)
            self._states = states
        else:
            self._states = self._runtime.states
            logger.warning("The bundle was replaced: version %s answers.", self._runtime.version)

    @staticmethod
    def _describe(runtime: PatchcoreRuntime, outcome: Outcome, *, heatmaps: bool) -> Answer:
        prediction = outcome.prediction
        height, width = prediction.size
        fields = {
            **{name: getattr(prediction, name) for name in (*_NUMBERS, "verdict")},
            "regions": None if prediction.regions is None else list(map(_describe_region, prediction.regions)),
            "size": {"width": width, "height": height},
            "model": runtime.manifest.name,
            "version": runtime.version,
        }

        def draw(path: Path) -> None:
            save_drawing(runtime.heatmap(outcome.pixels, prediction), path)

        return Answer(fields, draw if heatmaps else None)


def _describe_region(region: Region) -> dict[str, Any]:
    """A region as ``/predict`` answers it."""
    fields = {name: getattr(region, name) for name in ("left", "top", "width", "height", "area", "peak")}
    return {**fields, "mm": region.mm and region.mm._asdict()}


class ServiceScorer:
    """Answers by a running service.

    Args:
        url: URL of the service, such as ``http://127.0.0.1:3000``.
        model: Name of one of its models.
        key: The service's key; None if it has none.

    Raises:
        UsageError: If the URL is wrong.
    """

    def __init__(self, url: str, model: str, key: str | None = None) -> None:
        check_url("--url", url)
        if key is not None and not (key.isascii() and key.isprintable()):
            msg = "PATCHCORE_API_KEY has a character that no header can hold."
            raise UsageError(msg)
        self._url, self._model = url.rstrip("/"), model
        self._headers = {} if key is None else {"X-API-Key": key}

    def check(self) -> None:
        """Ask for the service's models; a service that is down may still be starting."""
        try:
            reply = self._ask("/models", None, {})
            models = json.loads(reply.body)["models"] if reply.status == 200 else []
            names = [str(model["name"]) for model in models]
        except ServiceDownError as error:
            logger.warning("%s Images wait for it.", error)
            return
        except _NO_ANSWER as error:
            msg = f"{self._url} is no service of patchcore: /models answers something else."
            raise UsageError(msg) from error
        if reply.status != 200:
            raise UsageError(self._refusal(reply))
        if self._model not in names:
            msg = f"The service at {self._url} has no model {self._model!r}. Its models: {', '.join(names) or 'none'}."
            raise UsageError(msg)

    def answers(self, files: Iterable[Path], *, heatmaps: bool) -> Iterator[Answer | ImageError | OSError]:
        """Answer for files, as :meth:`Scorer.answers` says."""
        for file in files:
            try:
                content = file.read_bytes()
            except OSError as error:
                yield error
                continue
            yield self._answer(file, content, heatmaps=heatmaps)

    def _answer(self, file: Path, content: bytes, *, heatmaps: bool) -> Answer | ImageError:
        if not content:
            return ImageError(f"{file} cannot be read as an image: it is empty.", "it is empty")
        mark = uuid.uuid4().hex
        head = (
            f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{quote(file.name, errors="replace")}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
        path = f"/predict?model={quote(self._model, safe='')}&heatmap={'true' if heatmaps else 'false'}"
        reply = self._ask(path, body, {"Content-Type": f"multipart/form-data; boundary={mark}"})
        try:
            answer = json.loads(reply.body)
            if reply.status == 200:
                return _read_answer(answer, heatmaps=heatmaps)
            if reply.status < 500 and answer["code"] in _ABOUT_THE_IMAGE:
                reason = str(answer["detail"])[:1000]
                return ImageError(reason, reason)
        except _NO_ANSWER as error:
            msg = f"The service at {self._url} answers something that is no answer (status {reply.status}: {error})."
            raise ServiceDownError(msg) from error
        raise ServiceDownError(self._refusal(reply), reply.seconds_to_wait())

    def _ask(self, path: str, body: bytes | None, headers: dict[str, str]) -> Reply:
        try:
            reply = send(
                self._url + path, body, {**self._headers, **headers}, seconds=_REQUEST_SECONDS, most_bytes=_MOST_ANSWER_BYTES
            )
        except HttpError as error:
            msg = f"The service at {self._url} is down: {error}."
            raise ServiceDownError(msg) from error
        if reply.status >= 500 or reply.status in (408, 429):
            one = reply.status in _ABOUT_ONE_REQUEST
            raise ServiceDownError(self._refusal(reply), reply.seconds_to_wait(), one=one)
        return reply

    def _refusal(self, reply: Reply) -> str:
        """What a service answers in place of an answer, as a sentence."""
        detail = ""
        with suppress(*_NO_ANSWER):
            detail = str(json.loads(reply.body)["detail"])[:1000]
        return f"The service at {self._url} answers {reply.status}: {detail or reply.reason or 'no reason'}"


def _read_answer(answer: Any, *, heatmaps: bool) -> Answer:
    """Check the answer of a service, whose words become names of folders and lines of files.

    Raises:
        ValueError: If it is no answer.
    """
    verdict, texts = answer["verdict"], [answer["model"], answer["version"]]
    numbers = {name: answer.get(name) for name in _NUMBERS}
    if not isinstance(numbers["score"], int | float) or not all(map(_is_number, numbers.values())):
        msg = "its numbers are none"
        raise ValueError(msg)
    if not (verdict is None or re.fullmatch(r"[a-z]{1,20}", verdict)) or not all(isinstance(text, str) for text in texts):
        msg = "its verdict, model or version is none"
        raise ValueError(msg)
    draw = None
    if heatmaps:
        try:
            picture = base64.b64decode(answer["heatmap"], validate=True)
        except binascii.Error as error:
            msg = "its heatmap is none"
            raise ValueError(msg) from error
        draw = _Picture(picture)
    fields = {**numbers, "verdict": verdict, "model": texts[0][:200], "version": texts[1][:200]}
    return Answer({**fields, "regions": answer.get("regions"), "size": answer.get("size")}, draw)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


@dataclass(frozen=True)
class _Picture:
    """A PNG file that a service drew, to be written with the mark of :func:`save_drawing`."""

    content: bytes

    def __call__(self, path: Path) -> None:
        import io

        from PIL import Image

        with Image.open(io.BytesIO(self.content), formats=["PNG"]) as picture:
            save_drawing(picture, path)
