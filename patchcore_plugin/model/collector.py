"""The patch embeddings of one training pass, from batches of images to the memory bank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from patchcore_plugin.bundle.origins import Origins, locate_patches
from patchcore_plugin.coreset.embedding_store import EmbeddingStore
from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.training_images import check_finite, own_images

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib.data import Batch

    from patchcore_plugin.coreset.sampler import GreedyCoreset


class FittedBank(NamedTuple):
    """A memory bank as training makes it.

    Attributes:
        vectors: The coreset (M, D).
        radius: Largest distance of any training patch to the coreset, in feature units.
        origins: Training image, row and column of each vector; None where the images had no paths.
    """

    vectors: torch.Tensor
    radius: float
    origins: Origins | None


class PatchCollector:
    """Collects the patch embeddings of a training's normal images, and reduces them to the memory bank.

    Args:
        sampler: Picks the memory bank.
        dtype: Type in which the embeddings are held.
        expected_images: Images that the training gives to this process, at most; None if unknown.
        budget: Bytes that the embeddings and the coreset may take; ``None`` takes most of the free memory.
        processes: Processes that share this machine's memory.

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
    ) -> None:
        self.sampler = sampler
        self.dtype = dtype
        self.expected_images = expected_images
        self.budget = budget
        self.processes = processes
        self.anomalous = 0
        self._seen = 0
        self._store: EmbeddingStore | None = None
        self._images: list[tuple[str, int, int]] = []  # path, and rows and columns of the patch grid

    @property
    def patches(self) -> int:
        """Number of patch embeddings so far."""
        return 0 if self._store is None else self._store.rows

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
        check_finite(embedding, paths)
        held = embedding.to(self.dtype)
        if not held.to(embedding.dtype).isfinite().all():
            msg = "The backbone's features are too large for float16: use 'bfloat16' or 'float32' for embedding_dtype."
            raise UsageError(msg)
        images, rows, columns, dimension = embedding.shape
        if self._store is None:
            self._store = self._new_store(self.expected_images and self.expected_images * rows * columns)
        self._store.append(held.reshape(-1, dimension))
        self._images += [(path and str(Path(path).absolute()), rows, columns) for path in paths or [""] * images]

    def totals(self, group: torch.distributed.ProcessGroup | None, device: torch.device) -> tuple[int, int]:
        """Patch embeddings and anomalous images of all processes in a group."""
        counts = torch.tensor([self.patches, self.anomalous], device=device)
        if group is not None:
            torch.distributed.all_reduce(counts, group=group)
        patches, anomalous = counts.tolist()
        return patches, anomalous

    def reduce_to_bank(self, group: torch.distributed.ProcessGroup | None) -> FittedBank:
        """Reduce the embeddings of all processes in a group to the memory bank, and forget them."""
        store = self._store or self._new_store(0)  # this process has none; others have
        self._store = None
        vectors = store.reduce_to_bank(group)
        return FittedBank(vectors, store.radius_, self._origins(store.numbers_, group))

    def _new_store(self, expected_rows: int | None) -> EmbeddingStore:
        return EmbeddingStore(self.sampler, self.dtype, expected_rows, self.budget, self.processes)

    def _origins(self, numbers: torch.Tensor, group: torch.distributed.ProcessGroup | None) -> Origins | None:
        """Where patches come from whose numbers count those of all processes by rank."""
        shares = [self._images]
        if group is not None:
            shares = [[] for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather_object(shares, self._images, group=group)
        images, self._images = [image for share in shares for image in share], []
        return locate_patches(numbers.numpy(), images) if all(path for path, *_ in images) else None
