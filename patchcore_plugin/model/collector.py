"""The patch embeddings of one training pass, from batches of images to the memory bank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from patchcore_plugin.bundle.origins import Origins, locate_patches
from patchcore_plugin.coreset.embedding_store import EmbeddingStore
from patchcore_plugin.coreset.outliers import find_outliers
from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.augmentation import Change
from patchcore_plugin.model.region import check_patches
from patchcore_plugin.model.training_images import check_finite, own_images

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anomalib.data import Batch
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import RegionOfInterest
    from patchcore_plugin.coreset.sampler import GreedyCoreset


class FittedBank(NamedTuple):
    """A memory bank as training makes it.

    Attributes:
        vectors: The coreset (M, D).
        radius: Largest distance of any training patch to the coreset, in feature units.
        origins: Training image, row and column of each vector; None where the images had no paths.
        outliers: Vectors of the coreset that were left out.
    """

    vectors: torch.Tensor
    radius: float
    origins: Origins | None
    outliers: int


class _Grid(NamedTuple):
    """The patch grid of an image, or of a changed copy of one.

    Attributes:
        path: Absolute path of the image; "" if it has none.
        rows: Rows of the image's grid.
        columns: Columns of the image's grid.
        change: What makes the copy out of the image.
        back: How many grids before this one the image's own lies; 0 for the image itself.
    """

    path: str
    rows: int
    columns: int
    change: Change = Change()
    back: int = 0


class PatchCollector:
    """Collects the patch embeddings of a training's normal images, and reduces them to the memory bank.

    Args:
        sampler: Picks the memory bank.
        dtype: Type in which the embeddings are held.
        expected_images: Images that the training gives to this process, at most, copies included; None if unknown.
        budget: Bytes that the embeddings and the coreset may take; ``None`` takes most of the free memory.
        processes: Processes that share this machine's memory.
        outlier_rejection: Deviations beyond which a vector of the coreset is left out, as in
            :func:`patchcore_plugin.coreset.outliers.find_outliers`; ``None`` keeps them all.
        region: Pixels of the network's input whose patches are learned; None learns all.
        widths: Values of an embedding that belong to each member of an ensemble; ``None`` without one. Each member gets a
            coreset of its own.

    Attributes:
        anomalous: Images that were left out because they are labeled anomalous.
    """

    def __init__(
        self,
        sampler: GreedyCoreset,
        dtype: torch.dtype,
        expected_images: int | None,
        budget: float | None = None,
        processes: int = 1,
        outlier_rejection: float | None = None,
        widths: Sequence[int] | None = None,
        region: RegionOfInterest | None = None,
    ) -> None:
        self.sampler = sampler
        self.dtype = dtype
        self.expected_images = expected_images
        self.budget = budget
        self.processes = processes
        self.outlier_rejection = outlier_rejection
        self.widths = widths
        self.region = region
        self.anomalous = 0
        self._seen = 0
        self._stores: list[EmbeddingStore] = []
        self._grids: list[_Grid] = []

    @property
    def patches(self) -> int:
        """Number of patch embeddings so far."""
        return self._stores[0].rows if self._stores else 0

    def select(self, batch: Batch, loader: Any) -> tuple[torch.Tensor, list[str] | None]:
        """Select the images of a batch to learn from: normal ones, each in one process only.

        Args:
            batch: A training batch.
            loader: The data loader that it comes from.

        Returns:
            The images (B, 3, H, W) and their paths, if they have any.
        """
        images, paths = batch.image, batch.image_path
        use = torch.ones(len(images), dtype=torch.bool)
        use[own_images(loader, self._seen, len(images)) :] = False
        self._seen += len(images)
        if batch.gt_label is not None:
            anomalous = (batch.gt_label != 0).cpu()
            self.anomalous += int((anomalous & use).sum())
            use &= ~anomalous
        if not use.all():
            images = images[use.to(images.device)]
            paths = [path for path, used in zip(paths, use, strict=True) if used] if paths else None
        return images, paths

    def add(self, embedding: torch.Tensor, paths: Sequence[str] | None) -> None:
        """Add the patch embeddings (B, h, w, D) of some images, in the memory bank's type.

        Raises:
            UsageError: If an embedding is NaN or infinite, or too large for the type in which embeddings are held; or if
                the memory budget is far too small.
        """
        images, rows, columns, _ = embedding.shape
        self._append(embedding, paths)
        self._grids += [_Grid(path and str(Path(path).absolute()), rows, columns) for path in paths or [""] * images]

    def add_copies(self, embedding: torch.Tensor, paths: Sequence[str] | None, change: Change) -> None:
        """Add the patch embeddings (B, h, w, D) of copies of the images that were added last by :meth:`add`.

        Args:
            embedding: The embeddings, in the order of the images; a quarter turn swaps h and w.
            paths: Paths of the images, if they have any.
            change: What made the copies.

        Raises:
            UsageError: As :meth:`add` does.
        """
        self._append(embedding, paths)
        last = self._grids[-len(embedding) :]
        self._grids += [grid._replace(change=change, back=grid.back + len(last)) for grid in last]

    def _append(self, embedding: torch.Tensor, paths: Sequence[str] | None) -> None:
        check_finite(embedding, paths)
        held = embedding.to(self.dtype)
        if not held.to(embedding.dtype).isfinite().all():
            msg = "The backbone's features are too large for float16: use 'bfloat16' or 'float32' for embedding_dtype."
            raise UsageError(msg)
        images, rows, columns, dimension = embedding.shape
        held = held.reshape(images, rows * columns, dimension)
        if self.region is not None:
            inspected = check_patches(self.region, (rows, columns))
            held = held[:, torch.from_numpy(inspected).to(held.device)]
        if not self._stores:
            self._stores = self._new_stores(self.expected_images and self.expected_images * held.shape[1])
        parts = held.reshape(-1, dimension).split(self.widths or dimension, dim=1)
        for store, part in zip(self._stores, parts, strict=True):
            store.append(part)

    def totals(self, group: torch.distributed.ProcessGroup | None, device: torch.device) -> tuple[int, int]:
        """Patch embeddings and anomalous images of all processes in a group."""
        counts = torch.tensor([self.patches, self.anomalous], device=device)
        if group is not None:
            torch.distributed.all_reduce(counts, group=group)
        patches, anomalous = counts.tolist()
        return patches, anomalous

    def reduce_to_banks(self, group: torch.distributed.ProcessGroup | None) -> list[FittedBank]:
        """Reduce the embeddings of all processes in a group to the memory bank, and forget them.

        Returns:
            The bank; of an ensemble, that of each member.
        """
        stores = self._stores or self._new_stores(0)  # this process has none; others have
        self._stores = []
        grids = self._grids_of_all(group)

        def find(bank: torch.Tensor, numbers: torch.Tensor, rows: torch.Tensor, row_numbers: torch.Tensor) -> torch.Tensor:
            image_of = _image_numbers(grids, rows.device)
            numbers, row_numbers = (self._in_grids(torch.as_tensor(part), grids) for part in (numbers, row_numbers))
            return find_outliers(bank, image_of(numbers), rows, image_of(row_numbers), self.outlier_rejection, group)

        images = [(grid.path, grid.rows, grid.columns) for grid in grids] if all(grid.path for grid in grids) else None
        banks = []
        for store in stores:
            vectors = store.reduce_to_bank(group, find if self.outlier_rejection is not None else None)
            origins = None
            if images is not None:
                numbers = self._in_grids(store.numbers_, grids).numpy()
                origins = locate_patches(_in_originals(numbers, grids), images)
            banks.append(FittedBank(vectors, store.radius_, origins, store.outliers_))
        return banks

    def _in_grids(self, numbers: torch.Tensor, grids: Sequence[_Grid]) -> torch.Tensor:
        """Numbers of patches among those of whole grids, from those among the inspected patches; all grids are alike."""
        if self.region is None or not grids:
            return numbers
        _, rows, columns, *_ = grids[0]
        inspected = torch.from_numpy(self.region.patches((rows, columns))).to(numbers.device)
        return numbers // len(inspected) * (rows * columns) + inspected[numbers % len(inspected)]

    def _new_stores(self, expected_rows: int | None) -> list[EmbeddingStore]:
        """A store for each member, each with a share of the memory by its number of values."""
        widths = self.widths or [1]
        return [
            EmbeddingStore(self.sampler, self.dtype, expected_rows, self.budget, self.processes, width / sum(widths))
            for width in widths
        ]

    def _grids_of_all(self, group: torch.distributed.ProcessGroup | None) -> list[_Grid]:
        """Patch grids of the images and copies of all processes by rank; this process's are forgotten."""
        shares = [self._grids]
        if group is not None:
            shares = [[] for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather_object(shares, self._grids, group=group)
        self._grids = []
        return [grid for share in shares for grid in share]


def _image_numbers(grids: Sequence[_Grid], device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Function from numbers of patches to numbers of their images; an image has one number, with its copies and repeats."""
    ends = torch.tensor([grid.rows * grid.columns for grid in grids], device=device).cumsum(0)
    first: dict[str, int] = {}
    same = [first.setdefault(grid.path, place) if grid.path else place - grid.back for place, grid in enumerate(grids)]
    numbers_of = torch.tensor(same).to(device)
    return lambda numbers: numbers_of[torch.searchsorted(ends, numbers, right=True)]


def _in_originals(numbers: NDArray[np.int64], grids: Sequence[_Grid]) -> NDArray[np.int64]:
    """Replace the number of each copy's patch by that of the same patch in the image itself; all count grid by grid."""
    starts = np.cumsum([0, *(grid.rows * grid.columns for grid in grids)])
    places = np.searchsorted(starts, numbers, side="right") - 1
    first = starts[places - np.array([grid.back for grid in grids])[places]]
    within = numbers - starts[places]
    kinds = {grid[1:4]: number for number, grid in enumerate(grids)}
    kind = np.array([kinds[grid[1:4]] for grid in grids])[places]
    for (rows, columns, change), number in kinds.items():
        mine = kind == number
        within[mine] = change.origins(rows, columns).numpy()[within[mine]]
    return first + within
