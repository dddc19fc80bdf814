"""Which images of a training count, and which are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DistributedSampler

from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Trainer

_HELD_OUT_IMAGES, _HELD_OUT_BYTES = 32, 2**25  # that a checkpoint keeps, at most; an image of 256 x 256 has 400 KB


def expected_images(trainer: Trainer) -> int | None:
    """Images that an epoch gives to this process, at most; None if unknown."""
    loader = trainer.train_dataloader
    try:
        images = len(loader.sampler)
    except (AttributeError, TypeError):  # an iterable data set, or several loaders
        return None
    return min(images, int(min(trainer.num_training_batches, images)) * (loader.batch_size or images))


def images_of(loaders: Any) -> int | None:
    """Number of images that data loaders hold, at most; None if unknown."""
    try:
        return sum(len(loader.dataset) for loader in (loaders if isinstance(loaders, list | tuple) else [loaders]))
    except (AttributeError, TypeError):
        return None


def own_images(loader: Any, seen: int, size: int) -> int:
    """How many of this process's next images are its own.

    A distributed sampler makes the shares of all processes equally large, and repeats images for that. The repeated images
    come last.

    Args:
        loader: The data loader of the images.
        seen: Images that this process has got before.
        size: Number of the next images.
    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return size
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
    return max(0, min(size, own - seen))


def check_finite(embedding: torch.Tensor, paths: Sequence[str] | None) -> None:
    """Refuse embeddings that are NaN or infinite, and name their images.

    Args:
        embedding: Patch embeddings (B, h, w, D).
        paths: Paths of the B images, if they have any.

    Raises:
        UsageError: If any embedding is NaN or infinite.
    """
    bad = (~embedding.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        names = f" for {', '.join(str(paths[i]) for i in bad[:3])}" if paths else ""
        more = f" and {len(bad) - 3} more" if paths and len(bad) > 3 else ""
        msg = (
            f"The backbone gives NaN or infinite features{names}{more}. With precision='float16' features can overflow: use "
            "'float32'. Otherwise check these images, and the backbone's weights for NaN."
        )
        raise UsageError(msg)


def no_normal_image(model: str, anomalous: int = 0) -> str:
    """The message for a training set without normal images.

    Args:
        model: Name of the model.
        anomalous: Anomalous images in the training set.
    """
    found = f" It has {anomalous} anomalous ones." if anomalous else ""
    return (
        f"The training set has no normal image, and {model} learns from normal images only.{found} Check the data section "
        "of the config: normal_dir (or the data set's training split) must hold defect-free images."
    )


def hold_out(kept: torch.Tensor | None, normal: torch.Tensor) -> torch.Tensor | None:
    """Append normal images to the held-out images until there are enough. An export measures on them.

    Args:
        kept: Pre-processed held-out images (B, 3, H, W), float16; None for none yet.
        normal: Further images, of any type. Images of another size than the first are left out.

    Returns:
        The held-out images.
    """
    if not len(normal):
        return kept
    normal = normal.half().cpu()
    if kept is None:
        kept = normal[:0]
    if normal.shape[1:] != kept.shape[1:]:
        return kept
    room = min(_HELD_OUT_IMAGES, max(1, _HELD_OUT_BYTES // normal[0].nbytes)) - len(kept)
    with torch.autocast("cpu", enabled=False):  # autocast to bfloat16 refuses to join float16 images
        return torch.cat([kept, normal[: max(room, 0)]])
