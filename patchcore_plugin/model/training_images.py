"""Which images of a training count, and which are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler

# Normal images of the validation set that a checkpoint keeps, 400 KB each at 256 x 256, and bytes of all of them.
_HELD_OUT, _HELD_OUT_BYTES = 32, 2**25


def expected_images(trainer: Trainer) -> int | None:
    """Images that an epoch gives to this process, at most; None if unknown."""
    loader = trainer.train_dataloader
    try:
        images = len(loader.sampler)
    except (AttributeError, TypeError):  # an iterable data set, or several loaders
        return None
    return min(images, int(min(trainer.num_training_batches, images)) * (loader.batch_size or images))


def own_images(loader: Any, seen: int, size: int) -> int:
    """How many of this process's next ``size`` training images are its own, after ``seen`` others.

    A distributed sampler makes all processes' shares equally large, and repeats images for that. They come last.
    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return size
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
    return max(0, min(size, own - seen))


def check_finite(embedding: torch.Tensor, paths: Sequence[str] | None) -> None:
    """Refuse embeddings (B, h, w, D) that are NaN or infinite, by the names of their images.

    Raises:
        ValueError: If any is.
    """
    bad = (~embedding.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        names = f" for {', '.join(str(paths[i]) for i in bad[:3])}" if paths else ""
        more = f" and {len(bad) - 3} more" if paths and len(bad) > 3 else ""
        msg = (
            f"The backbone gives NaN or infinite features{names}{more}. With precision='float16' features can overflow: use "
            "'float32'. Otherwise check these images, and the backbone's weights for NaN."
        )
        raise ValueError(msg)


def hold_out(kept: torch.Tensor | None, normal: torch.Tensor) -> torch.Tensor | None:
    """Some normal images, by which an export chooses index and precision: those kept, and of these what there is room for.

    Args:
        kept: Pre-processed images (B, 3, H, W), float16, or None.
        normal: Further ones, of any type. Without a resize to one size, those of another size are left out.
    """
    if not len(normal):
        return kept
    normal = normal.half().cpu()
    if kept is None:
        kept = normal[:0]
    if normal.shape[1:] != kept.shape[1:]:
        return kept
    room = min(_HELD_OUT, max(1, _HELD_OUT_BYTES // normal[0].nbytes)) - len(kept)
    with torch.autocast("cpu", enabled=False):  # of bfloat16, which refuses to join float16 images
        return torch.cat([kept, normal[: max(room, 0)]])
