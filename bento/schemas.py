"""What the service answers, as JSON and in its OpenAPI document.

A field that has the name of an attribute of the runtime's record is filled from it: a new field is one line here.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from patchcore_plugin.record import Word
from patchcore_plugin.scoring.conformal import describe_promise
from patchcore_plugin.scoring.thresholds import Verdict, raw_threshold

from .encoding import to_base64_png

if TYPE_CHECKING:
    from patchcore_plugin.bundle import Manifest

_MODEL = {"model": "elpv", "version": "3f2a9c01d4e5"}
_MM = {"width": 3.05, "height": 7.4, "area": 12.8}
_REGION = {"left": 96, "top": 40, "width": 61, "height": 148, "area": 5120, "peak": 47.3, "mm": _MM}
_ANSWER = {
    "score": 44.0,
    "normalized_score": 0.88,
    "p_value": 0.008,
    "verdict": "anomalous",
    "threshold": 30.2,
    "review_threshold": None,
    "ratio": 1.46,
    "pixel_threshold": 28.9,
    "regions": [_REGION],
    "small_regions": 0,
    "size": {"width": 300, "height": 300},
    "milliseconds": {"decode": 1.1, "network": 3.4, "search": 4.2, "answer": 0.6},
    **_MODEL,
    "record": "019acb0e1f2a6f1c0d9e8b7a",
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
_REASON = {"region": _REGION, "row": 13, "column": 14, "box": _BOX, "nearest": _NEAREST, "crop": "iVB"}


def _from_record(example: dict[str, Any] | None = None) -> ConfigDict:
    """Configuration of a schema that is filled from a record of the runtime."""
    return ConfigDict(from_attributes=True, json_schema_extra={"examples": [example]} if example else None)


def _example(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


def _as_base64_png(value: Any) -> Any:
    return to_base64_png(Image.fromarray(value)) if isinstance(value, np.ndarray) else value


def _as_fields(value: Any) -> Any:
    return {"height": value[0], "width": value[1]} if isinstance(value, tuple) else value


class Size(BaseModel):
    """Size of an image."""

    width: int = Field(description="Width, in pixels.")
    height: int = Field(description="Height, in pixels.")


Picture = Annotated[str, BeforeValidator(_as_base64_png)]
"""An RGB picture (H, W, 3), u8, as a base64 PNG."""

HeightAndWidth = Annotated[Size, BeforeValidator(_as_fields)]
"""A size, which Python's records give as height and width."""


class Millimeters(BaseModel):
    """Size of a region, in mm."""

    model_config = _from_record(_MM)
    width: float = Field(description="Width, in mm.")
    height: float = Field(description="Height, in mm.")
    area: float = Field(description="Area above the threshold, in mm².")


class AnomalousRegion(BaseModel):
    """A connected part of the image above the pixel threshold."""

    model_config = _from_record(_REGION)
    left: int = Field(description="First column, in pixels of the image as it was sent.")
    top: int = Field(description="First row, in pixels of the image as it was sent.")
    width: int = Field(description="Width, in pixels of the image as it was sent.")
    height: int = Field(description="Height, in pixels of the image as it was sent.")
    area: int = Field(description="Pixels above the threshold, of the image as it was sent.")
    peak: float = Field(description="Largest value of the anomaly map in the region, in feature units.")
    mm: Millimeters | None = Field(None, description="Size in mm; null where the model does not know the size of a pixel.")


class ImageScore(BaseModel):
    """Score and verdict of one image, filled from the runtime's prediction."""

    model_config = _from_record()
    score: float = Field(description="Raw image score, a distance in feature units; larger is more anomalous.")
    normalized_score: float | None = Field(
        description="Score in [0, 1] with the threshold at 0.5; null if the model was never validated."
    )
    p_value: float | None = Field(
        description="Share of normal images that score as high or higher, in (0, 1], by the model's calibration; null "
        "without a calibration. With recording sessions, the largest such share that a session gives."
    )
    verdict: Verdict | None = Field(
        description="Verdict; null if the model has no threshold. Only a model with a review band answers review."
    )
    threshold: float | None = Field(
        description="Raw score above which an image is anomalous, sensitivity included, in feature units."
    )
    review_threshold: float | None = Field(
        description="Raw score above which an image is to review at least, sensitivity included; null without a review band."
    )
    ratio: float | None = Field(
        description="Score as a share of the threshold: 0.61 is 61 % of the limit; null without a threshold above 0."
    )
    pixel_threshold: float | None = Field(
        description="Value of the anomaly map above which a pixel is anomalous, sensitivity included, in feature units."
    )
    regions: list[AnomalousRegion] | None = Field(
        description="Connected parts above the pixel threshold, the highest peak first; null without a threshold. The image "
        "threshold is another one: a normal image may have regions, an anomalous image may have none."
    )
    small_regions: int | None = Field(
        description="Number of regions that are not listed, as they are smaller than the model's limit; they count in the "
        "score as ever. Null without a threshold."
    )
    size: HeightAndWidth = Field(description="Size of the image as it was sent.")


