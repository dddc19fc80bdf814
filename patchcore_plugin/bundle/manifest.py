"""The bundle: the folder that training hands to serving.

    manifest.json   what the model is, how to read its scores, and the sha256 of every other file
    features.xml    OpenVINO IR: RGB images (B, H, W, 3) u8, of any size, to embeddings (B, h, w, D) f32
    features.bin    its weights
    bank.faiss      the memory bank and its index
    bank.npy        neighbours of each bank vector, for the image score

and, where it is known which training image each bank vector comes from (:mod:`patchcore_plugin.bundle.origins`):

    origins.npy     image, row and column of each bank vector
    sources.json    the images' names
    thumbnails.npy  the images themselves, made small; on request

A bundle is whole or absent: it is written beside its place and moved there, and nothing of it is used before every file
matches its checksum. Nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, model_validator

from patchcore_plugin.errors import PatchcoreError

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT_VERSION = 3
MANIFEST, FEATURES, WEIGHTS = "manifest.json", "features.xml", "features.bin"
BANK, NEIGHBORS = "bank.faiss", "bank.npy"
ORIGINS, SOURCES, THUMBNAILS = "origins.npy", "sources.json", "thumbnails.npy"


class FileRule(NamedTuple):
    """What a bundle expects of one of its files.

    Attributes:
        required: Whether every bundle has the file.
        with_: Files without which this one makes no sense.
        content: What the file holds, in a few words.
    """

    required: bool
    with_: tuple[str, ...]
    content: str


FILES = {
    FEATURES: FileRule(True, (), "network: pre-processing and embedding"),
    WEIGHTS: FileRule(True, (), "weights of the network"),
    BANK: FileRule(True, (), "memory bank and its index"),
    NEIGHBORS: FileRule(True, (), "neighbors of each bank vector"),
    ORIGINS: FileRule(False, (SOURCES,), "image, row and column of each bank vector"),
    SOURCES: FileRule(False, (ORIGINS,), "names of the training images"),
    THUMBNAILS: FileRule(False, (SOURCES,), "small training images"),
}
"""Every file that a bundle may hold beside its manifest. Reading, writing, ``info`` and ``update`` go by this table."""

IndexKind = Literal["flat", "ivf", "hnsw"]
Storage = Literal["float32", "float16", "int8"]
Precision = Literal["f32", "bf16", "int8"]

MAX_WIDTH = 65_536
"""Greatest width of a search in the memory bank."""

MAX_CALIBRATION = 10_000
"""Most calibration images that a bundle keeps."""


def _is_known(name: str) -> str:
    if name not in FILES:
        msg = f"a bundle holds no file {name!r}"
        raise ValueError(msg)
    return name


FileName = Annotated[str, AfterValidator(_is_known)]
Size = tuple[Annotated[int, Field(ge=1, le=16384)], Annotated[int, Field(ge=1, le=16384)]]
Triple = tuple[FiniteFloat, FiniteFloat, FiniteFloat]


class BundleError(PatchcoreError, ValueError):
    """A bundle cannot be read or written; the message names the file and the reason."""


def _ascending(values: list[float]) -> list[float]:
    if any(after < before for before, after in pairwise(values)):
        msg = "must be in ascending order"
        raise ValueError(msg)
    return values


Ascending = Annotated[list[FiniteFloat], Field(min_length=1, max_length=MAX_CALIBRATION), AfterValidator(_ascending)]
"""One number of each calibration image, sorted by itself."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Box(NamedTuple):
    """A rectangle, in pixels.

    Attributes:
        left: First column.
        top: First row.
        width: Columns.
        height: Rows.
    """

    left: float
    top: float
    width: float
    height: float

    def rounded(self) -> Box:
        """The box with its edges rounded to whole pixels, at least one pixel large."""
        left, top = round(self.left), round(self.top)
        right, bottom = round(self.left + self.width), round(self.top + self.height)
        return Box(left, top, max(1, right - left), max(1, bottom - top))


