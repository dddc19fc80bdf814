"""From an image file to its answer: decode, score, describe."""

from __future__ import annotations

import asyncio
import io
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from opentelemetry import trace

from patchcore_plugin.bundle import BundleError, read_manifest_and_version
from patchcore_plugin.image_checks import count_pixels
from patchcore_plugin.images import ImageError, ImageTooLargeError, decode_image
from patchcore_plugin.runtime import PatchcoreRuntime
from patchcore_plugin.webhook import is_told, make_event

from .drift import DriftMonitors
from .encoding import to_base64_png, to_gray16, to_png
from .places import Places
from .problems import ProblemError
from .schemas import BatchAnswer, BatchItem, Explanation, ImageAnswer, ImageScore, ModelList, ModelSummary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.webhook import Webhook

    from .metrics import Metrics
    from .record import AnswerRecord
    from .repository import ModelRepository
    from .scorer import Scored, Scorer

Result = TypeVar("Result")

SMALL_IMAGE_PIXELS, LARGE_IMAGE_PIXELS = 4_000_000, 25_000_000
"""Limits of the classes of images that do not wait for each other. Images above the second are worked on one by one."""


@dataclass(frozen=True)
class ImageFile:
    """An image file as it was sent.

    Attributes:
        name: Name of the file, for messages.
        content: Its bytes.
        request_id: Id of the request that sent it.
    """

    name: str
    content: bytes
    request_id: str = ""


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    Attributes:
        name: Name of the file, for messages.
        pixels: RGB image (H, W, 3), u8; for an image deeper than 8 bits its values (H, W) or (H, W, 3), which the model
            scales or refuses.
        milliseconds: Time that decoding took.
    """

    name: str
    pixels: NDArray
    milliseconds: float


class Pipeline:
    """Answers for image files: decodes, scores and describes them in worker threads.

    Production is what /predict, /predict_batch and /heatmap answer: those images count in the metrics of scores and verdicts
    and in the drift monitors. An explained image does not count: it was scored before, and would count twice.

    Args:
        repository: The models.
        scorer: The scorer of this process or of the runner's.
        metrics: Metrics to count in.
        max_pixels: Most pixels of an image.
        max_images: Most images of a request.
        max_batch_pixels: Most pixels of all images of a request.
        parallel: Most images of up to :data:`SMALL_IMAGE_PIXELS` pixels that are worked on at once.
        parallel_large: Most images of up to :data:`LARGE_IMAGE_PIXELS` beside them; and beside those one larger one.
        webhook: Webhook that is told of images of production.
        record: The record of answers of production; None keeps none.
    """

    def __init__(
        self,
        repository: ModelRepository,
        scorer: Scorer,
        metrics: Metrics,
        *,
        max_pixels: int,
        max_images: int,
        max_batch_pixels: int,
        parallel: int,
        parallel_large: int,
        webhook: Webhook | None = None,
        record: AnswerRecord | None = None,
    ) -> None:
        self.metrics = metrics
        self.record = record
        self.parallel = parallel
        self._max_images, self._max_batch_pixels = max_images, max_batch_pixels
        self.drift, self._webhook = DriftMonitors(metrics), webhook
        self._repository, self._scorer, self._max_pixels = repository, scorer, max_pixels
        self._places = {
            SMALL_IMAGE_PIXELS: Places(parallel),
            LARGE_IMAGE_PIXELS: Places(parallel_large),
            math.inf: Places(1),
        }
        self._ready = False

    def is_ready(self) -> bool:
        """Whether the pipeline can answer. Once it can, it stays so."""
        self._ready = self._ready or self._scorer.is_ready()
        return self._ready

    def resolve(self, model: str | None) -> str:
        """The name of the model that a request asks for.

        Raises:
            UnknownModelError: If there is no such model.
        """
        return self._repository.resolve(model)

    async def predict(self, file: ImageFile, model: str | None, *, heatmap: bool = False) -> ImageAnswer:
        """Score an image file.

        Args:
            file: The file.
            model: Name of the model; None takes the default.
            heatmap: Answer the heatmap too.

        Raises:
            ProblemError: If the file is no image, or too large an image, if the process that scores does not answer, or if
                all places are taken by images of requests that have ended.
            UnknownModelError: If there is no such model.
            BundleError: If the model cannot be loaded.
        """
        return await self._work(self._predict, file, self.resolve(model), heatmap)

    async def predict_batch(self, files: Sequence[ImageFile], model: str, request_id: str) -> BatchAnswer:
        """Score several image files. One that cannot be read does not spoil the others.

        Args:
            files: The files.
            model: Name of the model, from :meth:`accept_batch`.
            request_id: Id of the request, which the problems of single images have too.

        Raises:
            UnknownModelError: If the model is gone.
            BundleError: If the model cannot be loaded.
        """
        turns = asyncio.Semaphore(self.parallel)  # images of other requests come in between

        async def answer(file: ImageFile) -> BatchItem:
            try:
                async with turns:
                    return BatchItem(name=file.name, answer=await self.predict(file, model))
            except ProblemError as error:
                self.metrics.problems.labels(code=error.code).inc()
                return BatchItem(name=file.name, problem=error.describe(request_id))

        results = await asyncio.gather(*map(answer, files))
        self.metrics.images.observe(len(files))
        return BatchAnswer(results=results)

    def accept_batch(self, files: Sequence[ImageFile], model: str | None) -> str:
        """Check a batch, by what the heads of its images state.

        Args:
            files: The files.
            model: Name of the model; None takes the default.

        Returns:
            Name of the model.

        Raises:
            ProblemError: If there are no images, too many, or too many pixels together.
            UnknownModelError: If there is no such model.
        """
        if not files:
            raise ProblemError("image_missing", "The call has no images.")
        if len(files) > self._max_images:
            detail = f"There are {len(files)} images; a call may have {self._max_images}: send them in several."
            raise ProblemError("batch_too_large", detail)
        pixels = sum(map(_stated_pixels, files))
        if pixels > self._max_batch_pixels:
            detail = (
                f"The {len(files)} images have {pixels:,} pixels together, and those of a request may have "
                f"{self._max_batch_pixels:,}: send them in several requests."
            )
            raise ProblemError("batch_too_large", detail)
        return self.resolve(model)

    async def draw(self, file: ImageFile, model: str | None, kind: Literal["overlay", "map"]) -> tuple[bytes, ImageAnswer]:
        """Draw the heatmap of an image file as PNG; returns the answer too. Errors are those of :meth:`predict`."""
        return await self._work(self._draw, file, self.resolve(model), kind)

    async def explain(self, file: ImageFile, model: str | None) -> Explanation:
        """Score an image file and give the reasons; errors are those of :meth:`predict`."""
        return await self._work(self._explain, file, self.resolve(model))

    def close(self) -> None:
        """Write what the record has not written yet."""
        if self.record is not None:
            self.record.close()

    def models(self) -> ModelList:
        """All models that requests may name."""
        loaded = self._repository.loaded()
        models = [_summary(name, path, loaded.get(name)) for name, path in self._repository.folders().items()]
        only = models[0].name if len(models) == 1 else None
        return ModelList(models=models, default=self._repository.default or only, record=self.record is not None)

    async def _work(self, call: Callable[..., Result], file: ImageFile, *arguments: Any) -> Result:
        """Call with an image file in a thread, when there is a place for an image of its size."""
        try:
            pixels = count_pixels(io.BytesIO(file.content))
        except ValueError as error:
            raise _unreadable(repr(file.name[:80]), str(error)) from error
        places = next(places for limit, places in self._places.items() if pixels <= limit)
        return await places.run(call, file, *arguments)

    def _predict(self, file: ImageFile, model: str, heatmap: bool) -> ImageAnswer:
        image = decode(file, self._max_pixels)
        scored = _accepted(image, self._scorer.score(model, [image.pixels]))
        answer = describe(image, scored, heatmap=heatmap)
        self._observe_times(answer)
        self._count(file, scored, answer)
        return answer

    def _draw(self, file: ImageFile, model: str, kind: Literal["overlay", "map"]) -> tuple[bytes, ImageAnswer]:
        image = decode(file, self._max_pixels)
        scored = _accepted(image, self._scorer.score(model, [image.pixels]))
        answer = describe(image, scored)
        self._observe_times(answer)
        self._count(file, scored, answer)
        if kind == "map":
            return to_png(to_gray16(scored.prediction.shown_map)), answer
        return to_png(PatchcoreRuntime.heatmap(image.pixels, scored.prediction)), answer

    def _explain(self, file: ImageFile, model: str) -> Explanation:
        image = decode(file, self._max_pixels)
        scored = _accepted(image, self._scorer.explain(model, [image.pixels]))
        answer = describe(image, scored)
        self._observe_times(answer)
        return Explanation(**dict(answer), reasons=list(scored.reasons))

    def _observe_times(self, answer: ImageAnswer) -> None:
        """Show the times of an answer in the metrics and in the request's trace."""
        for stage, spent in answer.milliseconds.items():
            self.metrics.stages.labels(stage=stage).observe(spent / 1000)
        span = trace.get_current_span()  # BentoML begins one for each request
        if span.is_recording():
            span.set_attributes({f"patchcore.{stage}_ms": spent for stage, spent in answer.milliseconds.items()})
            span.set_attributes(
                {"patchcore.model": answer.model, "patchcore.version": answer.version, "patchcore.score": answer.score}
            )

    def _count(self, file: ImageFile, scored: Scored, answer: ImageAnswer) -> None:
        """Count an image of production, record its answer, and tell the webhook of it."""
        if answer.normalized_score is not None:
            self.metrics.scores.labels(model=answer.model).observe(answer.normalized_score)
        self.metrics.verdicts.labels(model=answer.model, verdict=answer.verdict or "none").inc()
        self.drift.update(scored)
        if self.record is not None:
            answer.record = self.record.add(file.name, file.content, answer, file.request_id)
        if self._webhook is not None and is_told(answer.verdict):
            source = {"request_id": file.request_id, "file": file.name[:255]}
            self._webhook.tell(make_event(answer.model_dump(), source))


