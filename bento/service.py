"""PatchCore over HTTP: BentoML services on the OpenVINO + FAISS runtime.

What is served: the bundle that the setting ``bundle`` names (environment variable PATCHCORE_BUNDLE), the bundles in the
folder that ``bundles`` names, or else the newest model ``patchcore`` in BentoML's model store, where ``patchcore pack
BUNDLE`` puts one. All settings: :class:`patchcore_plugin.bento.settings.Settings`.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import bentoml
from bentoml.exceptions import BentoMLConfigException, NotFound
from opentelemetry import trace
from PIL import Image

from patchcore_plugin.bundle import MANIFEST, BundleError, Manifest, read_manifest, verify
from patchcore_plugin.cpu import cores
from patchcore_plugin.images import ImageError, ImageTooLargeError, read_image
from patchcore_plugin.runtime import PatchcoreRuntime, Prediction
from patchcore_plugin.scoring.thresholds import raw_threshold

from .drift import Watch
from .metrics import Metrics
from .middleware import LogFormatter, ProblemError
from .repository import Shelf, UnknownModelError, describe
from .routes import as_base64, as_grey, as_png, make_app
from .schemas import Answer, Explanation, FoundReason, Model, Models, Size, describe_prediction
from .settings import read_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

MODEL = "patchcore"  # in BentoML's store; in a bento: the alias of the model that was built in

settings = read_settings()
logger = logging.getLogger("patchcore.service")


def places() -> dict[str, Path]:
    """Folder of every bundle that may be served, by the name that requests give.

    Raises:
        BundleError: If there is nothing to serve.
    """
    if settings.bundles is not None:
        if not settings.bundles.is_dir():
            msg = f"PATCHCORE_BUNDLES: there is no folder {settings.bundles}."
            raise BundleError(msg)
        folders = sorted(path for path in settings.bundles.iterdir() if not path.name.startswith("."))
        return {path.name: path for path in folders if (path / MANIFEST).is_file()}
    if settings.bundle is not None:
        return {_name(settings.bundle): settings.bundle}
    try:
        path = Path(bentoml.models.get(MODEL).path)
        return {_name(path): path}
    except NotFound as error:
        msg = (
            "There is no model to serve. Set PATCHCORE_BUNDLE to a bundle's folder, PATCHCORE_BUNDLES to a folder of "
            "several, or put one into BentoML's model store with `patchcore pack BUNDLE`."
        )
        raise BundleError(msg) from error


@cache
def _name(path: Path) -> str:
    """The name in a bundle's manifest, as it was first: a bundle that takes the place of another answers to it."""
    return read_manifest(path).name


def make_shelf(metrics: Metrics) -> Shelf:
    """The bundles of this process."""
    from_store = settings.bundle is None and settings.bundles is None  # a folder more would look like a model there
    load = partial(
        PatchcoreRuntime.load,
        mode=settings.mode,
        threads=settings.threads,
        cache=settings.cache or not from_store,
    )
    return Shelf(
        places, load, settings.memory << 20, lambda name, result: metrics.loads.labels(model=name, result=result).inc()
    )


def _say(text: str) -> None:
    with suppress(OSError):  # a full disk behind the log is no reason not to serve
        print(text, file=sys.stderr, flush=True)


def preload(shelf: Shelf) -> bool:
    """Load what requests that name nothing ask for, so that the first one does not wait; False if it cannot be loaded."""
    try:
        with suppress(UnknownModelError):
            shelf.get(shelf.resolve(None, settings.default_model))
    except BundleError:  # the shelf has logged it
        return False
    return True


