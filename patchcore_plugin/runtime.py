"""The serving runtime: a bundle, OpenVINO and FAISS; no torch."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from queue import LifoQueue
from typing import TYPE_CHECKING, BinaryIO, Literal

import faiss
import numpy as np

from patchcore_plugin import origins
from patchcore_plugin.bundle import BANK, FEATURES, MANIFEST, BundleError, Manifest, Scale, read_manifest, verify
from patchcore_plugin.conformal import p_value
from patchcore_plugin.drift import DriftMonitor
from patchcore_plugin.explain import Reason, explain
from patchcore_plugin.images import overlay, read_image
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.network import Network, Request, cores
from patchcore_plugin.regions import Region, find_regions
from patchcore_plugin.scoring import anomaly_map, map_mean, normalize

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    Source = str | Path | BinaryIO | Image.Image | NDArray[np.uint8]

# anomalib's adaptive threshold is itself the score of a validation image. That image must not change sides because
# another runtime rounds its score differently, so only a score beyond rounding lies above the threshold. A calibration score
# that differs by no more counts as a tie, for the same reason: verdict and p-value agree.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Prediction:
    """Answer for one image.

    Attributes:
        score: Raw image score: a distance in feature units, larger is more anomalous.
        normalized_score: Score in [0, 1] with the threshold at 0.5; None if the model was never validated.
        threshold: Raw score above which an image is anomalous, sensitivity included; None without a threshold.
        verdict: ``"normal"`` or ``"anomalous"``; None without a threshold.
        patch_distances: Distance (h, w) of each patch to its nearest bank vector, float32, in feature units.
        size: Height and width of the image, in pixels.
        manifest: That of the bundle which answered.
        milliseconds: Time of the stages ``"network"``, pre-processing included, and ``"search"``.
    """

    score: float
    normalized_score: float | None
    threshold: float | None
    verdict: Literal["normal", "anomalous"] | None
    patch_distances: NDArray[np.float32] = field(repr=False)
    size: tuple[int, int]
    manifest: Manifest = field(repr=False)
    milliseconds: dict[str, float] = field(repr=False)

    @cached_property
    def p_value(self) -> float | None:
        """How rare so large a score is among normal images, in (0, 1]; None where the bundle has no calibration.

        At most ``a`` for at most a share ``a`` of normal images; see :mod:`patchcore_plugin.conformal`. With n calibration
        images it cannot be less than 1 / (n + 1).
        """
        calibration = self.manifest.calibration
        return None if calibration is None else p_value(calibration.scores, self.score / (1 + _ROUNDING))

    @cached_property
    def mean_distance(self) -> float:
        """Mean of the anomaly map, in feature units: how far from the bank the image lies as a whole."""
        return float(map_mean(self.patch_distances[None], self.manifest.preprocessing.size)[0])

    @cached_property
    def anomaly_map(self) -> NDArray[np.float32]:
        """Raw map (H, W), float32, over the part of the image that the model saw, in feature units.

        The patch distances, upsampled and smoothed when first asked for.
        """
        return anomaly_map(self.patch_distances[None], self.manifest.preprocessing.size)[0]

    @cached_property
    def normalized_map(self) -> NDArray[np.float32] | None:
        """The map in [0, 1] with the pixel threshold at 0.5; None if the model was never validated."""
        return _normalize(self.anomaly_map, self.manifest.pixel)

    @cached_property
    def shown_map(self) -> NDArray[np.float32]:
        """The map in [0, 1]: normalised, or, where the model was never validated, stretched to its own largest value."""
        if self.normalized_map is not None:
            return self.normalized_map
        return self.anomaly_map / max(float(self.anomaly_map.max()), 1e-12)

    @cached_property
    def pixel_threshold(self) -> float | None:
        """Raw value of the map above which a pixel is anomalous, sensitivity included; None without one."""
        return _raw_threshold(self.manifest.pixel)

    @cached_property
    def regions(self) -> list[Region] | None:
        """Connected parts of the map above the pixel threshold, in pixels of the image; None without a threshold."""
        if self.pixel_threshold is None:
            return None
        recipe = self.manifest.preprocessing
        down, across = self.size[0] / recipe.resize[0], self.size[1] / recipe.resize[1]
        found = []
        for region in find_regions(self.anomaly_map, self.pixel_threshold):
            top, left = region.top + recipe.offset[0], region.left + recipe.offset[1]
            edges = left * across, top * down, (left + region.width) * across, (top + region.height) * down
            first, upper, last, lower = (round(edge) for edge in edges)
            area = max(1, round(region.area * down * across))
            found.append(Region(first, upper, max(1, last - first), max(1, lower - upper), area, region.peak))
        return found


class PatchcoreRuntime:
    """Scores images with a bundle on the CPU. Safe to call from several threads.

    Args:
        path: The bundle's folder.
        mode: ``"latency"`` works on one image with all threads, and decodes the next one meanwhile; ``"throughput"`` on
            as many images at once as there are threads, each with one.
        threads: How many; all cores by default.
        cache: Folder in which compiled networks are kept for the next start; several bundles may share it. True is the
            folder ``<bundle>.cache`` next to the bundle, False none. Where it cannot be written, the network is compiled
            every time. It may be deleted at any time. Its files are trusted: nobody else should be able to write there.

    Attributes:
        path: The bundle's folder.
        manifest: What the bundle says of itself.
        drift: Watches whether the images that are scored still look as the calibration's; None without a calibration.
        origins: Where the bank's vectors come from; None where the bundle does not say.

    Raises:
        BundleError: If the bundle is absent, damaged, or of another version; the message names the file.
        ValueError: If another argument is out of range.

    Example:
        >>> runtime = PatchcoreRuntime.load("bundle")
        >>> runtime.predict(["part.png"])[0].verdict
        'anomalous'
    """

    def __init__(
        self,
        path: str | Path,
        mode: Literal["latency", "throughput"] = "latency",
        threads: int | None = None,
        cache: str | Path | bool = True,
    ) -> None:
        if mode not in ("latency", "throughput"):
            msg = f"mode must be 'latency' or 'throughput', got {mode!r}."
            raise ValueError(msg)
        if threads is not None and threads < 1:
            msg = f"threads must be at least 1, got {threads}."
            raise ValueError(msg)
        path = self.path = Path(path)
        self.manifest: Manifest = read_manifest(path)
        verify(path, self.manifest)
        calibration = self.manifest.calibration
        self.drift = None if calibration is None else DriftMonitor(calibration)
        self.bank = _load_bank(path, self.manifest)
        self.mode, self.threads = mode, threads or cores()
        if isinstance(cache, bool):
            path_of_cache = path.resolve()
            cache = path_of_cache.with_name(f"{path_of_cache.name}.cache") if cache else None
        network = _load_network(path, self.manifest, mode, self.threads, cache and Path(cache))
        self.origins = origins.read(path, self.manifest)
        self._workers = 1 if mode == "latency" else self.threads
        self.bank.threads = self.threads if mode == "latency" else None
        self._requests: LifoQueue[Request] = LifoQueue()
        for _ in range(self._workers):
            self._requests.put(network.request())
        # In mode throughput an image keeps to its thread, in FAISS too.
        self._pool = ThreadPoolExecutor(self._workers, "patchcore", initializer=faiss.omp_set_num_threads, initargs=(1,))

    @classmethod
    def load(cls, path: str | Path, **options: object) -> PatchcoreRuntime:
        """Load the bundle at ``path``; options are those of the class."""
        return cls(path, **options)

    def predict(self, images: Iterable[Source]) -> list[Prediction]:
        """Score images of any size.

        Args:
            images: Paths, open binary files, PIL images, or u8 arrays (H, W), (H, W, 1) or (H, W, 3) in RGB. An answer
                does not depend on the other images.

        Returns:
            One prediction per image, in order.

        Raises:
            FileNotFoundError: If a path leads nowhere.
            ImageError: If something is no image.
            TypeError: If ``images`` is a single image instead of a list of them.
        """
        return list(self.stream(images))

    def stream(self, images: Iterable[Source]) -> Iterator[Prediction]:
        """Score images one after the other, as :meth:`predict` does; few of them are held at a time."""
        if isinstance(images, str | Path | np.ndarray) or not hasattr(images, "__iter__") or hasattr(images, "read"):
            msg = f"predict takes a list of images, got one {type(images).__name__}: predict([image])."
            raise TypeError(msg)
        return self._stream(iter(images))

    def _stream(self, images: Iterator[Source]) -> Iterator[Prediction]:
        if self.mode == "latency":
            yield from self._one_by_one(images)
            return
        pending = deque()
        try:
            for image in images:
                pending.append(self._pool.submit(lambda image=image: self._answer(read_image(image))))
                if len(pending) > self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _one_by_one(self, images: Iterator[Source]) -> Iterator[Prediction]:
        """Answer one image with all threads, while the pool's one decodes the next."""
        nothing = object()
        image = next(images, nothing)
        pixels = None if image is nothing else read_image(image)
        while pixels is not None:
            image = next(images, nothing)
            # what is decoded already does not wait for another caller's files
            ahead = None if image is nothing or isinstance(image, np.ndarray) else self._pool.submit(read_image, image)
            yield self._answer(pixels)
            if image is nothing:
                return
            pixels = read_image(image) if ahead is None else ahead.result()

    def embed(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Patch embeddings (B, h, w, D) of RGB images (H, W, 3), u8, of any sizes."""
        request = self._requests.get()
        try:
            return np.concatenate([request.embed(image) for image in images])
        finally:
            self._requests.put(request)

    def explain(self, image: Source) -> tuple[Prediction, list[Reason]]:
        """Score an image, and name the normal patches that its anomalous ones are nearest to.

        It does not count for :attr:`drift`: production's image was scored by :meth:`predict`.

        Args:
            image: As one of those of :meth:`predict`.

        Returns:
            The prediction, and a reason for each of its regions, the highest peak first, 16 at most; where there is no
            region, one for the most anomalous patch.
        """
        pixels = read_image(image)
        prediction, embedding = self._scored(pixels)
        return prediction, explain(prediction, pixels, embedding[0], self.bank, self.origins)

    @staticmethod
    def heatmap(image: Source, prediction: Prediction) -> Image.Image:
        """Lay a prediction's map over its image; see :func:`patchcore_plugin.images.overlay`.

        A model that was never validated has no scale; its map is then stretched from 0 to its own largest value.
        """
        values = prediction.shown_map
        if prediction.normalized_map is not None:
            # anomalib moves the threshold in the map by the sensitivity; colours begin at 0.5
            values = values + prediction.manifest.pixel.sensitivity - 0.5
        return overlay(read_image(image), values, prediction.manifest.preprocessing)

    def _answer(self, pixels: NDArray[np.uint8]) -> Prediction:
        prediction, _ = self._scored(pixels)
        if self.drift is not None:
            self.drift.update(prediction.score, prediction.mean_distance)
        return prediction

    def _scored(self, pixels: NDArray[np.uint8]) -> tuple[Prediction, NDArray[np.float32]]:
        """The prediction, and the embedding (1, h, w, D) that it comes from."""
        started = time.perf_counter()
        embedding = self.embed([pixels])
        embedded = time.perf_counter()
        scores = self.bank.score(embedding, self.manifest.num_neighbors, self.manifest.score_smoothing)
        searched = time.perf_counter()
        image = self.manifest.image
        normalized = _normalize(scores.image, image)
        threshold = _raw_threshold(image)
        verdict = None
        if threshold is not None:
            anomalous = float(scores.image[0]) > threshold * (1 + _ROUNDING)
            if normalized is not None:  # as anomalib: a sensitivity of 0 calls nothing anomalous
                anomalous = anomalous and float(normalized[0]) > 1 - image.sensitivity
            verdict = "anomalous" if anomalous else "normal"
        prediction = Prediction(
            score=float(scores.image[0]),
            normalized_score=None if normalized is None else float(normalized[0]),
            threshold=threshold,
            verdict=verdict,
            patch_distances=scores.patch[0],
            size=pixels.shape[:2],
            manifest=self.manifest,
            milliseconds={"network": 1000 * (embedded - started), "search": 1000 * (searched - embedded)},
        )
        return prediction, embedding


def _load_bank(path: Path, manifest: Manifest) -> MemoryBank:
    try:
        bank = MemoryBank.load(path / BANK)
    except ValueError as error:
        raise BundleError(str(error)) from error
    found, expected = (len(bank), bank.dimension), (manifest.bank_size, manifest.embedding_dimension)
    if found != expected:
        msg = f"{path / BANK} holds vectors of shape {found}, the manifest says {expected}."
        raise BundleError(msg)
    if (bank.index, bank.storage) != (manifest.index.kind, manifest.index.storage):
        msg = f"{path / BANK} is a {bank.index} index of {bank.storage}, the manifest says {manifest.index}."
        raise BundleError(msg)
    try:
        if manifest.index.width:
            bank.width = manifest.index.width
    except ValueError as error:
        msg = f"{path / MANIFEST}: {error}"
        raise BundleError(msg) from error
    return bank


def _load_network(path: Path, manifest: Manifest, mode: str, threads: int, cache: Path | None) -> Network:
    try:
        network = Network(path / FEATURES, manifest.precision, mode, threads, cache)
    except RuntimeError as error:
        msg = f"{path / FEATURES} cannot be compiled by OpenVINO: {error}"
        raise BundleError(msg) from error
    expected = (*manifest.grid, manifest.embedding_dimension)
    if network.shape != expected:
        msg = f"{path / FEATURES} gives embeddings of shape {network.shape}, the manifest says {expected}."
        raise BundleError(msg)
    return network


def _normalize(values: NDArray[np.float32], scale: Scale) -> NDArray[np.float32] | None:
    if scale.minimum is None or scale.maximum is None:
        return None
    middle = (scale.minimum + scale.maximum) / 2
    return normalize(values, middle if scale.threshold is None else scale.threshold, scale.minimum, scale.maximum)


def _raw_threshold(scale: Scale) -> float | None:
    """Threshold in raw units with the sensitivity, which anomalib applies after normalisation, taken into account."""
    if scale.threshold is None or scale.minimum is None or scale.maximum is None:
        return scale.threshold
    return scale.threshold + (0.5 - scale.sensitivity) * (scale.maximum - scale.minimum)
