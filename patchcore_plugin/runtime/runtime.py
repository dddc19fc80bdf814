"""The serving runtime: a bundle, OpenVINO and FAISS, without torch."""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import TYPE_CHECKING, Literal, get_args

import faiss
import numpy as np
from PIL import Image

from patchcore_plugin.bundle import BANKS, FEATURES, MANIFEST, WEIGHTS, BundleError, read_bundle
from patchcore_plugin.bundle.origins import read_origins
from patchcore_plugin.checks import check_number
from patchcore_plugin.cpu import cores
from patchcore_plugin.depth import to_pixels
from patchcore_plugin.errors import PatchcoreError, UsageError
from patchcore_plugin.images import ImageError, decode_image, read_image
from patchcore_plugin.memory_bank import Defects, EnsembleBank, MemoryBank, join_banks, read_defects
from patchcore_plugin.runtime import self_test
from patchcore_plugin.runtime.device import CPU, check_device
from patchcore_plugin.runtime.explain import Reason, explain
from patchcore_plugin.runtime.heatmap import overlay
from patchcore_plugin.runtime.network import Embedder, Network, NetworkFiles
from patchcore_plugin.runtime.prediction import Outcome, Prediction
from patchcore_plugin.scoring import ScoreRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_plugin.bundle import BundleContent, Member
    from patchcore_plugin.cpu import Mode
    from patchcore_plugin.images import Source

RuntimeMode = Literal["latency", "throughput", "auto"]

_TWICE_COMPILED_LIMIT = 64 << 20  # bytes of a network's weights, up to which mode auto keeps two networks in memory


class OtherProcessError(PatchcoreError, RuntimeError):
    """A runtime is used in a process that was forked from the one that loaded it."""