def start_logging() -> None:
    """Write the service's log to standard error, in the form that is set."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(settings.log))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


_traffic = {"timeout": settings.timeout + 5}  # the service itself answers in time
_logging = {"access": {"enabled": False}}  # its own line says more


# Spans that nobody collects would take a tenth of what a request costs beside the computing.
_tracing: dict[str, Any] = {"excluded_urls": ".*"}
if settings.trace_to is not None:
    _tracing = {
        "exporter_type": "otlp",
        "sample_rate": settings.trace_share,
        "otlp": {"protocol": "http", "endpoint": settings.trace_to},
    }

# glibc gives every thread a heap of its own, and images of many sizes leave holes in each. The environment goes before it.
_envs = [{"name": "MALLOC_ARENA_MAX", "value": "2"}]

# BentoML's client takes a new connection after so many requests and ends those that are under way on the old one.
_connection = {"max_requests": 10**12, "max_age": 1e9}


@bentoml.service(
    name="patchcore-runner",
    workers=settings.runner_workers,
    traffic=_traffic,
    logging=_logging,
    runner_connection=_connection,
    envs=_envs,
)
class PatchcoreRunner:
    """Networks and memory banks in a process of their own, where settings ask for it."""

    def __init__(self) -> None:
        start_logging()
        self.shelf = make_shelf(Metrics())
        preload(self.shelf)

    @bentoml.api(batchable=True, max_batch_size=settings.max_batch_size, max_latency_ms=settings.max_latency_ms)
    def score(self, images: list[Any]) -> list[Any]:
        """Score pairs of a model's name and an RGB image (H, W, 3), u8; gives what a prediction consists of, or an error."""
        by_model: dict[str, list[int]] = {}
        for number, (model, _) in enumerate(images):
            by_model.setdefault(model, []).append(number)
        answers: list[Any] = [None] * len(images)
        for model, numbers in by_model.items():
            try:
                entry = self.shelf.get(model)
                predictions = entry.runtime.predict([images[number][1] for number in numbers])
                manifest = entry.runtime.manifest.model_dump_json()
                results = [_taken_apart(prediction, manifest, entry.version) for prediction in predictions]
            except BundleError as error:
                results = [{"error": str(error)}] * len(numbers)
            for number, result in zip(numbers, results, strict=True):
                answers[number] = result
        return answers

    @bentoml.api(batchable=True, max_batch_size=settings.max_batch_size, max_latency_ms=settings.max_latency_ms)
    def explain(self, images: list[Any]) -> list[Any]:
        """As :meth:`score`, with the reasons."""
        return [self._explain(model, pixels) for model, pixels in images]

    def _explain(self, model: str, pixels: NDArray[np.uint8]) -> dict[str, Any]:
        try:
            entry = self.shelf.get(model)
        except BundleError as error:
            return {"error": str(error)}
        prediction, reasons = entry.runtime.explain(pixels)
        manifest = entry.runtime.manifest.model_dump_json()
        return {**_taken_apart(prediction, manifest, entry.version), "reasons": [asdict(reason) for reason in reasons]}


