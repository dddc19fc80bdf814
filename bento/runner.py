"""Scoring in a process of its own: BentoML's service for it, and the scorer that calls it."""

from __future__ import annotations

from concurrent.futures import CancelledError
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import anyio.from_thread
import bentoml

from patchcore_plugin.bundle import Box, BundleError, Manifest
from patchcore_plugin.images import ImageError
from patchcore_plugin.runtime import Prediction
from patchcore_plugin.runtime.explain import NormalPatch, Reason
from patchcore_plugin.scoring.regions import Region

from .logs import logger, start_logging
from .metrics import Metrics
from .problems import ProblemError
from .repository import make_repository
from .scorer import LocalScorer, Scored
from .server import UnixSocketOnlyMiddleware, end_with_supervisor, open_http_port_only

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from .settings import Settings


class ScoredMessage(TypedDict):
    """A result on its way between two processes: plain values and arrays, which BentoML's connection leaves as they are.

    Attributes:
        score: Raw image score.
        patch_distances: Patch distances (h, w), float32.
        size: Height and width of the image.
        milliseconds: Time of the stages.
        manifest: Manifest of the bundle, as JSON.
        version: Version of the bundle.
        reasons: The reasons, as dictionaries.
    """

    score: float
    patch_distances: NDArray[np.float32]
    size: tuple[int, int]
    milliseconds: dict[str, float]
    manifest: str
    version: str
    reasons: list[dict[str, Any]]


class ErrorMessage(TypedDict):
    """Why a model cannot be loaded."""

    error: str


class RefusalMessage(TypedDict):
    """Why a model cannot read an image."""

    refusal: str


Message = ScoredMessage | ErrorMessage | RefusalMessage


def to_message(scored: Scored | ImageError) -> ScoredMessage | RefusalMessage:
    """Take a result apart."""
    if isinstance(scored, ImageError):
        return {"refusal": scored.reason}
    prediction = scored.prediction
    return {
        "score": prediction.score,
        "patch_distances": prediction.patch_distances,
        "size": prediction.size,
        "milliseconds": prediction.milliseconds,
        "manifest": prediction.manifest.model_dump_json(),
        "version": scored.version,
        "reasons": [asdict(reason) for reason in scored.reasons],
    }


def from_message(message: Message, model: str) -> Scored | ImageError:
    """Put a result together.

    Raises:
        BundleError: If the message says that the model cannot be loaded.
    """
    if "error" in message:
        raise BundleError(message["error"])
    if "refusal" in message:
        return ImageError(message["refusal"])
    prediction = Prediction(
        score=message["score"],
        patch_distances=message["patch_distances"],
        size=tuple(message["size"]),
        manifest=_manifest(message["manifest"]),
        milliseconds=message["milliseconds"],
    )
    return Scored(prediction, model, message["version"], tuple(_reason(**reason) for reason in message["reasons"]))


def _reason(region: dict[str, Any] | None, box: dict[str, float], nearest: dict[str, Any], **others: Any) -> Reason:
    normal = NormalPatch(**{**nearest, "box": nearest["box"] and Box(**nearest["box"])})
    return Reason(region=region and Region(**region), box=Box(**box), nearest=normal, **others)


@lru_cache(maxsize=64)
def _manifest(text: str) -> Manifest:
    return Manifest.model_validate_json(text)


class RunnerClient(Protocol):
    """BentoML's asynchronous client of the runner's service."""

    async def score(self, images: list[tuple[str, NDArray]]) -> list[Message]:
        """Score pairs of a model's name and an image."""

    async def explain(self, images: list[tuple[str, NDArray]]) -> list[Message]:
        """Explain pairs of a model's name and an image."""


