"""Scoring: in this process, or in another one (see :mod:`.runner`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from patchcore_plugin.runtime import Prediction
    from patchcore_plugin.runtime.explain import Reason

    from .repository import ModelRepository


@dataclass(frozen=True)
class Scored:
    """What a model found in one image.

    Attributes:
        prediction: The runtime's prediction.
        model: Name of the model in requests.
        version: Version of the model.
        reasons: The runtime's reasons; empty unless the image was explained.
    """

    prediction: Prediction
    model: str
    version: str
    reasons: tuple[Reason, ...] = ()


class Scorer(Protocol):
    """Scores images with the models of a repository. Safe to call from several threads."""

    def score(self, model: str, images: Sequence[NDArray[np.uint8]]) -> list[Scored]:
        """Score images.

        Args:
            model: Name of the model.
            images: RGB images (H, W, 3), u8, of any sizes.

        Raises:
            BundleError: If the model cannot be loaded.
            ProblemError: If the process that scores does not answer.
        """

    def explain(self, model: str, images: Sequence[NDArray[np.uint8]]) -> list[Scored]:
        """Score images, and give the reasons too: the normal patches that the anomalous ones are nearest to.

        Arguments and errors are those of :meth:`score`.
        """

    def is_ready(self) -> bool:
        """Whether the first image would be scored without a wait."""


class LocalScorer:
    """Scores in this process.

    Args:
        repository: The models.
    """

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    def score(self, model: str, images: Sequence[NDArray[np.uint8]]) -> list[Scored]:
        """Score images, as :meth:`Scorer.score` says."""
        runtime = self._repository.get(model)
        return [Scored(prediction, model, runtime.version) for prediction in runtime.predict(images)]

    def explain(self, model: str, images: Sequence[NDArray[np.uint8]]) -> list[Scored]:
        """Explain images, as :meth:`Scorer.explain` says."""
        runtime = self._repository.get(model)
        explained = [runtime.explain(image) for image in images]
        return [Scored(prediction, model, runtime.version, tuple(reasons)) for prediction, reasons in explained]

    def is_ready(self) -> bool:
        """Load the model for requests that name none; False if it cannot be loaded."""
        return self._repository.preload()