class Preprocessing(_Record):
    """Steps from an image to the backbone's input, all of them inside the IR.

    Attributes:
        resize: Height and width after the antialiased bilinear resize, in pixels.
        crop: Height and width of the centre crop, in pixels; None crops nothing.
        mean: Per channel (RGB), in [0, 1], subtracted.
        std: Per channel (RGB), in [0, 1], divided by.
    """

    resize: Size
    crop: Size | None = None
    mean: Triple
    std: Triple

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.crop and (self.crop[0] > self.resize[0] or self.crop[1] > self.resize[1]):
            msg = f"crop {self.crop} is larger than resize {self.resize}"
            raise ValueError(msg)
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the backbone's input, in pixels."""
        return self.crop or self.resize

    @property
    def offset(self) -> tuple[int, int]:
        """First row and column of the crop in the resized image."""
        # torchvision rounds half to even
        return round((self.resize[0] - self.size[0]) / 2), round((self.resize[1] - self.size[1]) / 2)

    def seen(self, size: tuple[int, int]) -> Box:
        """The part of an image that the network sees, in pixels of the image; not rounded.

        Args:
            size: Height and width of the image, in pixels.
        """
        down, across = size[0] / self.resize[0], size[1] / self.resize[1]
        (top, left), (height, width) = self.offset, self.size
        return Box(left * across, top * down, width * across, height * down)

    def to_image(self, box: Box, size: tuple[int, int]) -> Box:
        """A box of the network's input, in whole pixels of the image that it was made from; at least one pixel large.

        Args:
            box: In pixels of the network's input, after resize and crop.
            size: Height and width of the image, in pixels.
        """
        down, across = size[0] / self.resize[0], size[1] / self.resize[1]
        return Box(
            (box.left + self.offset[1]) * across, (box.top + self.offset[0]) * down, box.width * across, box.height * down
        ).rounded()


class Scale(_Record):
    """How to read raw scores, from the model's post-processor.

    Attributes:
        threshold: Raw threshold; None if validation set none.
        minimum: Lower end of the range that normalisation scales to a length of 1, the threshold at 0.5; of anomalib's
            post-processor the smallest raw score in validation. None without normalisation.
        maximum: Its upper end; of anomalib's the largest raw score in validation. None without normalisation.
        sensitivity: In [0, 1]; 0.5 takes the threshold as it is, more calls more images anomalous.
    """

    threshold: FiniteFloat | None = None
    minimum: FiniteFloat | None = None
    maximum: FiniteFloat | None = None
    sensitivity: Annotated[float, Field(ge=0, le=1)] = 0.5


class Calibration(_Record):
    """Scores of normal images that were held back from training, by which p-values and drift are told.

    Each list is sorted by itself, and has one number of every image, in feature units, as training computed it.

    Attributes:
        false_positive_rate: Share of normal images for which the thresholds were set.
        scores: Image scores.
        peaks: Largest value of each image's anomaly map.
        means: Mean of each image's anomaly map.
    """

    false_positive_rate: Annotated[float, Field(gt=0, lt=1)]
    scores: Ascending
    peaks: Ascending
    means: Ascending

    @model_validator(mode="after")
    def _of_the_same_images(self) -> Self:
        if not len(self.scores) == len(self.peaks) == len(self.means):
            msg = (
                f"{len(self.scores)} scores, {len(self.peaks)} peaks and {len(self.means)} means are not of the same images"
            )
            raise ValueError(msg)
        return self


class IndexTrial(_Record):
    """What one index of the memory bank did on normal images, on the machine that wrote the bundle.

    Attributes:
        index: ``"flat"``, ``"ivf"`` or ``"hnsw"``.
        storage: Precision of the vectors that it searched.
        width: Breadth of the search: cells probed (ivf), candidates kept (hnsw), or candidates of a product in bfloat16
            (flat; 0 is exact search).
        milliseconds: Median time to search for one image's patches.
        recall: Share of the patches whose nearest bank vector it found.
        error: Relative error of the distance, at the 99.9th percentile of the patches, against exact search.
        storage_error: The same of exact search in the vectors as they are stored: what the storage alone costs.
        good: Whether recall and error were near enough to exact search in the same storage.
    """

    index: IndexKind
    storage: Storage
    width: Annotated[int, Field(ge=0)]
    milliseconds: Annotated[FiniteFloat, Field(ge=0)]
    recall: Annotated[float, Field(ge=0, le=1)]
    error: Annotated[FiniteFloat, Field(ge=0)]
    storage_error: Annotated[FiniteFloat, Field(ge=0)] = 0
    good: bool