class ImageAnswer(ImageScore):
    """Answer for one image."""

    model_config = _example(_ANSWER)
    milliseconds: dict[str, float] = Field(
        description="Time of each stage, in milliseconds: decode, network, search, answer (map, regions, heatmap)."
    )
    model: str = Field(description="Name of the model.")
    version: str = Field(description="Version of the model: the first 12 digits of the sha256 of the bundle's manifest.")
    record: str | None = Field(default=None, description="Id of the answer in the record; null where it is not recorded.")
    heatmap: Picture | None = Field(
        default=None,
        description="On request: base64 PNG in the image's size, yellow from the pixel threshold on, red far above.",
    )


class PatchBox(BaseModel):
    """Place of a patch, in pixels."""

    model_config = _from_record(_BOX)
    left: int = Field(description="First column.")
    top: int = Field(description="First row.")
    width: int = Field(description="Number of columns.")
    height: int = Field(description="Number of rows.")


class NearestPatch(BaseModel):
    """The normal patch that is nearest to an anomalous one."""

    model_config = _from_record(_NEAREST)
    vector: int = Field(description="Number of the vector in the memory bank.")
    distance: float = Field(description="Distance from the anomalous patch, in feature units.")
    image: str | None = Field(description="Training image of the patch; null where the bundle does not tell it.")
    row: int | None = Field(description="Row in the patch grid, from 0.")
    column: int | None = Field(description="Column in the patch grid, from 0.")
    box: PatchBox | None = Field(description="Place in the training image as the network saw it, after resize and crop.")
    crop: Picture | None = Field(
        description="Base64 PNG of the patch and its surroundings; null where the bundle has no thumbnails."
    )


class AnomalousPatch(BaseModel):
    """An anomalous patch, and the normal one that is nearest to it."""

    model_config = _from_record(_REASON)
    region: AnomalousRegion | None = Field(
        description="Region whose highest point the patch is; null where the image has no region, and the patch is the "
        "farthest from normal."
    )
    row: int = Field(description="Row in the patch grid, from 0.")
    column: int = Field(description="Column in the patch grid, from 0.")
    box: PatchBox = Field(description="Place in the image as it was sent.")
    nearest: NearestPatch
    crop: Picture = Field(description="Base64 PNG of the patch and its surroundings.")


class Explanation(ImageAnswer):
    """Answer for one image, with reasons."""

    model_config = _example({**_ANSWER, "reasons": [_REASON]})
    reasons: list[AnomalousPatch] = Field(
        description="One reason for each region, 16 at most; without a region, one for the most anomalous patch."
    )


class Problem(BaseModel):
    """Why a request, or one image of several, got no answer (RFC 9457)."""

    model_config = _example(
        {
            "status": 400,
            "code": "image_unreadable",
            "detail": "'cell.png' cannot be read as an image: image file is truncated.",
            "request_id": "5b1f8a0c9d3e",
        }
    )
    status: int = Field(description="HTTP status.")
    code: str = Field(description="Stable machine-readable error code.")
    detail: str = Field(description="A sentence that says what is wrong.")
    request_id: str = Field(description="Id of the request, also in the header X-Request-ID and in the log.")


class BatchItem(BaseModel):
    """One image of several: an answer or a problem."""

    name: str = Field(description="File name of the image.")
    answer: ImageAnswer | None = None
    problem: Problem | None = None


class BatchAnswer(BaseModel):
    """Answers for several images, in their order."""

    results: list[BatchItem]