def _stated_pixels(file: ImageFile) -> int:
    with suppress(ValueError):  # it will have a problem of its own
        return count_pixels(io.BytesIO(file.content))
    return 0


def decode(file: ImageFile, max_pixels: int) -> DecodedImage:
    """Decode an image file.

    Raises:
        ProblemError: If the file is no image, or has more than ``max_pixels`` pixels.
    """
    started, name = time.perf_counter(), repr(file.name[:80])
    try:
        pixels = decode_image(io.BytesIO(file.content), max_pixels)
    except ImageTooLargeError as error:
        raise ProblemError("image_too_large", f"{name} is too large: {error.reason}.") from error
    except ImageError as error:
        raise _unreadable(name, error.reason) from error
    return DecodedImage(name, pixels, _milliseconds_since(started))


def _accepted(image: DecodedImage, results: list[Scored | ImageError]) -> Scored:
    """The result of one image; a ProblemError if the model cannot read it."""
    (result,) = results
    if isinstance(result, ImageError):
        raise _unreadable(image.name, result.reason)
    return result


def _unreadable(name: str, reason: str) -> ProblemError:
    return ProblemError("image_unreadable", f"{name} cannot be read as an image: {reason}.")


def describe(image: DecodedImage, scored: Scored, *, heatmap: bool = False) -> ImageAnswer:
    """Describe a scored image.

    Args:
        image: The image.
        scored: Its result.
        heatmap: Draw the heatmap too.
    """
    started, prediction = time.perf_counter(), scored.prediction
    score = ImageScore.model_validate(prediction)
    picture = to_base64_png(PatchcoreRuntime.heatmap(image.pixels, prediction)) if heatmap else None
    times = {"decode": image.milliseconds, **prediction.milliseconds, "answer": _milliseconds_since(started)}
    return ImageAnswer(
        **dict(score),
        milliseconds={stage: round(spent, 2) for stage, spent in times.items()},
        model=scored.model,
        version=scored.version,
        heatmap=picture,
    )


def _summary(name: str, path: Path, runtime: PatchcoreRuntime | None) -> ModelSummary:
    """The summary of the version in memory, which answers, or of the bundle; and what is wrong with the bundle."""
    found = problem = None
    try:
        found = read_manifest_and_version(path)
    except BundleError as error:
        problem = str(error).replace(str(path), name)
    if runtime is not None:
        found = runtime.manifest, runtime.version
    if found is None:
        return ModelSummary(name=name, loaded=False, problem=problem)
    device = None if runtime is None else runtime.device
    return ModelSummary.of(name, device=device, manifest=found[0], version=found[1], problem=problem)


def _milliseconds_since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)