class PatchcoreRuntime:
    """Scores images with a bundle. Several threads may share a runtime.

    Processes may not share it: threads do not survive a fork. A forked process (``multiprocessing`` with ``fork``,
    ``gunicorn --preload``, celery, workers of a data loader) loads a runtime of its own, even if its parent has one. Fork
    while no other thread scores: a lock that it holds inside of OpenVINO or FAISS would stay locked.

    Args:
        path: Folder of the bundle.
        mode: ``"latency"`` scores one image at a time with all threads, and decodes the next image meanwhile;
            ``"throughput"`` scores as many images at once as there are threads, each with one thread. ``"auto"`` scores an
            image with all threads where it is alone, and with one where others are scored too, or were just before. It
            keeps a network for each; with other devices than the CPU, or weights of more than 64 MiB, it is ``"latency"``.
        threads: Number of threads; all cores by default.
        cache: Folder that keeps compiled networks for the next start; several bundles may share it. True is the folder
            ``<bundle>.cache`` beside the bundle, False keeps nothing. Where the folder cannot be written, the network is
            compiled at every start. The folder may be deleted at any time. Its files are trusted, so a folder that others
            own or can write is not used; see :mod:`patchcore_plugin.runtime.network_cache`.
        device: Device that computes the network; see :func:`patchcore_plugin.runtime.device.check_device`. All else is
            computed on the CPU. On any other device, the bundle's self-test must give the scores of its manifest.

    Attributes:
        path: Folder of the bundle.
        manifest: Manifest of the bundle.
        version: Version of the bundle: the first 12 digits of the manifest's sha256.
        states: State of each file of the bundle when it was read; see :func:`patchcore_plugin.bundle.file_states`.
        rule: How patch distances become an image score.
        intensity_range: Values that become 0 and 255 when an image is read; None for 8-bit images.
        bank: Memory bank of the bundle; of an ensemble, the banks of its members.
        defects: Known defects of the bundle, which raise the scores of what resembles them; None without any.
        origins: Where the bank's vectors come from; None where the bundle does not say.
        mode: Mode of work: of auto, what it is here.
        threads: Number of threads.
        device: The device that computes the network: of AUTO, the one that OpenVINO chose.
        arithmetic: What it computes in: the manifest's precision, or another one where the device lacks that.

    Raises:
        BundleError: If the bundle is missing, damaged, or of another format, and the message names the file; or if the
            device gives other scores than those of the self-test.
        UsageError: If another argument is out of range.

    Example:
        >>> runtime = PatchcoreRuntime.load("bundle")
        >>> runtime.predict(["part.png"])[0].verdict
        'anomalous'
    """

    def __init__(
        self,
        path: str | Path,
        mode: RuntimeMode = "latency",
        threads: int | None = None,
        cache: str | Path | bool = True,
        device: str = CPU,
    ) -> None:
        if mode not in get_args(RuntimeMode):
            msg = f"mode must be 'latency', 'throughput' or 'auto', got {mode!r}."
            raise UsageError(msg)
        if threads is not None:
            check_number("threads", threads, 1, whole=True)
        check_device(device)
        path = self.path = Path(path)
        bundle = read_bundle(path)
        self.manifest, self.version, self.states = bundle.manifest, bundle.version, bundle.states
        self._process = os.getpid()
        self.rule = ScoreRule.of(self.manifest)
        self.intensity_range = self.manifest.preprocessing.intensity_range
        self.mode, self.threads = mode, threads or cores()
        if mode == "auto" and (
            device != CPU or self.threads == 1 or len(bundle.files[WEIGHTS].data) > _TWICE_COMPILED_LIMIT
        ):
            self.mode = "latency"
        bank, defects = _load_bank(bundle), read_defects(bundle)
        self._ways, cache = [], _cache_folder(path, cache)
        for each in ("latency", "throughput") if self.mode == "auto" else (self.mode,):
            network = _load_network(bundle, each, self.threads, cache, device)
            self.device, self.arithmetic = network.device, network.arithmetic
            self._ways.append(_Way(network, each, self.threads, bank, defects))
        self.bank, self.defects = self._ways[0].bank, self._ways[0].defects
        self.origins = read_origins(bundle)
        self._in_work, self._crowded_until, self._lock = 0, 0.0, Lock()
        self._workers = 1 if self.mode == "latency" else self.threads
        # in mode throughput an image keeps to its thread, in FAISS too
        self._pool = ThreadPoolExecutor(self._workers, "patchcore", initializer=faiss.omp_set_num_threads, initargs=(1,))
        if device != CPU:
            self._check_device(device if device == self.device else f"{device} ({self.device})")

    @classmethod
    def load(
        cls,
        path: str | Path,
        mode: RuntimeMode = "latency",
        threads: int | None = None,
        cache: str | Path | bool = True,
        device: str = CPU,
    ) -> Self:
        """Load a bundle. Arguments and errors are those of the class."""
        return cls(path, mode, threads, cache, device)

    def predict(self, images: Iterable[Source]) -> list[Prediction]:
        """Score images of any size.

        Args:
            images: Paths, open binary files, PIL images, or arrays (H, W), (H, W, 1) or (H, W, 3) in RGB: u8, or for a
                bundle with an intensity range any other type. The score of an image does not depend on the other images.

        Returns:
            One prediction for each image, in order.

        Raises:
            FileNotFoundError: If a file does not exist.
            ImageError: If an image cannot be read.
            OtherProcessError: If another process loaded the runtime.
            TypeError: If ``images`` is a single image instead of a list.
        """
        return list(self.stream(images))

    def stream(self, images: Iterable[Source]) -> Iterator[Prediction]:
        """Score images one after the other, as :meth:`predict` does, but hold only a few of them at a time.

        The first image that cannot be read ends the stream with its error; :meth:`stream_outcomes` goes on.
        """
        return (_prediction(outcome) for outcome in self.stream_outcomes(images))  # ends with an error, as map does not

    def stream_outcomes(self, images: Iterable[Source]) -> Iterator[Outcome]:
        """Score images one after the other, and go on after an image that cannot be read.

        Every image is decoded once, ahead of its turn. A few images are held at a time.

        Args:
            images: Images, as for :meth:`predict`.

        Returns:
            One outcome for each image, in order: pixels, embedding and prediction, or the error.

        Raises:
            TypeError: If ``images`` is a single image instead of a list.

        Example:
            >>> for path, outcome in zip(paths, runtime.stream_outcomes(paths)):
            ...     print(path, outcome.error or outcome.prediction.verdict)
        """
        one = str | Path | bytes | bytearray | memoryview | np.ndarray | Image.Image
        if isinstance(images, one) or hasattr(images, "read"):
            msg = f"predict takes a list of images, got one {type(images).__name__}: predict([image])."
            raise TypeError(msg)
        return self._stream(images, self._score)

    def stream_embeddings(self, images: Iterable[Source]) -> Iterator[Outcome]:
        """Embed images one after the other without scoring them: outcomes as of :meth:`stream_outcomes`, no prediction."""
        return self._stream(images, self._embed)

    def _stream(self, images: Iterable[Source], work: Callable[[Outcome], Outcome]) -> Iterator[Outcome]:
        self._check_process()
        in_turn = self._one_by_one if self.mode == "latency" else self._side_by_side
        return in_turn(iter(images), work)

    def _one_by_one(self, images: Iterator[Source], work: Callable[[Outcome], Outcome]) -> Iterator[Outcome]:
        """Work on each image in this thread, while the pool's thread decodes the next one."""
        try:
            decoded = self._decode(next(images))
        except StopIteration:
            return
        for image in images:
            ahead = self._pool.submit(self._decode, image)
            yield work(decoded)
            # a job that can be cancelled waits behind another caller's images
            decoded = self._decode(image) if ahead.cancel() else ahead.result()
        yield work(decoded)

    def _side_by_side(self, images: Iterator[Source], work: Callable[[Outcome], Outcome]) -> Iterator[Outcome]:
        """Work on as many images at once as there are threads."""
        pending = deque()
        try:
            for image in images:
                pending.append(self._pool.submit(lambda image=image: work(self._decode(image))))
                if len(pending) > self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for job in pending:
                job.cancel()

    def embed(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Patch embeddings (B, h, w, D), float32, of RGB images (H, W, 3), u8, of any sizes."""
        self._check_process()
        with self._way() as way:
            return way.embed(images)

    @contextmanager
    def _way(self) -> Iterator[_Way]:
        """How to work on an image now: as one that is alone, or as one of several.

        An image that leaves others at work says that more are coming: for as long as it took, none counts as alone.
        """
        began = time.perf_counter()
        with self._lock:
            self._in_work += 1
            way = self._ways[0 if self._in_work == 1 and began > self._crowded_until else -1]
        try:
            yield way
        finally:
            ended = time.perf_counter()
            with self._lock:
                self._in_work -= 1
                if self._in_work:
                    self._crowded_until = ended + (ended - began)

    def _check_device(self, name: str) -> None:
        """Refuse a device that fails at the self-test, or gives other scores."""
        try:
            scores = self.self_test_scores()
        except (UsageError, RuntimeError) as error:  # the bank's, of embeddings that are NaN; and OpenVINO's
            msg = f"The device {name} is not used: it fails at the self-test: {error}"
            raise BundleError(msg) from error
        self_test.check_device_scores(self.manifest, scores, name)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            msg = (
                f"This runtime of {self.path} was loaded in another process ({self._process}), whose threads a fork does "
                f"not copy: call PatchcoreRuntime.load in this one ({os.getpid()}), or start it by spawn instead of fork."
            )
            raise OtherProcessError(msg)

    def self_test_scores(self) -> list[float]:
        """Raw image score of each picture of the self-test; see :mod:`patchcore_plugin.runtime.self_test`."""
        return [prediction.score for prediction in self.stream(self_test.pictures(self.intensity_range))]

    def explain(self, image: Source) -> tuple[Prediction, list[Reason]]:
        """Score an image, and find the normal patches that its anomalous patches are nearest to.

        Args:
            image: One image, as those of :meth:`predict`.

        Returns:
            The prediction, and a reason for each of its regions, the highest peak first, at most 16. Without a region, one
            reason for the farthest patch.

        Raises:
            FileNotFoundError: If the file does not exist.
            ImageError: If the image cannot be read.
        """
        pixels = read_image(image, intensity_range=self.intensity_range)
        if self.mode == "latency":
            return self._explain(pixels)
        self._check_process()
        return self._pool.submit(self._explain, pixels).result()  # on a thread of its own, as every other image

    def _explain(self, pixels: NDArray[np.uint8]) -> tuple[Prediction, list[Reason]]:
        outcome = self._score(Outcome(pixels))
        return outcome.prediction, explain(outcome, self.bank, self.origins)

    @staticmethod
    def heatmap(image: Source, prediction: Prediction) -> Image.Image:
        """Lay a prediction's map over its image; see :func:`patchcore_plugin.runtime.heatmap.overlay`."""
        recipe = prediction.manifest.preprocessing
        pixels = decode_image(image)
        if pixels.dtype != np.uint8:  # those of an outcome are ready
            pixels = to_pixels(pixels, recipe.intensity_range)
        return overlay(pixels, prediction.shown_map, recipe)

    def _decode(self, image: Source) -> Outcome:
        try:
            return Outcome(read_image(image, intensity_range=self.intensity_range))
        except (ImageError, OSError) as error:
            return Outcome(error=error)

    def _embed(self, decoded: Outcome) -> Outcome:
        """Add the embedding to a decoded image."""
        return decoded if decoded.error is not None else Outcome(decoded.pixels, self.embed([decoded.pixels])[0])

    def _score(self, decoded: Outcome) -> Outcome:
        """Add embedding and prediction to a decoded image."""
        if decoded.error is not None:
            return decoded
        self._check_process()
        with self._way() as way:
            started = time.perf_counter()
            embedding = way.embed([decoded.pixels])
            embedded = time.perf_counter()
            scores = way.bank.score(embedding, self.rule, way.defects)
            searched = time.perf_counter()
        times = {"network": 1000 * (embedded - started), "search": 1000 * (searched - embedded)}
        prediction = Prediction.of(scores, 0, decoded.pixels.shape[:2], self.manifest, **times)
        return Outcome(decoded.pixels, embedding[0], prediction)


class _Way:
    """A way to work on images: one at a time with all threads, or several at once with one thread each.

    Args:
        network: The network, compiled for the mode.
        mode: ``"latency"`` or ``"throughput"``.
        threads: Number of threads.
        bank: The memory bank.
        defects: The known defects; None without any.

    Attributes:
        bank: The memory bank, which searches on the mode's threads.
        defects: The known defects, which do so too.
    """

    def __init__(
        self, network: Network, mode: Mode, threads: int, bank: MemoryBank | EnsembleBank, defects: Defects | None
    ) -> None:
        self.bank = bank.on_threads(threads if mode == "latency" else None)
        self.defects = None if defects is None else defects.on_threads(self.bank.threads)
        self._embedders: LifoQueue[Embedder] = LifoQueue()
        for _ in range(1 if mode == "latency" else threads):
            self._embedders.put(network.embedder())

    def embed(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Patch embeddings (B, h, w, D) of images (H, W, 3), one after the other."""
        embedder = self._embedders.get()
        try:
            embeddings = [embedder.embed(image) for image in images]
        finally:
            self._embedders.put(embedder)
        return embeddings[0] if len(embeddings) == 1 else np.concatenate(embeddings)


def _prediction(outcome: Outcome) -> Prediction:
    if outcome.error is not None:
        raise outcome.error
    return outcome.prediction


def _cache_folder(path: Path, cache: str | Path | bool) -> Path | None:
    if not isinstance(cache, bool):
        return Path(cache)
    path = path.resolve()
    return path.with_name(f"{path.name}.cache") if cache else None


def _load_bank(bundle: BundleContent) -> MemoryBank | EnsembleBank:
    members = bundle.manifest.all_members
    banks = [_load_member(bundle, member, *names) for member, names in zip(members, BANKS, strict=False)]
    return join_banks(banks, [member.weight for member in members])


def _load_member(bundle: BundleContent, member: Member, bank_name: str, neighbors_name: str) -> MemoryBank:
    files, path = bundle.files, bundle.files[bank_name].path
    try:
        # Only files that the manifest lists are here. The bytes of the bank are given away, as the index copies them.
        bank = MemoryBank.from_content(files.pop(bank_name), files.get(neighbors_name), member.index.kind)
    except ValueError as error:
        raise BundleError(str(error)) from error
    found, expected = (len(bank), bank.dimension), (member.bank_size, member.embedding_dimension)
    if found != expected:
        msg = f"{path} holds vectors of shape {found}, the manifest says {expected}."
        raise BundleError(msg)
    if bank.storage != member.index.storage:
        msg = f"{path} holds vectors in {bank.storage}, the manifest says {member.index.storage}."
        raise BundleError(msg)
    try:
        if member.index.width:
            bank.width = member.index.width
    except ValueError as error:
        msg = f"{bundle.path / MANIFEST}: {error}"
        raise BundleError(msg) from error
    return bank


def _load_network(bundle: BundleContent, mode: Mode, threads: int, cache: Path | None, device: str) -> Network:
    files, manifest = NetworkFiles(bundle.files[FEATURES], bundle.files[WEIGHTS]), bundle.manifest
    try:
        network = Network(files, manifest.precision, mode, threads, cache, manifest.preprocessing, device)
    except BundleError:
        raise
    except Exception as error:  # OpenVINO raises nearly any on a file that is made to harm
        on = "" if device == CPU else f" for the device {device}"
        msg = f"{files.model.path} cannot be compiled by OpenVINO{on}: {error}"
        raise BundleError(msg) from error
    expected = (*manifest.grid, manifest.values)
    if network.shape != expected:
        msg = f"{files.model.path} gives embeddings of shape {network.shape}, the manifest says {expected}."
        raise BundleError(msg)
    return network
