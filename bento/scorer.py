"""Scoring: in this process, or in another one (see :mod:`.runner`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from patchcore_plugin.images import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from patchcore_plugin.runtime import PatchcoreRuntime, Prediction
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

    def score(self, model: str, images: Sequence[NDArray]) -> list[Scored | ImageError]:
        """Score images.

        Args:
            model: Name of the model.
            images: Images of any sizes, as :func:`patchcore_plugin.images.decode_image` gives them.

        Returns:
            For each image its result, or the error for which the model cannot read it: its depth, or a value that is NaN.

        Raises:
            BundleError: If the model cannot be loaded.
            ProblemError: If the process that scores does not answer.
        """

    def explain(self, model: str, images: Sequence[NDArray]) -> list[Scored | ImageError]:
        """Score images, and give the reasons too: the normal patches that the anomalous ones are nearest to.

        Arguments, results and errors are those of :meth:`score`.
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

    def score(self, model: str, images: Sequence[NDArray]) -> list[Scored | ImageError]:
        """Score images, as :meth:`Scorer.score` says."""
        runtime = self._repository.get(model)
        return [
            outcome.error or Scored(outcome.prediction, model, runtime.version)
            for outcome in runtime.stream_outcomes(images)
        ]

    def explain(self, model: str, images: Sequence[NDArray]) -> list[Scored | ImageError]:
        """Explain images, as :meth:`Scorer.explain` says."""
        runtime = self._repository.get(model)
        return [_explained(runtime, model, image) for image in images]

    def is_ready(self) -> bool:
        """Load the model for requests that name none; False if it cannot be loaded."""
        return self._repository.preload()


def _explained(runtime: PatchcoreRuntime, model: str, image: NDArray) -> Scored | ImageError:
    try:
        prediction, reasons = runtime.explain(image)
    except ImageError as error:
        return error
    return Scored(prediction, model, runtime.version, tuple(reasons))
