"""The records of a bundle: its manifest, and the table of its other files.

A bundle is the folder that training writes and serving reads. ``manifest.json`` says what the model is, how its scores are
read, and the sha256 of every other file (:data:`FILES`). :mod:`patchcore_plugin.bundle.folder` reads and writes the folder.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from patchcore_plugin.bundle.region import RegionOfInterest
from patchcore_plugin.bundle.tiles import MAX_INPUT_SIDE, Size, Tiles
from patchcore_plugin.depth import IntensityRange, check_intensity_range
from patchcore_plugin.errors import PatchcoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_plugin.bundle.tiles import TileLayout

MANIFEST, FEATURES, WEIGHTS = "manifest.json", "features.xml", "features.bin"
BANK, NEIGHBORS = "bank.faiss", "bank.npy"
ORIGINS, SOURCES, THUMBNAILS = "origins.npy", "sources.json", "thumbnails.npy"
DEFECTS = "defects.npy"

MAX_MEMBERS = 8
"""Most members of an ensemble."""

BANKS = [(BANK, NEIGHBORS), *((f"bank_{number}.faiss", f"bank_{number}.npy") for number in range(2, MAX_MEMBERS + 1))]
"""Files of each member's memory bank, and of its neighbors; a single model has the first."""


class FileRule(NamedTuple):
    """What a bundle expects of one of its files.

    Attributes:
        content: What the file holds, in a few words.
        required: Whether every bundle has the file.
        needs: Other files without which this one has no meaning.
    """

    content: str
    required: bool = True
    needs: tuple[str, ...] = ()


FILES = {
    # images (B, H, W, 3), u8, RGB, of any size, to embeddings (B, h, w, D), float32
    FEATURES: FileRule("network, pre-processing included (OpenVINO)"),
    WEIGHTS: FileRule("weights of the network"),
    # vectors (M, D), and beside them the k nearest of each (M, k), int32
    BANK: FileRule("memory bank and its index (FAISS)"),
    NEIGHBORS: FileRule("nearest neighbors of each bank vector", required=False),  # a huge flat bank has none
    **{bank: FileRule("memory bank of a further member, and its index (FAISS)", required=False) for bank, _ in BANKS[1:]},
    **{
        neighbors: FileRule("nearest neighbors of each of its vectors", required=False, needs=(bank,))
        for bank, neighbors in BANKS[1:]
    },
    # (M, 3), int32; K names; (K, h, w, 3), u8, RGB
    ORIGINS: FileRule("training image, row and column of each bank vector", required=False, needs=(SOURCES,)),
    SOURCES: FileRule("names of the training images", required=False, needs=(ORIGINS,)),
    THUMBNAILS: FileRule("small copies of the training images", required=False, needs=(SOURCES,)),
    # (K, D), float32
    DEFECTS: FileRule("vectors of known defects", required=False),
}
"""Every file that a bundle may hold beside its manifest. Reading, writing, ``info`` and ``update`` go by this table."""

IndexKind = Literal["flat", "bfloat16", "ivf", "reduced", "hnsw"]
Storage = Literal["float32", "float16", "int8"]
Precision = Literal["f32", "bf16", "int8"]

ENSEMBLE_FORMAT = 6
"""Lowest version of the bundle format that has ensembles."""

REGION_FORMAT = 7
"""Lowest version of the bundle format that has a region of interest."""

REVIEW_FORMAT = 8
"""Lowest version of the bundle format that has a review band."""

TILES_FORMAT = 9
"""Lowest version of the bundle format that has tiles."""

REGIONS_FORMAT = 10
"""Lowest version of the bundle format that has a rule for regions."""

DEFECTS_FORMAT = 11
"""Lowest version of the bundle format that has known defects."""

REDUCED_FORMAT = 12
"""Lowest version of the bundle format that has the index of reduced vectors."""

MAX_WIDTH = 65_536
"""Greatest width of a search in the memory bank."""

MAX_CALIBRATION = 10_000
"""Most calibration images that a bundle keeps."""

MAX_NEIGHBORS = 1000
"""Most neighbors that re-weight an image score."""

MAX_SMOOTHING = 1000
"""Greatest standard deviation, in patches, of the Gaussian that smooths patch distances."""

MAX_NAME_LENGTH = 200
"""Most characters of a model's name."""


def _check_name(name: str) -> str:
    if name not in FILES:
        msg = f"{reprlib.repr(name)} is not a file of a bundle"
        raise ValueError(msg)
    return name


