"""The serving runtime: a bundle, OpenVINO and FAISS; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
import openvino as ov

from patchcore_plugin.bundle import BANK, FEATURES, WEIGHTS, BundleError, Manifest, Scale, read_manifest, verify
from patchcore_plugin.images import overlay, read_image, resize
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.scoring import anomaly_map, normalize

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from PIL import Image

# anomalib's adaptive threshold is itself the score of a validation image. That image must not change sides because
# another runtime rounds its score differently, so only a score beyond rounding lies above the threshold.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Prediction:
    """Answer for one image.

    Attributes:
        score: Raw image score: a distance in feature units, larger is more anomalous.
        normalized_score: Score in [0, 1] with the threshold at 0.5; None if the model was never validated.
        threshold: Raw score above which an image is anomalous, sensitivity included; None without a threshold.
        verdict: ``"normal"`` or ``"anomalous"``; None without a threshold.
        anomaly_map: Raw map (H, W), float32, over the part of the image that the model saw, in feature units.
        normalized_map: The map in [0, 1] with the pixel threshold at 0.5; None if the model was never validated.
    """

    score: float
    normalized_score: float | None
    threshold: float | None
    verdict: Literal["normal", "anomalous"] | None
    anomaly_map: NDArray[np.float32]
    normalized_map: NDArray[np.float32] | None


class PatchcoreRuntime:
    """Scores images with a bundle on the CPU. Safe to call from several threads.

    Args:
        path: The bundle's folder.

    Attributes:
        manifest: What the bundle says of itself.

    Raises:
        BundleError: If the bundle is absent, damaged, or of another version; the message names the file.

    Example:
        >>> runtime = PatchcoreRuntime.load("bundle")
        >>> runtime.predict(["part.png"])[0].verdict
        'anomalous'
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.manifest: Manifest = read_manifest(path)
        verify(path, self.manifest)
        try:
            self.bank = MemoryBank.load(path / BANK)
        except ValueError as error:
            raise BundleError(str(error)) from error
        expected = (self.manifest.bank_size, self.manifest.embedding_dimension)
        if self.bank.vectors.shape != expected:
            msg = f"{path / BANK} holds vectors of shape {self.bank.vectors.shape}, the manifest says {expected}."
            raise BundleError(msg)
        core = ov.Core()
        try:
            network = core.read_model(path / FEATURES, path / WEIGHTS)
            # Without the hint, OpenVINO computes in bfloat16 where the CPU has it, and scores move with the machine.
            self._features = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:
            msg = f"{path / FEATURES} cannot be compiled by OpenVINO: {error}"
            raise BundleError(msg) from error
        shape = network.output(0).partial_shape
        if len(shape) != 4 or [str(size) for size in shape][1:] != [
            str(size) for size in (*self.manifest.grid, expected[1])
        ]:
            msg = f"{path / FEATURES} gives embeddings {shape}, the manifest says {(*self.manifest.grid, expected[1])}."
            raise BundleError(msg)

    @classmethod
    def load(cls, path: str | Path) -> PatchcoreRuntime:
        """Load the bundle at ``path``."""
        return cls(path)

    def predict(
        self,
        images: Iterable[str | Path | BinaryIO | Image.Image | NDArray[np.uint8]],
        batch_size: int = 8,
    ) -> list[Prediction]:
        """Score images of any size.

        Args:
            images: Paths, open binary files, PIL images, or u8 arrays (H, W), (H, W, 1) or (H, W, 3) in RGB.
            batch_size: Images that are decoded and go through the network together. The answers do not depend on it.

        Returns:
            One prediction per image, in order.

        Raises:
            FileNotFoundError: If a path leads nowhere.
            ImageError: If something is no image.
            TypeError: If ``images`` is a single image instead of a list of them.
            ValueError: If ``batch_size`` is below 1.
        """
        if isinstance(images, str | Path | np.ndarray) or not hasattr(images, "__iter__") or hasattr(images, "read"):
            msg = f"predict takes a list of images, got one {type(images).__name__}: predict([image])."
            raise TypeError(msg)
        if batch_size < 1:
            msg = f"batch_size must be at least 1, got {batch_size}."
            raise ValueError(msg)
        predictions: list[Prediction] = []
        sources = iter(images)
        while batch := [read_image(image) for image in islice(sources, batch_size)]:
            # One search per image: the same products whatever the batch, so the same answer to the last digit.
            predictions += [self._answer(embedding[None]) for embedding in self.embed(batch)]
        return predictions

    def embed(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Patch embeddings (B, h, w, D) of RGB images (H, W, 3), u8, of any sizes."""
        size = self.manifest.preprocessing.resize
        return self._features.infer_new_request([np.stack([resize(image, size) for image in images])])[0]

    def heatmap(self, image: str | Path | BinaryIO | Image.Image | NDArray[np.uint8], prediction: Prediction) -> Image.Image:
        """Lay a prediction's map over its image; see :func:`patchcore_plugin.images.overlay`.

        A model that was never validated has no scale; its map is then stretched from 0 to its own largest value.
        """
        if prediction.normalized_map is None:
            values = prediction.anomaly_map / max(float(prediction.anomaly_map.max()), 1e-12)
        else:  # anomalib moves the threshold in the map by the sensitivity; colours begin at 0.5
            values = prediction.normalized_map + self.manifest.pixel.sensitivity - 0.5
        return overlay(read_image(image), values, self.manifest.preprocessing)

    def _answer(self, embedding: NDArray[np.float32]) -> Prediction:
        scores = self.bank.score(embedding, self.manifest.num_neighbors)
        raw_map = anomaly_map(scores.patch, self.manifest.preprocessing.size)[0]
        image = self.manifest.image
        normalized = _normalize(scores.image, image)
        threshold = _raw_threshold(image)
        verdict = None
        if threshold is not None:
            anomalous = float(scores.image[0]) > threshold * (1 + _ROUNDING)
            if normalized is not None:  # as anomalib: a sensitivity of 0 calls nothing anomalous
                anomalous = anomalous and float(normalized[0]) > 1 - image.sensitivity
            verdict = "anomalous" if anomalous else "normal"
        return Prediction(
            score=float(scores.image[0]),
            normalized_score=None if normalized is None else float(normalized[0]),
            threshold=threshold,
            verdict=verdict,
            anomaly_map=raw_map,
            normalized_map=_normalize(raw_map, self.manifest.pixel),
        )


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
