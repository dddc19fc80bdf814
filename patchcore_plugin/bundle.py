"""The bundle: the folder that training hands to serving.

    manifest.json   what the model is, how to read its scores, and the sha256 of every other file
    features.xml    OpenVINO IR: RGB images (B, H, W, 3) u8, of any size, to embeddings (B, h, w, D) f32
    features.bin    its weights
    bank.faiss      the memory bank and its index
    bank.npy        neighbours of each bank vector, for the image score

and, where it is known which training image each bank vector comes from (:mod:`patchcore_plugin.origins`):

    origins.npy     image, row and column of each bank vector
    sources.json    the images' names
    thumbnails.npy  the images themselves, made small; on request

A bundle is whole or absent: it is written beside its place and moved there, and nothing of it is used before every file
matches its checksum. Nothing in it is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import uuid
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError, model_validator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

FORMAT_VERSION = 3
_READABLE = (2, 3)  # what format 3 added may be absent
MANIFEST, FEATURES, WEIGHTS = "manifest.json", "features.xml", "features.bin"
BANK, NEIGHBORS = "bank.faiss", "bank.npy"
ORIGINS, SOURCES, THUMBNAILS = "origins.npy", "sources.json", "thumbnails.npy"
_FILES = (FEATURES, WEIGHTS, BANK, NEIGHBORS)
_OPTIONAL = (ORIGINS, SOURCES, THUMBNAILS)
_NAMES = {MANIFEST, *_FILES, *_OPTIONAL}
_MANIFEST_LIMIT = 1 << 20  # bytes; a manifest has about two thousand, and of the largest calibration 800,000

IndexKind = Literal["flat", "ivf", "hnsw"]
Storage = Literal["float32", "float16", "int8"]
Precision = Literal["f32", "bf16", "int8"]

MAX_WIDTH = 65_536
"""Greatest width of a search in the memory bank."""

MAX_CALIBRATION = 10_000
"""Most calibration images that a bundle keeps."""

Size = tuple[Annotated[int, Field(ge=1, le=16384)], Annotated[int, Field(ge=1, le=16384)]]
Triple = tuple[FiniteFloat, FiniteFloat, FiniteFloat]


class BundleError(ValueError):
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
    """What the bundle answered where it was written; see :mod:`patchcore_plugin.self_test`.

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
    files: dict[
        Literal["features.xml", "features.bin", "bank.faiss", "bank.npy", "origins.npy", "sources.json", "thumbnails.npy"],
        File,
    ]

    @model_validator(mode="after")
    def _all_files_listed(self) -> Self:
        if not self.files.keys() >= set(_FILES):
            msg = f"files lists {sorted(self.files)}, expected {', '.join(_FILES)}"
            raise ValueError(msg)
        if (ORIGINS in self.files) != (SOURCES in self.files) or (THUMBNAILS in self.files and SOURCES not in self.files):
            msg = f"files lists {sorted(self.files)}: {ORIGINS} and {SOURCES} come together, {THUMBNAILS} with them only"
            raise ValueError(msg)
        return self

    @property
    def total_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(file.bytes for file in self.files.values())


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the bundle at ``path``, without looking at its other files.

    Raises:
        BundleError: If there is no bundle, or its manifest is damaged or of another version.
    """
    if not path.is_dir():
        msg = f"There is no bundle folder {path}. `patchcore export CHECKPOINT BUNDLE` writes one."
        raise BundleError(msg)
    file = path / MANIFEST
    try:
        if file.stat().st_size > _MANIFEST_LIMIT:
            msg = f"{file} is larger than {_MANIFEST_LIMIT} bytes: no manifest of a bundle."
            raise BundleError(msg)
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        msg = f"{path} is no bundle: {MANIFEST} is missing."
        raise BundleError(msg) from error
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, BundleError):
            raise
        msg = f"{file} is damaged: {error}"
        raise BundleError(msg) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in _READABLE:
        known = " and ".join(map(str, _READABLE))
        msg = (
            f"{file} has bundle format {version!r}; this patchcore-plugin reads formats {known}. Export the model "
            "again, or install the version that wrote the bundle."
        )
        raise BundleError(msg)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])
        msg = f"{file} is not valid: {problems}"
        raise BundleError(msg) from error


def verify(path: Path, manifest: Manifest) -> None:
    """Compare every file of a bundle with its checksum.

    Raises:
        BundleError: If a file is missing, or its size or content differs from the manifest's.
    """
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            msg = f"{path} is incomplete: {name} is missing. Export or copy the bundle again."
            raise BundleError(msg)
        size = file.stat().st_size
        if size != expected.bytes:
            msg = f"{file} has {size} bytes, its manifest says {expected.bytes}. Export or copy the bundle again."
            raise BundleError(msg)
        if _sha256(file) != expected.sha256:
            msg = f"{file} does not match its checksum: it is damaged or not the file that was exported."
            raise BundleError(msg)


def version_of(path: Path) -> str:
    """A bundle's version: the first 12 digits of the sha256 of its manifest, which covers all other files' checksums.

    Raises:
        BundleError: If the manifest cannot be read.
    """
    try:
        return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:12]
    except OSError as error:
        msg = f"{path / MANIFEST} cannot be read: {error}"
        raise BundleError(msg) from error


def describe_files(folder: Path) -> dict[str, File]:
    """Checksums and sizes of a bundle's files, for its manifest."""
    names = [*_FILES, *(name for name in _OPTIONAL if (folder / name).is_file())]
    return {name: File(sha256=_sha256(folder / name), bytes=(folder / name).stat().st_size) for name in names}


def describe_versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of installed packages, for a manifest."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill, and move it to ``path`` at the end.

    On any error, an interrupt too, nothing new is left and what was at ``path`` is there still.

    Raises:
        BundleError: If ``path`` exists and is not to be overwritten or is no bundle, or the folder cannot be written.
    """
    path = path.resolve()  # through a link, the folder that it names is replaced
    if path.exists():
        if not overwrite:
            msg = f"{path} exists already. Choose another folder, or pass --overwrite (overwrite=True)."
            raise BundleError(msg)
        if not path.is_dir() or not {MANIFEST} <= {file.name for file in path.iterdir()} <= _NAMES:
            msg = f"{path} is no bundle, or holds more than one; it is not overwritten."
            raise BundleError(msg)
    unique = uuid.uuid4().hex[:8]
    draft, old = path.with_name(f".{path.name}.{unique}.tmp"), path.with_name(f".{path.name}.{unique}.old")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        msg = f"The folder {path} cannot be written: {error}"
        raise BundleError(msg) from error
    try:
        yield draft
        try:
            if path.exists():
                path.rename(old)
            draft.rename(path)
        except OSError as error:
            msg = f"The bundle cannot be moved to {path}: {error}. Is a file of the old one in use?"
            raise BundleError(msg) from error
    finally:
        if old.exists():
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(path)
        shutil.rmtree(draft, ignore_errors=True)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