@bentoml.service(
    name="patchcore",
    workers=settings.workers,
    traffic=_traffic,
    logging=_logging,
    http={"host": settings.host, "port": settings.port},
    tracing=_tracing,
    envs=_envs,
)
@bentoml.asgi_app(make_app(settings), path="/", name="patchcore")
class PatchcoreService:
    """Scores images with PatchCore models."""

    if settings.runner == "process":
        runner = bentoml.depends(PatchcoreRunner)

    def __init__(self) -> None:
        start_logging()
        self.metrics = Metrics()
        self.shelf = make_shelf(self.metrics)
        self.watch = Watch(self.metrics)
        threads = settings.threads or cores()
        # In mode latency, one more decodes meanwhile.
        self._limiter = anyio.CapacityLimiter(threads if settings.mode == "throughput" else 2)
        self._ready = settings.runner == "process" or preload(self.shelf)

    def __is_ready__(self) -> bool:
        """Not before the model is there."""
        self._ready = self._ready or preload(self.shelf)
        return self._ready

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Print the settings, and end at once where there is nothing to serve."""
        lines = [f"  {name}: {value}" for name, value in settings.model_dump().items() if value is not None]
        _say("\n".join(["PatchCore service", *lines]))
        try:
            found = places()
            for name, path in found.items():
                try:
                    verify(path, read_manifest(path))
                except BundleError as error:
                    if len(found) == 1:
                        raise
                    _say(f"{name} cannot be served: {error}")
        except BundleError as error:
            raise BentoMLConfigException(str(error)) from error
        if settings.default_model is not None and settings.default_model not in found:
            names = ", ".join(found) or "none"
            msg = f"PATCHCORE_DEFAULT_MODEL: there is no bundle {settings.default_model!r}; found: {names}."
            raise BentoMLConfigException(msg)
        if not found:
            _say(f"There is no bundle in {settings.bundles} yet.")

    def resolve(self, model: str | None) -> str:
        """The name of the model that a request asks for; UnknownModelError if there is none."""
        return self.shelf.resolve(model, settings.default_model)

    async def answer(self, content: bytes, name: str, model: str | None, *, heatmap: bool = False) -> Answer:
        """Score an image file's bytes.

        Raises:
            ProblemError: If they are no image, or one too large.
            UnknownModelError: If there is no such model.
            BundleError: If it cannot be loaded.
        """
        return await self._work(content, name, model, partial(self._describe, heatmap=heatmap))

    async def draw(self, content: bytes, name: str, model: str | None, kind: str) -> tuple[bytes, Answer]:
        """The heatmap of an image file's bytes as PNG, and the answer; errors as of :meth:`answer`."""

        def describe_and_draw(pixels: NDArray[np.uint8], prediction: Prediction, *rest: Any) -> tuple[bytes, Answer]:
            answer = self._describe(pixels, prediction, *rest)
            if kind == "overlay":
                return as_png(PatchcoreRuntime.heatmap(pixels, prediction)), answer
            return as_png(as_grey(prediction.shown_map)), answer

        return await self._work(content, name, model, describe_and_draw)

    async def explain(self, content: bytes, name: str, model: str | None) -> Explanation:
        """Score an image file's bytes and give the reasons; errors as of :meth:`answer`."""
        return await self._work(content, name, model, self._describe_why, why=True)

    def models(self) -> Models:
        """What there is to ask for."""
        found = self.shelf.places()
        loaded = self.shelf.names()
        listed = []
        for name, path in found.items():
            try:
                manifest, version = describe(path)
            except BundleError as error:
                listed.append(Model(name=name, loaded=name in loaded, problem=str(error).replace(str(path), name)))
                continue
            height, width = manifest.preprocessing.size
            listed.append(
                Model(
                    name=name,
                    version=version,
                    loaded=name in loaded,
                    title=manifest.name,
                    created=manifest.created.isoformat(),
                    backbone=manifest.backbone,
                    input_size=Size(width=width, height=height),
                    threshold=raw_threshold(manifest.image),
                    bank_size=manifest.bank_size,
                    index=manifest.index.kind,
                    storage=manifest.index.storage,
                    precision=manifest.precision,
                    bytes=manifest.total_bytes,
                    sha256={file: about.sha256 for file, about in manifest.files.items()},
                )
            )
        return Models(models=listed, default=settings.default_model or (listed[0].name if len(listed) == 1 else None))

    async def _work(
        self, content: bytes, name: str, model: str | None, finish: Callable[..., Any], *, why: bool = False
    ) -> Any:
        """Decode, score, and make an answer of it, off the event loop; with ``why``, the answer is given the reasons too."""
        model = self.resolve(model)
        if settings.runner == "inside":
            return await self._in_thread(self._work_here, content, name, model, finish, why)
        pixels, decoding = await self._in_thread(self._decode, content, name)
        try:
            score = self.runner.to_async.explain if why else self.runner.to_async.score
            (found,) = await score([(model, pixels)])
        except Exception as error:  # whatever a client meets where the other process is not there
            logger.warning("The runner does not answer: %s: %s", type(error).__name__, error)
            detail = "The process that computes does not answer; it is being started again."
            raise ProblemError(503, "runner_unavailable", detail, {"Retry-After": "1"}) from error
        if "error" in found:
            raise BundleError(found["error"])
        version = found.pop("version")
        if why:
            finish = partial(finish, found.pop("reasons"))
        prediction = Prediction(**{**found, "manifest": _manifest(found["manifest"])}, size=pixels.shape[:2])
        return await self._in_thread(finish, pixels, prediction, model, version, decoding)

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await anyio.to_thread.run_sync(call, *arguments, limiter=self._limiter, abandon_on_cancel=True)

    def _work_here(self, content: bytes, name: str, model: str, finish: Callable[..., Any], why: bool) -> Any:
        pixels, decoding = self._decode(content, name)
        entry = self.shelf.get(model)
        if why:
            prediction, reasons = entry.runtime.explain(pixels)
            finish = partial(finish, [asdict(reason) for reason in reasons])
        else:
            (prediction,) = entry.runtime.predict([pixels])
        return finish(pixels, prediction, model, entry.version, decoding)

    def _decode(self, content: bytes, name: str) -> tuple[NDArray[np.uint8], float]:
        """Pixels, and the milliseconds that it took."""
        started = time.perf_counter()
        try:
            pixels = read_image(io.BytesIO(content), settings.max_pixels)
        except ImageTooLargeError as error:
            raise ProblemError(413, "image_too_large", f"{_shown(name)} is too large: {error.reason}.") from error
        except ImageError as error:
            raise ProblemError(
                400, "image_unreadable", f"{_shown(name)} cannot be read as an image: {error.reason}."
            ) from error
        return pixels, 1000 * (time.perf_counter() - started)

    def _describe_why(self, reasons: list[dict[str, Any]], *about: Any) -> Explanation:
        answer = self._describe(*about, counted=False)
        return Explanation(**answer.model_dump(), reasons=[_found_reason(reason) for reason in reasons])

    def _describe(
        self,
        pixels: NDArray[np.uint8],
        prediction: Prediction,
        model: str,
        version: str,
        decoding: float,
        *,
        heatmap: bool = False,
        counted: bool = True,
    ) -> Answer:
        """Make an answer; ``counted`` is False for an image that is explained, which was counted when it was scored."""
        started = time.perf_counter()
        answer = describe_prediction(prediction, model, version)
        if heatmap:
            answer.heatmap = as_base64(as_png(PatchcoreRuntime.heatmap(pixels, prediction)))
        times = {"decode": decoding, **prediction.milliseconds, "answer": 1000 * (time.perf_counter() - started)}
        answer.milliseconds = {stage: round(spent, 2) for stage, spent in times.items()}
        for stage, spent in times.items():
            self.metrics.stages.labels(stage=stage).observe(spent / 1000)
        span = trace.get_current_span()  # the request's, by BentoML
        if span.is_recording():
            span.set_attributes({f"patchcore.{stage}_ms": spent for stage, spent in answer.milliseconds.items()})
            span.set_attributes({"patchcore.model": model, "patchcore.version": version, "patchcore.score": answer.score})
        if not counted:
            return answer
        if answer.normalized_score is not None:
            self.metrics.scores.labels(model=model).observe(answer.normalized_score)
        self.watch.feed(model, version, prediction)
        self.metrics.verdicts.labels(model=model, verdict=answer.verdict or "none").inc()
        return answer


def _found_reason(reason: dict[str, Any]) -> FoundReason:
    """A reason, as a dictionary, with its pictures as the answer has them."""

    def picture(crop: NDArray[np.uint8] | None) -> str | None:
        return None if crop is None else as_base64(as_png(Image.fromarray(crop)))

    nearest = {**reason["nearest"], "crop": picture(reason["nearest"]["crop"])}
    return FoundReason.model_validate({**reason, "nearest": nearest, "crop": picture(reason["crop"])})


def _taken_apart(prediction: Prediction, manifest: str, version: str) -> dict[str, Any]:
    """A prediction without its size, as it goes from process to process."""
    fields = ("score", "patch_distances", "milliseconds")
    return {**{name: getattr(prediction, name) for name in fields}, "manifest": manifest, "version": version}


@lru_cache(maxsize=64)
def _manifest(text: str) -> Manifest:
    return Manifest.model_validate_json(text)


def _shown(name: str) -> str:
    """A file's name as a sentence may show it."""
    return repr(name[:80])