class ModelSummary(BaseModel):
    """A model that requests may name."""

    model_config = _example(
        {
            "name": "elpv",
            "version": "3f2a9c01d4e5",
            "loaded": True,
            "title": "elpv",
            "created": "2026-11-23T10:00:00Z",
            "backbone": "efficientnet_lite0",
            "input_size": {"width": 256, "height": 256},
            "intensity_range": None,
            "inspected_share": 1.0,
            "threshold": 30.2,
            "promise": "Of 100 good parts, 1 would be stopped, and 4 more looked at, on average.",
            "bank_size": 4208,
            "index": "hnsw",
            "storage": "float32",
            "precision": "f32",
            "device": "CPU",
            "bytes": 6_600_000,
            "sha256": {"features.xml": "9b1c"},
            "problem": None,
        }
    )
    name: str = Field(description="Name in requests.")
    version: str | None = Field(None, description="First 12 digits of the sha256 of the bundle's manifest.")
    loaded: bool = Field(description="Whether the process that answers has the model in memory; others load when asked for.")
    title: str | None = Field(None, description="Name in the bundle's manifest.")
    created: str | None = Field(None, description="When the bundle was written, ISO 8601.")
    backbone: str | None = Field(
        None, description="Name of the network that computes the features; of an ensemble, those of all members."
    )
    input_size: HeightAndWidth | None = Field(None, description="Size that the network sees, after resize and crop.")
    intensity_range: tuple[float, float] | None = Field(
        None, description="Values of the images that become 0 and 255; null for a model of 8-bit images."
    )
    inspected_share: float | None = Field(None, description="Share of the input that the model looks at, in (0, 1].")
    threshold: float | None = Field(
        None, description="Raw score above which an image is anomalous, sensitivity included, in feature units."
    )
    promise: str | None = Field(
        None, description="What the thresholds promise for normal parts, in a sentence; null without a calibration."
    )
    bank_size: int | None = Field(None, description="Vectors in the memory bank; of an ensemble, in all of its banks.")
    index: str | None = Field(None, description="Kind of the (first) memory bank's index, such as flat or hnsw.")
    storage: str | None = Field(None, description="Number format of the memory bank's vectors, such as float32.")
    precision: str | None = Field(None, description="Arithmetic of the network, such as f32.")
    device: str | None = Field(
        None, description="Device of OpenVINO that computes the network, such as CPU; null unless loaded."
    )
    bytes: int | None = Field(None, description="Size of the bundle's files.")
    sha256: dict[str, str] | None = Field(None, description="Checksum of each file of the bundle.")
    problem: str | None = Field(
        None, description="Why the bundle cannot be served. If the model is loaded, an older version of it answers."
    )

    @classmethod
    def of(
        cls, name: str, *, device: str | None, manifest: Manifest, version: str, problem: str | None = None
    ) -> ModelSummary:
        """The summary of a bundle.

        Args:
            name: Name of the model in requests.
            device: Device that computes the network; None unless the model is in memory.
            manifest: Manifest of the bundle.
            version: Version of the bundle.
            problem: Why the bundle on the disk cannot be served, where an older version answers.
        """
        return cls(
            name=name,
            version=version,
            loaded=device is not None,
            title=manifest.name,
            created=manifest.created.isoformat(),
            backbone=manifest.backbones,
            input_size=manifest.preprocessing.size,
            intensity_range=manifest.preprocessing.intensity_range,
            inspected_share=1.0 if manifest.preprocessing.region is None else manifest.preprocessing.region.share,
            threshold=raw_threshold(manifest.image),
            promise=manifest.calibration and describe_promise(manifest.calibration),
            bank_size=manifest.vectors,
            index=manifest.index.kind,
            storage=manifest.index.storage,
            precision=manifest.precision,
            device=device,
            bytes=manifest.total_bytes,
            sha256={file: about.sha256 for file, about in manifest.files.items()},
            problem=problem,
        )


class ModelList(BaseModel):
    """All models of the service."""

    models: list[ModelSummary]
    default: str | None = Field(description="Model that answers requests that name none.")
    record: bool = Field(default=False, description="Whether the service keeps a record of its answers.")