def _check_printable(text: str) -> str:
    if not text.isprintable():  # a terminal would obey what is not
        msg = "must have printable characters alone"
        raise ValueError(msg)
    return text


FileName = Annotated[str, AfterValidator(_check_name)]
Text = Annotated[str, Field(max_length=1000), AfterValidator(_check_printable)]
Count = Annotated[int, Field(ge=1, le=2**53)]
Number = Annotated[FiniteFloat, Field(ge=-1e20, le=1e20)]
"""A number so small that float32 holds it, and the difference of two of them. Distances in a bank are below 1e20."""
PositiveNumber = Annotated[Number, Field(ge=0)]
Triple = tuple[Number, Number, Number]


class BundleError(PatchcoreError, ValueError):
    """A bundle cannot be read or written. The message names the file and the reason."""


def _check_order(values: list[float]) -> list[float]:
    if any(after < before for before, after in pairwise(values)):
        msg = "must be in ascending order"
        raise ValueError(msg)
    return values


Ascending = Annotated[list[Number], Field(min_length=1, max_length=MAX_CALIBRATION), AfterValidator(_check_order)]
"""One number for each calibration image, in ascending order."""
SessionNumbers = Annotated[list[Annotated[int, Field(ge=0, lt=MAX_CALIBRATION)]], Field(max_length=MAX_CALIBRATION)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    later_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that versions before theirs refuse: where they hold nothing, they are not written."""

    @model_serializer(mode="wrap")
    def _leave_out(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content = serialize(self)
        for name in self.later_fields:
            if getattr(self, name) in (None, []):
                del content[name]
        return content


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels.

    Attributes:
        left: First column.
        top: First row.
        width: Number of columns.
        height: Number of rows.
    """

    left: float
    top: float
    width: float
    height: float

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge, as Pillow takes a box."""
        return self.left, self.top, self.left + self.width, self.top + self.height

    def cell(self, row: int, column: int, grid: tuple[int, int]) -> Box:
        """One cell of the box, divided into a grid.

        Args:
            row: Row of the cell, from 0.
            column: Column of the cell, from 0.
            grid: Rows and columns of the grid.
        """
        height, width = self.height / grid[0], self.width / grid[1]
        return Box(self.left + column * width, self.top + row * height, width, height)

    def rounded(self) -> Box:
        """The box with its edges rounded to whole pixels (int), and at least one pixel large."""
        left, top, right, bottom = map(round, self.corners)
        return Box(left, top, max(1, right - left), max(1, bottom - top))


class Preprocessing(_Record):
    """Steps from an image to the network's input; all but the first are inside the network file.

    Attributes:
        intensity_range: Values of a deeper image that become 0 and 255; see :func:`patchcore_plugin.images.read_image`.
            None for a model of 8-bit images.
        resize: Height and width after the antialiased bilinear resize, in pixels.
        crop: Height and width of the center crop, in pixels; None without a crop.
        mean: Mean of each channel (RGB), in [0, 1], which is subtracted.
        std: Standard deviation of each channel (RGB), in [0, 1], which is divided by.
        region: Pixels that are inspected; the others become the mean color. None inspects all.
        tiles: Tiles that the network embeds one by one; None where it embeds the whole input at once.
    """

    later_fields = ("intensity_range", "region", "tiles")

    intensity_range: Annotated[IntensityRange, AfterValidator(check_intensity_range)] | None = None
    resize: Size
    crop: Size | None = None
    mean: Triple
    std: Triple
    region: RegionOfInterest | None = None
    tiles: Tiles | None = None

    @model_validator(mode="after")
    def _check_tiles(self) -> Self:
        if self.tiles is not None:
            self.tiles.check_input(self.size)
        return self

    @model_validator(mode="after")
    def _check_region(self) -> Self:
        if self.region is not None and self.region.size != self.size:
            msg = f"region has size {self.region.size}, the network's input {self.size}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        if self.crop and (self.crop[0] > self.resize[0] or self.crop[1] > self.resize[1]):
            msg = f"crop {self.crop} is larger than resize {self.resize}"
            raise ValueError(msg)
        return self

    @property
    def format_version(self) -> int:
        """Lowest version of the bundle format that has these steps."""
        if self.tiles is not None:
            return TILES_FORMAT
        if self.region is not None:
            return REGION_FORMAT
        return 3 if self.intensity_range is None else 4

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input, in pixels."""
        return self.crop or self.resize

    @property
    def network_size(self) -> tuple[int, int]:
        """Height and width of what the network embeds at once: a tile, or the whole input, in pixels."""
        return self.size if self.tiles is None else self.tiles.size

    def layout(self, cells: tuple[int, int]) -> TileLayout:
        """Where the tiles lie, if there are any; see :meth:`Tiles.layout`.

        Args:
            cells: Rows and columns of the patch grid of one tile.
        """
        return self.tiles.layout(self.size, cells, self.region and self.region.pixels)

    @property
    def offset(self) -> tuple[int, int]:
        """First row and column of the crop in the resized image."""
        # torchvision rounds half to even
        return round((self.resize[0] - self.size[0]) / 2), round((self.resize[1] - self.size[1]) / 2)

    @property
    def crop_box(self) -> Box:
        """The crop in the resized image."""
        return Box(self.offset[1], self.offset[0], self.size[1], self.size[0])

    @property
    def margins(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows above and below the crop, and columns left and right of it, in the resized image."""
        (top, left), (height, width) = self.offset, self.size
        return (top, self.resize[0] - height - top), (left, self.resize[1] - width - left)

    @property
    def inspected(self) -> NDArray[np.bool_] | None:
        """Whether each pixel of the resized image is seen and inspected; None where all are."""
        if self.crop is None and self.region is None:
            return None
        return np.pad(np.ones(self.size, bool) if self.region is None else self.region.pixels, self.margins)

    def pixel_size(self, size: tuple[int, int]) -> tuple[float, float]:
        """Height and width of one pixel of the network's input, in pixels of the image.

        Args:
            size: Height and width of the image, in pixels.
        """
        return size[0] / self.resize[0], size[1] / self.resize[1]

    def seen(self, size: tuple[int, int]) -> Box:
        """The part of an image that the network sees, in pixels of the image, not rounded.

        Args:
            size: Height and width of the image, in pixels.
        """
        (down, across), crop = self.pixel_size(size), self.crop_box
        return Box(crop.left * across, crop.top * down, crop.width * across, crop.height * down)

    def to_image(self, box: Box, size: tuple[int, int]) -> Box:
        """Convert a box of the network's input to whole pixels (int) of the image.

        Args:
            box: Box in pixels of the network's input, after resize and crop.
            size: Height and width of the image, in pixels.

        Returns:
            The box in the image, at least one pixel large.
        """
        (down, across), (top, left) = self.pixel_size(size), self.offset
        return Box((box.left + left) * across, (box.top + top) * down, box.width * across, box.height * down).rounded()


class Scale(_Record):
    """How raw scores are read; :mod:`patchcore_plugin.scoring.thresholds` has the arithmetic.

    Attributes:
        threshold: Raw score above which something is anomalous, at a sensitivity of 0.5; None if validation set none.
        minimum: Lower end of the range of raw scores that normalization scales to a length of 1, with the threshold at 0.5;
            anomalib's post-processor takes the smallest score of validation. None without normalization.
        maximum: Upper end of the range; anomalib's takes the largest score of validation. None without normalization.
        sensitivity: Shift of the thresholds, in [0, 1]: 0.5 leaves them, more makes them lower.
        review: Raw score above which an image that is not anomalous is one to review, at a sensitivity of 0.5; at most the
            threshold. None without a review band.
    """

    later_fields = ("review",)

    threshold: Number | None = None
    minimum: Number | None = None
    maximum: Number | None = None
    sensitivity: Annotated[float, Field(ge=0, le=1)] = 0.5
    review: Number | None = None

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            msg = f"minimum {self.minimum:g} is above maximum {self.maximum:g}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _check_review(self) -> Self:
        if self.review is not None and (self.threshold is None or self.review > self.threshold):
            msg = f"review {self.review:g} is above threshold {self.threshold}"
            raise ValueError(msg)
        return self


class Sessions(_Record):
    """Recording session of each number of a calibration, counted from 0.

    Attributes:
        scores: Session of each of the calibration's image scores.
        peaks: Session of each of its peaks.
    """

    scores: SessionNumbers
    peaks: SessionNumbers


class Calibration(_Record):
    """Raw scores of normal images that were kept out of the memory bank, for p-values and drift.

    Each list holds one number for each image, sorted by itself, in feature units, as training computed them.

    Attributes:
        false_positive_rate: Share of normal images that the thresholds may call anomalous.
        scores: Image scores.
        peaks: Largest value of each image's anomaly map.
        means: Mean of each image's anomaly map.
        sessions: Recording sessions of scores and peaks; None where the images count as one session.
        review_rate: Share of normal images that may be called anomalous or be to review; None without a review band.
    """

    later_fields = ("sessions", "review_rate")

    false_positive_rate: Annotated[float, Field(gt=0, lt=1)]
    scores: Ascending
    peaks: Ascending
    means: Ascending
    sessions: Sessions | None = None
    review_rate: Annotated[float, Field(gt=0, lt=1)] | None = None

    @property
    def format_version(self) -> int:
        """Lowest version of the bundle format that has these fields."""
        if self.review_rate is not None:
            return REVIEW_FORMAT
        return 3 if self.sessions is None else 5

    @model_validator(mode="after")
    def _check_review_rate(self) -> Self:
        if self.review_rate is not None and self.review_rate <= self.false_positive_rate:
            msg = f"review_rate {self.review_rate:g} is not above false_positive_rate {self.false_positive_rate:g}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if not len(self.scores) == len(self.peaks) == len(self.means):
            msg = (
                f"{len(self.scores)} scores, {len(self.peaks)} peaks and {len(self.means)} means are not of the same images"
            )
            raise ValueError(msg)
        if self.sessions is not None:
            by_score, by_peak = Counter(self.sessions.scores), Counter(self.sessions.peaks)
            if by_score != by_peak or by_score.total() != len(self.scores) or set(by_score) != set(range(len(by_score))):
                msg = "sessions do not fit the scores and peaks"
                raise ValueError(msg)
        return self


class IndexTrial(_Record):
    """Measurement of one index of the memory bank, on the machine that wrote the bundle.

    On normal images, and on some with a pasted window.

    Attributes:
        index: Kind of the index; see :class:`patchcore_plugin.memory_bank.MemoryBank`.
        storage: Number format in which the vectors were kept.
        width: Breadth of the search; 0 for exact search.
        milliseconds: Median time to score one normal image's patches.
        recall: Share of the patches whose nearest bank vector was found.
        error: Relative error of the image scores against exact search in the same storage, at the 99.9th percentile; in
            bundles of earlier versions, of the patches' distances.
        storage_error: Relative error of exact search in the same storage against exact search in float32, at the same
            percentile.
        good: Whether the answers are near enough to those of exact search.
    """

    index: IndexKind
    storage: Storage
    width: Annotated[int, Field(ge=0)]
    milliseconds: PositiveNumber
    recall: Annotated[float, Field(ge=0, le=1)]
    error: PositiveNumber
    storage_error: PositiveNumber = 0
    good: bool

    @model_validator(mode="before")
    @classmethod
    def _name_bfloat16(cls, content: Any) -> Any:
        return _with_bfloat16_named(content, "index")


class Index(_Record):
    """The memory bank's index.

    Attributes:
        kind: Kind of the index; see :class:`patchcore_plugin.memory_bank.MemoryBank`.
        storage: Number format in which the vectors are kept.
        width: Breadth of the search; 0 for exact search.
        trials: Measurements from which the index was chosen; empty where nothing was measured.
    """

    kind: IndexKind = "flat"
    storage: Storage = "float32"
    width: Annotated[int, Field(ge=0, le=MAX_WIDTH)] = 0
    trials: list[IndexTrial] = []

    @property
    def format_version(self) -> int:
        """Lowest version of the bundle format that has these kinds of index."""
        return REDUCED_FORMAT if "reduced" in (self.kind, *(trial.index for trial in self.trials)) else 2

    @model_validator(mode="before")
    @classmethod
    def _name_bfloat16(cls, content: Any) -> Any:
        return _with_bfloat16_named(content, "kind")


def _with_bfloat16_named(content: Any, field: str) -> Any:
    """The content of a record, with the index named ``"bfloat16"`` that was once written as a flat one with a width."""
    if isinstance(content, dict) and content.get(field) == "flat" and content.get("width"):
        return {**content, field: "bfloat16"}
    return content


class PrecisionTrial(_Record):
    """Measurement of the network in one precision, on normal images, on the machine that wrote the bundle.

    Attributes:
        precision: Arithmetic of the network: ``"f32"``, ``"bf16"`` or ``"int8"``.
        milliseconds: Median time for the embeddings of one image, pre-processing included.
        correlation: Spearman's rank correlation of the image scores with those of f32.
        error: Mean relative error of the image scores against f32.
        good: Whether the scores were near enough to f32.
    """

    precision: Precision
    milliseconds: PositiveNumber
    correlation: Annotated[float, Field(ge=-1, le=1)]
    error: PositiveNumber
    good: bool


class File(_Record):
    """Checksum and size of one file.

    Attributes:
        sha256: Checksum, in lower-case hexadecimal digits.
        bytes: Size.
    """

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Count


class SelfTest(_Record):
    """Scores of the test pictures on the machine that wrote the bundle; see :mod:`patchcore_plugin.runtime.self_test`.

    Attributes:
        scores: Raw image score of each test picture.
    """

    scores: Annotated[list[PositiveNumber], Field(min_length=1, max_length=100)]


class Update(_Record):
    """One update by ``patchcore update``.

    Attributes:
        parent: Version of the bundle that was updated.
        date: Time of the update.
        images: Number of new normal images whose patches went into the bank.
        vectors: Number of vectors that the bank gained.
        defects: Number of vectors of known defects that were added; None for none.
    """

    later_fields = ("defects",)

    parent: Annotated[str, Field(pattern="^[0-9a-f]{12}$")]
    date: datetime
    images: Annotated[int, Field(ge=0, le=2**53)]
    vectors: Annotated[int, Field(ge=0, le=2**53)]
    defects: Count | None = None


class RegionRule(_Record):
    """What counts as a region, for the people who look at it. Scores and verdicts do not depend on it.

    Attributes:
        min_area: Least area of a region, in pixels of the image, or in mm² where their size is known.
        mm_per_pixel: Side of a pixel of the image as it is sent, in mm; None if unknown.
        close_gaps: Parts with at most so many pixels of the image between them, down and across, are one region.
    """

    min_area: PositiveNumber = 0
    mm_per_pixel: Annotated[Number, Field(gt=0)] | None = None
    close_gaps: Annotated[int, Field(ge=0, le=MAX_INPUT_SIDE)] = 0


class Member(_Record):
    """One member of an ensemble.

    Attributes:
        backbone: Name of the network that computes its features.
        layers: Names of the backbone's layers whose features make its part of an embedding.
        embedding_dimension: Number of values of that part.
        bank_size: Number of vectors of its bank.
        covering_radius: Largest distance from a training patch to its nearest bank vector, in the backbone's feature units;
            None if unknown.
        index: The index of its bank.
        weight: Factor of its distances, before they are averaged with those of the others; 1 for the first member.
    """

    backbone: Text
    layers: Annotated[list[Text], Field(max_length=100)]
    embedding_dimension: Count
    bank_size: Count
    covering_radius: PositiveNumber | None = None
    index: Index = Index()
    weight: Annotated[Number, Field(gt=0)]


class Manifest(_Record):
    """Content of manifest.json.

    The fields of backbone, bank and index are those of a single model, or of the first member of an ensemble.

    Attributes:
        format_version: Version of the bundle format. Version 12 added the index of reduced vectors, version 11 known
            defects, version 10 the rule for regions, version 9 tiles, version 8 the review band, version 7 the region of
            interest, version 6 further members, version 5 the calibration's sessions, version 4 the intensity range, and
            only bundles that have them are of these versions; what version 3 added has a default, so version 2 can be read.
        name: Name of the model.
        created: Time at which the bundle was written.
        backbone: Name of the network that computes the features.
        layers: Names of the backbone's layers whose features make an embedding.
        members: Further members of an ensemble; empty for a single model.
        preprocessing: Steps from an image to the network's input.
        grid: Rows h and columns w of the patch grid.
        embedding_dimension: Number D of values of an embedding.
        bank_size: Number M of bank vectors.
        coreset_sampling_ratio: Share of the training patches that training kept as bank vectors.
        covering_radius: Largest distance from a training patch to the nearest bank vector, in feature units; None if
            unknown.
        num_neighbors: Neighbors that re-weight the image score; see :class:`patchcore_plugin.scoring.ScoreRule`.
        score_smoothing: Standard deviation, in patches, of the Gaussian that smooths patch distances for the image score.
        index: The memory bank's index.
        precision: Arithmetic of the network. The precision of the bank's vectors is the index's ``storage``.
        precision_trials: Measurements before the precision was chosen; empty where none was made.
        image: How image scores are read.
        pixel: How values of the anomaly map are read.
        regions: What counts as a region; None for every connected part above the pixel threshold.
        calibration: Scores of normal images that were kept out of the bank; None without them.
        self_test: Scores of the test pictures; None in bundles of an older version.
        lineage: Updates since training, the oldest first.
        versions: Version of Python and of each package that wrote the bundle.
        files: Checksum and size of each other file.
    """

    later_fields = ("members", "regions")

    format_version: Literal[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    name: Annotated[Text, Field(min_length=1, max_length=MAX_NAME_LENGTH)]
    created: datetime
    backbone: Text
    layers: Annotated[list[Text], Field(max_length=100)]
    members: Annotated[list[Member], Field(max_length=MAX_MEMBERS - 1)] = []
    preprocessing: Preprocessing
    grid: Size
    embedding_dimension: Count
    bank_size: Count
    coreset_sampling_ratio: Annotated[float, Field(gt=0, le=1)]
    covering_radius: PositiveNumber | None = None
    num_neighbors: Annotated[int, Field(ge=1, le=MAX_NEIGHBORS)]
    score_smoothing: Annotated[float, Field(ge=0, le=MAX_SMOOTHING)] = 0
    index: Index = Index()
    precision: Precision = "f32"
    precision_trials: list[PrecisionTrial] = []
    image: Scale
    pixel: Scale
    regions: RegionRule | None = None
    calibration: Calibration | None = None
    self_test: SelfTest | None = None
    lineage: list[Update] = []
    versions: Annotated[dict[Text, Text], Field(max_length=100)]
    files: dict[FileName, File]

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        later = {
            "intensity_range": (self.preprocessing.intensity_range, 4),
            "sessions": (self.calibration and self.calibration.sessions, 5),
            "members": (self.members, ENSEMBLE_FORMAT),
            "region": (self.preprocessing.region, REGION_FORMAT),
            "tiles": (self.preprocessing.tiles, TILES_FORMAT),
            "review": (self.image.review, REVIEW_FORMAT),
            "regions": (self.regions, REGIONS_FORMAT),
            DEFECTS: (self.files.get(DEFECTS), DEFECTS_FORMAT),
            "review_rate": (self.calibration and self.calibration.review_rate, REVIEW_FORMAT),
            "index 'reduced'": (
                [one for one in (self, *self.members) if one.index.format_version == REDUCED_FORMAT],
                REDUCED_FORMAT,
            ),
        }
        for name, (value, version) in later.items():
            if value not in (None, []) and self.format_version < version:
                msg = f"format_version {self.format_version} has no {name}"
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _check_region(self) -> Self:
        region = self.preprocessing.region
        if region is not None and not len(region.patches(self.grid)):
            msg = "region has the center of no patch"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        required = [name for name, rule in FILES.items() if rule.required]
        if not self.files.keys() >= set(required):
            msg = f"files lists {sorted(self.files)}; a bundle needs {', '.join(required)}"
            raise ValueError(msg)
        for name in self.files:
            missing = [other for other in FILES[name].needs if other not in self.files]
            if missing:
                msg = f"files lists {sorted(self.files)}; {name} needs {', '.join(missing)}"
                raise ValueError(msg)
        banks = [bank for bank, _ in BANKS if bank in self.files]
        if banks != [bank for bank, _ in BANKS[: 1 + len(self.members)]]:
            msg = f"files lists the banks {', '.join(banks)}, and there are {1 + len(self.members)} members"
            raise ValueError(msg)
        return self

    @property
    def all_members(self) -> list[Member]:
        """The members of an ensemble, the first included; of a single model, that one."""
        first = Member(
            backbone=self.backbone,
            layers=self.layers,
            embedding_dimension=self.embedding_dimension,
            bank_size=self.bank_size,
            covering_radius=self.covering_radius,
            index=self.index,
            weight=1,
        )
        return [first, *self.members]

    @staticmethod
    def fields_of(members: Sequence[Member]) -> dict[str, Any]:
        """Fields of a manifest that has these members, the first included."""
        first, *others = members
        fields = {name: getattr(first, name) for name in Member.model_fields if name != "weight"}
        return {**fields, "members": others}

    @property
    def backbones(self) -> str:
        """Names of the members' backbones, as one text."""
        return " + ".join(member.backbone for member in self.all_members)

    @property
    def vectors(self) -> int:
        """Number of vectors of all banks."""
        return sum(member.bank_size for member in self.all_members)

    @property
    def values(self) -> int:
        """Number of values of an embedding, of all members together."""
        return sum(member.embedding_dimension for member in self.all_members)

    @property
    def total_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(file.bytes for file in self.files.values())
