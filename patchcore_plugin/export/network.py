"""The model's network as an OpenVINO file, and the proof that it computes what the model does."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import torch
from torch import nn

from patchcore_plugin.bundle import BundleError
from patchcore_plugin.errors import writing
from patchcore_plugin.export.preprocessing_graph import with_preprocessing
from patchcore_plugin.runtime.network import Network, NetworkFiles

if TYPE_CHECKING:
    from pathlib import Path

    from patchcore_plugin.bundle import Preprocessing
    from patchcore_plugin.model.lightning_model import FaissPatchcore

TOLERANCE = 1e-3
"""Largest difference of an embedding's value from the model's, as a share of the largest value."""


def write_network(model: FaissPatchcore, recipe: Preprocessing, path: Path) -> Network:
    """Write the network from RGB images to embeddings as OpenVINO IR, and compare its embeddings with the model's.

    Args:
        model: A model, on any device, in any precision.
        recipe: The model's pre-processing.
        path: File to write (``.xml``); its weights are written beside it (``.bin``).

    Returns:
        The network, compiled from the file.

    Raises:
        OSError: If a file cannot be written.
        BundleError: If the embeddings have another shape, or differ by more than :data:`TOLERANCE`.
    """
    embedding = _Embedding(model)
    height, width = recipe.size
    example = torch.zeros(2, 3, height, width)
    ir = with_preprocessing(ov.convert_model(embedding, example_input=example, input=[-1, 3, height, width]), recipe)
    save_network(ir, path)
    network = Network(NetworkFiles.read(path))
    _compare(network, embedding, recipe, model)
    return network


def save_network(network: ov.Model, path: Path) -> None:
    """Write a network as OpenVINO IR (``.xml``), and its weights in float32 beside it (``.bin``).

    Raises:
        OSError: If a file cannot be written.
    """
    with writing(path):
        ov.save_model(network, path, compress_to_fp16=False)


class _Embedding(nn.Module):
    """Pre-processed images (B, 3, H, W) to embeddings (B, h, w, D), float32, on the CPU."""

    def __init__(self, model: FaissPatchcore) -> None:
        super().__init__()
        self.model = copy.deepcopy(model.model).cpu().float().eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.embed(images)


def _compare(network: Network, embedding: _Embedding, recipe: Preprocessing, model: FaissPatchcore) -> None:
    """Refuse a network whose embeddings are not the model's."""
    shape = (2, recipe.resize[0] + 37, recipe.resize[1] + 11, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.no_grad():
        transformed = model.pre_processor.transform(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        expected = embedding(transformed.cpu()).numpy()
    if network.shape != expected.shape[1:]:
        msg = f"The exported network gives embeddings of shape {network.shape}, the model of shape {expected.shape[1:]}."
        raise BundleError(msg)
    embedder = network.embedder()
    found = np.concatenate([embedder.embed(image) for image in images])
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE:
        msg = f"The exported network differs from the model by {error:.2g} of its largest feature; nothing was written."
        raise BundleError(msg)