class Index(_Record):
    """The memory bank's index.

    Attributes:
        kind: ``"flat"``, ``"ivf"`` or ``"hnsw"``.
        storage: Precision of the bank's vectors.
        width: Breadth of the search, as in a trial.
        trials: What was measured before it was chosen; empty where nothing was.
    """

    kind: IndexKind = "flat"
    storage: Storage = "float32"
    width: Annotated[int, Field(ge=0, le=MAX_WIDTH)] = 0
    trials: list[IndexTrial] = []


class PrecisionTrial(_Record):
    """What the network did in one precision on normal images, on the machine that wrote the bundle.

    Attributes:
        precision: ``"f32"``, ``"bf16"`` or ``"int8"``.
        milliseconds: Median time for one image's embeddings, pre-processing included.
        correlation: Spearman's rank correlation of the image scores with those of f32.
        error: Mean relative error of the image scores against f32.
        good: Whether that was near enough to f32.
    """

    precision: Precision
    milliseconds: Annotated[FiniteFloat, Field(ge=0)]
    correlation: Annotated[float, Field(ge=-1, le=1)]
    error: Annotated[FiniteFloat, Field(ge=0)]
    good: bool


class File(_Record):
    """Checksum and size of one file."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: PositiveInt


class SelfTest(_Record):
    """What the bundle answered where it was written; see :mod:`patchcore_plugin.runtime.self_test`.

    Attributes:
        scores: Raw image score of each test picture.
    """

    scores: Annotated[list[Annotated[FiniteFloat, Field(ge=0)]], Field(min_length=1, max_length=100)]


class Update(_Record):
    """One step from a bundle to its successor, by ``patchcore update``.

    Attributes:
        parent: Version of the bundle that was extended.
        date: When.
        images: New normal images that went into the bank.
        vectors: Vectors that they added to it.
    """

    parent: Annotated[str, Field(pattern="^[0-9a-f]{12}$")]
    date: datetime
    images: PositiveInt
    vectors: Annotated[int, Field(ge=0)]


class Manifest(_Record):
    """Content of manifest.json."""

    format_version: Literal[2, 3] = FORMAT_VERSION
    name: Annotated[str, Field(min_length=1, max_length=200)]
    created: datetime
    backbone: str
    layers: list[str]
    preprocessing: Preprocessing
    grid: Size
    embedding_dimension: PositiveInt
    bank_size: PositiveInt
    coreset_sampling_ratio: Annotated[float, Field(gt=0, le=1)]
    covering_radius: Annotated[FiniteFloat, Field(ge=0)] | None = None  # of the training patches around the bank
    num_neighbors: PositiveInt
    score_smoothing: Annotated[FiniteFloat, Field(ge=0)] = 0  # of patch distances for the image score, in patches
    index: Index = Index()
    precision: Precision = "f32"  # of the network
    precision_trials: list[PrecisionTrial] = []
    image: Scale
    pixel: Scale
    calibration: Calibration | None = None
    self_test: SelfTest | None = None
    lineage: list[Update] = []  # the first step first
    versions: dict[str, str]
    files: dict[FileName, File]

    @model_validator(mode="after")
    def _files_are_complete(self) -> Self:
        required = [name for name, rule in FILES.items() if rule.required]
        if not self.files.keys() >= set(required):
            msg = f"files lists {sorted(self.files)}, expected {', '.join(required)}"
            raise ValueError(msg)
        for name in self.files:
            missing = [other for other in FILES[name].with_ if other not in self.files]
            if missing:
                msg = f"files lists {sorted(self.files)}: {name} needs {', '.join(missing)}"
                raise ValueError(msg)
        return self

    @property
    def total_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(file.bytes for file in self.files.values())
