"""What the service answers, as its OpenAPI document describes it."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from patchcore_plugin.runtime import Prediction

_MODEL = {"model": "elpv", "version": "3f2a9c01d4e5"}
_REGION = {"left": 96, "top": 40, "width": 61, "height": 148, "area": 5120, "peak": 47.3}
_ANSWER = {
    "score": 44.0,
    "normalized_score": 0.88,
    "p_value": 0.008,
    "verdict": "anomalous",
    "threshold": 30.2,
    "pixel_threshold": 28.9,
    "regions": [_REGION],
    "size": {"width": 300, "height": 300},
    "milliseconds": {"decode": 1.1, "network": 3.4, "search": 4.2, "answer": 0.6},
    **_MODEL,
    "heatmap": None,
}
_DRIFT = {
    "images": 1207,
    "evidence": 2_400_000.0,
    "threshold": 1_000_000.0,
    "drifted": True,
    "since": "2026-11-23T10:00:00Z",
    "what": "distances are larger",
    "score": 31.0,
    "normal_score": 29.6,
    "distance": 25.9,
    "normal_distance": 22.8,
}
_BOX = {"left": 112, "top": 104, "width": 8, "height": 8}
_NEAREST = {
    "vector": 217,
    "distance": 47.9,
    "image": "good/cell0017.png",
    "row": 12,
    "column": 14,
    "box": _BOX,
    "crop": None,
}


def _example(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class Size(BaseModel):
    """Size of an image as it was sent."""

    width: int = Field(description="pixels")
    height: int = Field(description="pixels")


class FoundRegion(BaseModel):
    """A connected part of the image above the pixel threshold."""

    model_config = _example(_REGION)
    left: int = Field(description="First column, in pixels of the image as it was sent.")
    top: int = Field(description="First row, in pixels of the image as it was sent.")
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    area: int = Field(description="Pixels above the threshold, of the image as it was sent.")
    peak: float = Field(description="Largest value of the anomaly map within, in feature units.")


class Answer(BaseModel):
    """What the service says of one image."""

    model_config = _example(_ANSWER)
    score: float = Field(description="Raw image score, a distance in feature units; larger is more anomalous.")
    normalized_score: float | None = Field(description="Score in [0, 1] with the threshold at 0.5; null if unvalidated.")
    p_value: float | None = Field(
        description="Share of normal images that score as high or higher, in (0, 1], by the calibration of the model; null "
        "if it has none."
    )
    verdict: Literal["normal", "anomalous"] | None = Field(description="null if the model has no threshold.")
    threshold: float | None = Field(description="Raw score above which an image is anomalous, in feature units.")
    pixel_threshold: float | None = Field(description="Value of the map above which a pixel is, in feature units.")
    regions: list[FoundRegion] | None = Field(
        description="Parts above the pixel threshold, the highest peak first; null without a threshold. Thresholds of image "
        "and pixel are set apart: a normal image may have regions, an anomalous one none."
    )
    size: Size
    milliseconds: dict[str, float] = Field(
        description="Time of each stage, in milliseconds: decode, network, search, answer (map, regions, heatmap)."
    )
    model: str = Field(description="Name of the model.")
    version: str = Field(description="Its version: the first 12 digits of the sha256 of the bundle's manifest.")
    heatmap: str | None = Field(
        default=None,
        description="On request: base64 PNG in the image's size; yellow from the pixel threshold on, red far above.",
    )


class PatchBox(BaseModel):
    """Place of a patch, in pixels."""

    left: int
    top: int
    width: int
    height: int


class FoundPatch(BaseModel):
    """The nearest normal patch."""

    model_config = _example(_NEAREST)
    vector: int = Field(description="Its number in the memory bank.")
    distance: float = Field(description="How far the anomalous patch is from it, in feature units.")
    image: str | None = Field(description="Training image that it comes from; null where the bundle does not say.")
    row: int | None = Field(description="Its row in the patch grid.")
    column: int | None = Field(description="Its column in the patch grid.")
    box: PatchBox | None = Field(description="Its place in the image as the network saw it, after resize and crop.")
    crop: str | None = Field(description="Base64 PNG of what is around it; null where the bundle has no thumbnails.")


class FoundReason(BaseModel):
    """An anomalous patch, and the normal one that is nearest to it."""

    region: FoundRegion | None = Field(description="Region whose highest point it is; null for the farthest patch of all.")
    row: int = Field(description="The patch's row in the patch grid, from 0.")
    column: int = Field(description="Its column, from 0.")
    box: PatchBox = Field(description="Its place in the image as it was sent.")
    nearest: FoundPatch
    crop: str = Field(description="Base64 PNG of what is around it.")


class Explanation(Answer):
    """What the service says of one image, and why."""

    model_config = _example(
        {
            **_ANSWER,
            "reasons": [{"region": _REGION, "row": 13, "column": 14, "box": _BOX, "nearest": _NEAREST, "crop": "iVB"}],
        }
    )
    reasons: list[FoundReason] = Field(
        description="One for each region, 16 at most; where there is none, one for the most anomalous patch."
    )


class Problem(BaseModel):
    """Why a request, or one image of several, got no answer (RFC 9457)."""

    model_config = _example(
        {
            "status": 400,
            "code": "image_unreadable",
            "detail": "cell.png cannot be read as an image: image file is truncated.",
            "request_id": "5b1f8a0c9d3e",
        }
    )
    status: int = Field(description="HTTP status.")
    code: str = Field(description="What is wrong, in a word that stays the same.")
    detail: str = Field(description="What is wrong, in a sentence.")
    request_id: str = Field(description="Also in the header X-Request-ID and in the log.")


class Item(BaseModel):
    """One image of several: an answer or a problem."""

    name: str = Field(description="File name of the image.")
    answer: Answer | None = None
    problem: Problem | None = None


class Answers(BaseModel):
    """What the service says of several images, in their order."""

    results: list[Item]


class Model(BaseModel):
    """A model that the service can answer with."""

    model_config = _example(
        {
            "name": "elpv",
            "version": "3f2a9c01d4e5",
            "loaded": True,
            "title": "elpv",
            "created": "2026-11-23T10:00:00Z",
            "backbone": "efficientnet_lite0",
            "input_size": {"width": 256, "height": 256},
            "threshold": 30.2,
            "bank_size": 4208,
            "index": "hnsw",
            "storage": "float32",
            "precision": "f32",
            "bytes": 6_600_000,
            "sha256": {"features.xml": "9b1c"},
            "problem": None,
        }
    )
    name: str = Field(description="Name in requests.")
    version: str | None = Field(None, description="First 12 digits of the sha256 of the bundle's manifest.")
    loaded: bool = Field(description="Whether it is in memory; others are loaded when asked for.")
    title: str | None = Field(None, description="Name in the bundle's manifest.")
    created: str | None = Field(None, description="When the bundle was written, ISO 8601.")
    backbone: str | None = None
    input_size: Size | None = Field(None, description="Size that the network sees, after resize and crop.")
    threshold: float | None = Field(None, description="Raw score above which an image is anomalous, in feature units.")
    bank_size: int | None = Field(None, description="Vectors of the memory bank.")
    index: str | None = Field(None, description="Index of the memory bank: flat, bfloat16, ivf or hnsw.")
    storage: str | None = Field(None, description="Precision of the memory bank's vectors.")
    precision: str | None = Field(None, description="Arithmetic of the network.")
    bytes: int | None = Field(None, description="Size of the bundle's files.")
    sha256: dict[str, str] | None = Field(None, description="Checksum of each file of the bundle.")
    problem: str | None = Field(None, description="Why it cannot be served.")


class Models(BaseModel):
    """All models of the service."""

    models: list[Model]
    default: str | None = Field(description="The one that answers requests that name none.")


class Drift(BaseModel):
    """Whether production has moved away from the normal images that a model was calibrated on."""

    model_config = _example(_DRIFT)
    images: int = Field(description="Images that this process has answered since it loaded the model.")
    evidence: float = Field(description="Evidence of drift; around 1 without any, and it grows by multiplication.")
    threshold: float = Field(
        description="Evidence that counts as drift. Without drift it is reached once in so many images at most, in the mean."
    )
    drifted: bool = Field(description="Whether it was reached and has not gone since.")
    since: datetime | None = Field(description="When it was reached, ISO 8601; null without drift.")
    what: str | None = Field(
        description="What has moved: scores or distances, larger or smaller; null without drift.",
    )
    score: float | None = Field(description="Median raw score of the latest 50 images; null before the first.")
    normal_score: float = Field(description="The calibration's.")
    distance: float | None = Field(
        description="Median of the latest 50 images' mean distances to the memory bank, in feature units; null before the "
        "first."
    )
    normal_distance: float = Field(description="The calibration's.")


class ModelDrift(BaseModel):
    """Drift as seen by one model."""

    model: str = Field(description="Name of the model.")
    version: str = Field(description="Its version, as in answers.")
    drift: Drift | None = Field(description="null if it has no calibration.")


class Drifts(BaseModel):
    """Drift of all models that have answered in this process. Several workers each have seen their share of the images."""

    models: list[ModelDrift]


def describe_prediction(prediction: Prediction, model: str, version: str) -> Answer:
    """An answer without times and heatmap."""
    height, width = prediction.size
    return Answer(
        score=prediction.score,
        normalized_score=prediction.normalized_score,
        p_value=prediction.p_value,
        verdict=prediction.verdict,
        threshold=prediction.threshold,
        pixel_threshold=prediction.pixel_threshold,
        regions=None if prediction.regions is None else [FoundRegion(**vars(region)) for region in prediction.regions],
        size=Size(width=width, height=height),
        milliseconds={},
        model=model,
        version=version,
    )
