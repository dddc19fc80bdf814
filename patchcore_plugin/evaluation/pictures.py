"""Pictures of the most informative test images of a job: image, heatmap and ground truth side by side."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from matplotlib import colormaps
from PIL import Image
from torchvision.transforms.v2 import Normalize

from patchcore_plugin.model.deep_images import read_scaled

if TYPE_CHECKING:
    from pathlib import Path

    from anomalib.models import AnomalibModule

_GALLERY_SIZE = 6  # images
_PICTURE_HEIGHT = 160  # pixels


def draw_pictures(
    model: AnomalibModule, dataset: Any, labels: list[int], scores: list[float], kinds: list[str], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Draw the worst misses, the worst false alarms, and for each kind of defect the image with the median score.

    All heatmaps of a job share one color scale: blue is the lowest value in these pictures, red the highest.

    Args:
        model: A trained model in evaluation mode.
        dataset: anomalib's data set of the test images, in the order of the other arguments.
        labels: 1 for anomalous images, 0 for normal ones.
        scores: Raw image scores.
        kinds: Kind of each image; for a defective image, its kind of defect.
        folder: Folder for the JPEG files.

    Returns:
        Entries by the name of their gallery. An entry has ``file``, ``index`` in the data set, and ``masked``, which says
        whether the picture includes the ground truth.
    """
    chosen = _choose(labels, scores, kinds)
    indices = sorted({index for gallery in chosen.values() for index in gallery})
    views = {index: _view(model, dataset[index]) for index in indices}
    maps = [heat for _, heat, _ in views.values() if heat is not None]
    low, high = (min(map(np.min, maps)), max(map(np.max, maps))) if maps else (0, 1)
    entries = {}
    for index, (image, heat, mask) in views.items():
        panels = [image]
        if heat is not None:
            colors = colormaps["turbo"]((heat - low) / max(high - low, 1e-12))[..., :3]
            panels.append(0.4 * image + 0.6 * colors)
        if mask is not None:
            panels.append(np.repeat(mask[..., None], 3, axis=2).astype(float))
        strip = Image.fromarray((np.concatenate(panels, axis=1) * 255).round().astype(np.uint8))
        file = f"{index}.jpg"
        strip.resize((strip.width * _PICTURE_HEIGHT // strip.height, _PICTURE_HEIGHT)).save(folder / file, quality=80)
        entries[index] = {"file": file, "index": index, "masked": mask is not None}
    return {name: [entries[index] for index in gallery] for name, gallery in chosen.items()}


def _choose(labels: list[int], scores: list[float], kinds: list[str]) -> dict[str, list[int]]:
    """Choose the indices of the images in each gallery."""
    by_score = sorted(range(len(scores)), key=lambda index: (scores[index], index))
    defects = defaultdict(list)
    for index in by_score:
        if labels[index]:
            defects[kinds[index]].append(index)
    return {
        "misses": [index for index in by_score if labels[index]][:_GALLERY_SIZE],
        "false_alarms": [index for index in reversed(by_score) if not labels[index]][:_GALLERY_SIZE],
        "defects": [found[len(found) // 2] for _, found in sorted(defects.items())][:_GALLERY_SIZE],
    }


def _view(model: AnomalibModule, item: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Image ``(H, W, 3)`` in [0, 1] at the size of the network's input, anomaly map ``(H, W)`` and mask ``(H, W)``."""
    image, mask = item.image[None], item.gt_mask
    if getattr(model, "intensity_range", None) is not None:  # the data set has clipped it
        image = read_scaled(item.image_path, model.intensity_range)[None]
    transform = model.pre_processor.transform if model.pre_processor is not None else None
    if transform is not None:
        image, mask = (transform(image), None) if mask is None else transform(image, mask)
    with torch.inference_mode():
        heat = model.model(image.to(model.device)).anomaly_map
    shown = image[0].float()
    for normalize in extract_transforms_by_type(transform, Normalize) if transform is not None else []:
        shown = shown * torch.tensor(normalize.std)[:, None, None] + torch.tensor(normalize.mean)[:, None, None]
    return (
        shown.clamp(0, 1).permute(1, 2, 0).numpy(),
        None if heat is None else heat.float().squeeze().cpu().numpy(),
        None if mask is None else mask.squeeze().bool().cpu().numpy(),
    )
