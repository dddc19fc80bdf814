"""The serving runtime: a bundle, OpenVINO and FAISS; no torch."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from typing import TYPE_CHECKING, BinaryIO, Literal

import faiss
import numpy as np

from patchcore_plugin.bundle import BANK, FEATURES, MANIFEST, BundleError, Manifest, origins, read_manifest, verify
from patchcore_plugin.cpu import cores
from patchcore_plugin.images import read_image
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.runtime.explain import Reason, explain
from patchcore_plugin.runtime.heatmap import overlay
from patchcore_plugin.runtime.network import Network, Request
from patchcore_plugin.runtime.prediction import Prediction
from patchcore_plugin.scoring import ScoreRule

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    Source = str | Path | BinaryIO | Image.Image | NDArray[np.uint8]


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
        rule: How patch distances become an image score.
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
        self.rule = ScoreRule.of(self.manifest)
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
        """Lay a prediction's map over its image; see :func:`patchcore_plugin.runtime.heatmap.overlay`.

        A model that was never validated has no scale; its map is then stretched from 0 to its own largest value.
        """
        return overlay(read_image(image), prediction.shown_map, prediction.manifest.preprocessing)

    def _answer(self, pixels: NDArray[np.uint8]) -> Prediction:
        return self._scored(pixels)[0]

    def _scored(self, pixels: NDArray[np.uint8]) -> tuple[Prediction, NDArray[np.float32]]:
        """The prediction, and the embedding (1, h, w, D) that it comes from."""
        started = time.perf_counter()
        embedding = self.embed([pixels])
        embedded = time.perf_counter()
        scores = self.bank.score(embedding, self.rule)
        searched = time.perf_counter()
        times = {"network": 1000 * (embedded - started), "search": 1000 * (searched - embedded)}
        return Prediction.of(scores, 0, pixels.shape[:2], self.manifest, **times), embedding


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
