"""A model's embeddings as a network of OpenVINO: what an export writes, and what a training tries before its work."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from itertools import chain
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import torch
from torch import nn

from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.torch_model import read_tiles
from patchcore_plugin.side_effects import without_side_effects

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_plugin.model.torch_model import FaissPatchcoreModel

TOLERANCE = 1e-3
"""Largest difference of an embedding's value from the model's, as a share of the largest value."""


class Embedding(nn.Module):
    """Pre-processed images (B, 3, H, W) to embeddings (B, h, w, D), float32, by a copy of a model on the CPU.

    Weights and memory bank that are on the CPU in float32 are the model's own, and not copied.

    Args:
        model: The model.
        part: Embed what a network does at once: a tile of a tiled model, whose pixels outside the region of interest are
            hidden already.
    """

    def __init__(self, model: FaissPatchcoreModel, *, part: bool = False) -> None:
        super().__init__()
        tensors = chain(model.parameters(), model.buffers())
        shared = {id(tensor): tensor for tensor in tensors if (tensor.device.type, tensor.dtype) == ("cpu", torch.float32)}
        self.model = copy.deepcopy(model, shared).cpu().float().eval()
        if part:
            self.model.tiler = None
            self.model.rule = replace(self.model.rule, region=None)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images."""
        return self.model.embed(images)


def convert(model: FaissPatchcoreModel, height: int, width: int) -> ov.Model:
    """Convert a model to a network of pre-processed images or tiles (B, 3, H, W) of one size.

    Raises:
        Exception: Whatever torch and OpenVINO raise where they cannot trace or convert a backbone.
    """
    embedding = Embedding(model, part=True)
    for member in embedding.model.members:
        member.feature_extractor.fix_image_size(height, width)
    example = torch.zeros(2, 3, height, width)
    # OpenVINO's own trace checks itself, which takes several times as long; here, the network is compared with the model.
    with torch.no_grad(), warnings.catch_warnings(), without_side_effects():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of the trace that OpenVINO asks for
        traced = torch.jit.trace(embedding, example, strict=False, check_trace=False)
        return ov.convert_model(traced, example_input=example, input=[-1, 3, height, width])


def difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference of embeddings from the expected ones, as a share of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_conversion(model: FaissPatchcoreModel, images: torch.Tensor) -> None:
    """Refuse a backbone that cannot be exported.

    Not tried are backbones of convolutions and batch normalizations alone, whose operations OpenVINO has.

    Args:
        model: The model, on any device, in any precision.
        images: Pre-processed images (B, 3, H, W).

    Raises:
        UsageError: If OpenVINO cannot convert the backbone, or computes other features.
    """
    if all(member.feature_extractor.is_convolutional for member in model.members):
        return
    height, width = images.shape[-2:] if model.tiler is None else read_tiles(model.tiler).size
    images = images[:1, :, :height, :width].float().cpu()
    try:
        network = ov.compile_model(convert(model, height, width), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = network([images.numpy()])[0]
        error = difference(found, Embedding(model, part=True)(images).numpy())
    except Exception as error:  # a trace runs the backbone's own code
        raise _refused(height, width, shorten(f"{type(error).__name__}: {error}", 300)) from error
    if not error <= TOLERANCE:
        raise _refused(height, width, f"its features there differ from torch's by {error:.2g} of the largest")


def _refused(height: int, width: int, reason: str) -> UsageError:
    return UsageError(
        f"This backbone could be trained, but not exported: OpenVINO cannot compute it for images of {height} x {width} "
        f"pixels ({reason}). Choose another backbone or image size."
    )
