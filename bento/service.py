"""PatchCore over HTTP: a BentoML service on the OpenVINO + FAISS runtime.

The bundle to serve is the folder that the environment variable PATCHCORE_BUNDLE names, or else the newest model
``patchcore`` in BentoML's model store (``patchcore pack BUNDLE`` puts one there).
"""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Literal

import bentoml
from bentoml.exceptions import InvalidArgument, NotFound
from pydantic import BaseModel, Field

from patchcore_plugin.bundle import BundleError
from patchcore_plugin.images import ImageError, read_image
from patchcore_plugin.runtime import PatchcoreRuntime

BUNDLE_VARIABLE = "PATCHCORE_BUNDLE"
MODEL = "patchcore"  # in a bento: the alias of the model that was built in


class Size(BaseModel):
    """Size of the image as it was sent."""

    width: int = Field(description="pixels")
    height: int = Field(description="pixels")


class Answer(BaseModel):
    """What the service says of one image."""

    score: float = Field(description="Raw image score, a distance in feature units; larger is more anomalous.")
    normalized_score: float | None = Field(description="Score in [0, 1] with the threshold at 0.5; null if unvalidated.")
    verdict: Literal["normal", "anomalous"] | None = Field(description="null if the model has no threshold.")
    threshold: float | None = Field(description="Raw score above which an image is anomalous.")
    size: Size
    model: str = Field(description="Name of the model in the bundle's manifest.")
    heatmap: str | None = Field(
        default=None,
        description="On request: base64 PNG in the image's size; yellow from the pixel threshold on, red far above.",
    )


@bentoml.service(name="patchcore")
class PatchcoreService:
    """Scores images with the PatchCore model of one bundle."""

    def __init__(self) -> None:
        self.runtime = PatchcoreRuntime.load(_bundle())

    @bentoml.api(route="/predict")
    def predict(
        self,
        image: Path,
        heatmap: bool = False,
    ) -> Answer:
        """Score one image.

        Args:
            image: Image file (PNG, JPEG, BMP, TIFF, WebP), of any size, grey or colour.
            heatmap: Also answer the heatmap.
        """
        try:
            pixels = read_image(image)
        except ImageError as error:
            # the file's name is BentoML's temporary one and says nothing to the caller
            msg = f"The body's field 'image' cannot be read as an image: {error.__cause__}".replace(str(image), "it")
            raise InvalidArgument(msg) from error
        prediction = self.runtime.predict([pixels])[0]
        picture = None
        if heatmap:
            stream = io.BytesIO()
            self.runtime.heatmap(pixels, prediction).save(stream, "PNG")
            picture = base64.b64encode(stream.getvalue()).decode()
        return Answer(
            score=prediction.score,
            normalized_score=prediction.normalized_score,
            verdict=prediction.verdict,
            threshold=prediction.threshold,
            size=Size(width=pixels.shape[1], height=pixels.shape[0]),
            model=self.runtime.manifest.name,
            heatmap=picture,
        )


def _bundle() -> Path:
    """Folder of the bundle to serve."""
    folder = os.environ.get(BUNDLE_VARIABLE)
    if folder:
        return Path(folder)
    try:
        return Path(bentoml.models.get(MODEL).path)
    except NotFound as error:
        msg = (
            f"There is no model to serve. Set {BUNDLE_VARIABLE} to a bundle's folder, or put one into BentoML's model store "
            "with `patchcore pack BUNDLE`."
        )
        raise BundleError(msg) from error