class DriftStatus(BaseModel):
    """Whether production has moved away from the normal images that a model was calibrated on."""

    model_config = _from_record(_DRIFT)
    images: int = Field(description="Images that this process has answered since it began to watch the model.")
    evidence: float = Field(description="Evidence of drift: around 1 without drift; drift multiplies it.")
    threshold: float = Field(
        description="Alarm level. Without drift, the mean number of images until a false alarm is at least this."
    )
    drifted: bool = Field(description="Whether the evidence has reached the alarm level and has not fallen since.")
    since: datetime | None = Field(description="When the alarm level was reached, ISO 8601; null without drift.")
    what: str | None = Field(description="What has moved: scores or distances, larger or smaller; null without drift.")
    score: float | None = Field(description="Median raw score of the latest 50 images; null before the first.")
    normal_score: float = Field(description="Median raw score of the calibration images.")
    distance: float | None = Field(
        description="Median of the latest 50 images' mean distances to the memory bank, in feature units; null before the "
        "first."
    )
    normal_distance: float = Field(description="The same median of the calibration images.")


class ModelDrift(BaseModel):
    """Drift of the images that one model has answered."""

    model: str = Field(description="Name of the model.")
    version: str = Field(description="Version of the model, as in answers.")
    drift: DriftStatus | None = Field(description="State of the drift monitor; null if the model has no calibration.")


class DriftReport(BaseModel):
    """Drift of all models that have answered in this process. Each of several workers sees its own share of the images."""

    models: list[ModelDrift]


class Feedback(BaseModel):
    """What an operator has said of a part."""

    word: Word = Field(description="Whether the part is good or bad.")
    note: str = Field(description="What the operator remarked.")
    time: str = Field(description="When it was said, UTC, ISO 8601.")


class FeedbackAnswer(Feedback):
    """An operator's word as it is recorded."""

    model_config = _example(
        {
            "word": "good",
            "note": "water drop",
            "time": "2026-11-23T10:00:07.120Z",
            "record": "019acb0e1f2a6f1c0d9e8b7a",
            "image": True,
        }
    )
    record: str = Field(description="Id of the answer.")
    image: bool = Field(description="Whether the record has the image; no model can learn from a word without it.")


class RecordedAnswer(BaseModel):
    """An answer as it is recorded."""

    model_config = _example(
        {
            "record": "019acb0e1f2a6f1c0d9e8b7a",
            "time": "2026-11-23T10:00:00.042Z",
            "request_id": "5b1f8a0c9d3e",
            "name": "cell0042.png",
            "sha256": "5d0c9f6a1b3e5d0c9f6a1b3e5d0c9f6a1b3e5d0c9f6a1b3e5d0c9f6a1b3e5d0c",
            "image": True,
            "feedback": {"word": "good", "note": "water drop", "time": "2026-11-23T10:00:07.120Z"},
            "answer": _ANSWER,
        }
    )
    record: str = Field(description="Id of the answer; ids have the order of time.")
    time: str = Field(description="When the image was answered, UTC, ISO 8601.")
    request_id: str = Field(description="Id of the request, as in the header X-Request-ID and in the log.")
    name: str = Field(description="File name of the image, as it was sent.")
    sha256: str = Field(description="Checksum of the image file.")
    image: bool = Field(description="Whether the record has the image: /history/{record}/image.")
    feedback: Feedback | None = Field(description="What an operator has said of the part; null if nothing.")
    answer: ImageAnswer = Field(description="The answer, without its heatmap.")


class History(BaseModel):
    """Recorded answers, the newest first."""

    answers: list[RecordedAnswer]
    next: str | None = Field(description="Value of before for the answers that follow; null where none follows.")


class HourTotal(BaseModel):
    """Number of answers of an hour, of one model and with one verdict."""

    hour: str = Field(description="When the hour begins, UTC, ISO 8601.")
    model: str = Field(description="Name of the model.")
    verdict: str | None = Field(description="Verdict; null for a model without a threshold.")
    answers: int = Field(description="Number of answers.")
    good: int = Field(description="Number of those of which an operator has said that the part is good.")
    bad: int = Field(description="Number of those of which an operator has said that the part is bad.")


class HourTotals(BaseModel):
    """Number of answers by hour, model and verdict, in order of time."""

    totals: list[HourTotal]