class RunnerScorer:
    """Scores in the runner's process. Call it from a worker thread of the event loop.

    Args:
        client: Client of the runner's service.
    """

    def __init__(self, client: RunnerClient) -> None:
        self._client = client

    def score(self, model: str, images: Sequence[NDArray]) -> list[Scored | ImageError]:
        """Score images, as :meth:`.Scorer.score` says."""
        return self._call(self._client.score, model, images)

    def explain(self, model: str, images: Sequence[NDArray]) -> list[Scored | ImageError]:
        """Explain images, as :meth:`.Scorer.explain` says."""
        return self._call(self._client.explain, model, images)

    def is_ready(self) -> bool:
        """True: BentoML waits for the runner's process by itself."""
        return True

    def _call(
        self, method: Callable[..., Awaitable[list[Message]]], model: str, images: Sequence[NDArray]
    ) -> list[Scored | ImageError]:
        try:
            messages = anyio.from_thread.run(method, [(model, image) for image in images])
        except CancelledError:  # the request has ended
            raise
        except Exception as error:  # any error of a client whose server is gone
            logger.warning("The runner does not answer: %s: %s", type(error).__name__, error)
            detail = "The process that scores does not answer; it is being started again."
            raise ProblemError("runner_unavailable", detail, {"Retry-After": "1"}) from error
        return [from_message(message, model) for message in messages]


def common_options(settings: Settings) -> dict[str, Any]:
    """What both of BentoML's services are configured with."""
    return {
        "traffic": {"timeout": settings.receive_timeout + settings.timeout + 5},  # our own middleware answers earlier
        # BentoML's client replaces its connection after some requests, and ends the requests that are on the old one.
        "runner_connection": {"max_requests": 10**12, "max_age": 1e9},
        "logging": {"access": {"enabled": False}},  # the access log middleware writes more
        # glibc gives every thread a heap of its own, and images of many sizes leave holes in each; and after a large one it
        # keeps even larger pieces for itself. FAISS takes pieces of 16 MiB for each search: were they given back, every
        # search would take half as long again. A value in the environment goes before these.
        "envs": [
            {"name": "MALLOC_ARENA_MAX", "value": "2"},
            {"name": "MALLOC_MMAP_THRESHOLD_", "value": str(17 << 20)},
            {"name": "MALLOC_TRIM_THRESHOLD_", "value": str(20 << 20)},
        ],
    }


def make_runner(settings: Settings) -> bentoml.Service[Any]:
    """BentoML's service for the process that scores."""
    batches = {"batchable": True, "max_batch_size": settings.max_batch_size, "max_latency_ms": settings.max_latency_ms}

    @bentoml.service(
        name="patchcore-runner",
        workers=settings.runner_workers,
        **common_options(settings),
    )
    class PatchcoreRunner:
        """Networks and memory banks. A batch may come from several requests, and be of several models."""

        def __init__(self) -> None:
            end_with_supervisor()
            start_logging(settings.log)
            repository = make_repository(settings, Metrics())
            repository.preload()
            self.scorer = LocalScorer(repository)

        @bentoml.on_deployment
        @staticmethod
        def prepare() -> None:
            """Prepare the supervisor, where somebody starts this service alone."""
            open_http_port_only()

        @bentoml.api(**batches)
        def score(self, images: list[Any]) -> list[Any]:
            """Score pairs of a model's name and an image; returns a message for each."""
            return _answer(self.scorer.score, images)

        @bentoml.api(**batches)
        def explain(self, images: list[Any]) -> list[Any]:
            """Explain pairs of a model's name and an image; returns a message for each."""
            return _answer(self.scorer.explain, images)

    PatchcoreRunner.add_asgi_middleware(UnixSocketOnlyMiddleware)
    return PatchcoreRunner


def _answer(
    method: Callable[[str, list[NDArray]], list[Scored | ImageError]], images: list[tuple[str, NDArray]]
) -> list[Message]:
    """Call a scorer's method once for each model of a batch, and return the messages in the order of the images."""
    numbers: dict[str, list[int]] = {}
    for number, (model, _) in enumerate(images):
        numbers.setdefault(model, []).append(number)
    messages: list[Message] = [{}] * len(images)
    for model, places in numbers.items():
        try:
            found = [to_message(scored) for scored in method(model, [images[place][1] for place in places])]
        except BundleError as error:
            found = [{"error": str(error)}] * len(places)
        for place, message in zip(places, found, strict=True):
            messages[place] = message
    return messages
