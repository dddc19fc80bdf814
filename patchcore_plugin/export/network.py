"""The model's network as an OpenVINO file, and the proof that it computes what the model does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import torch

from patchcore_plugin.bundle import BundleError
from patchcore_plugin.errors import writing
from patchcore_plugin.export.preprocessing_graph import with_preprocessing
from patchcore_plugin.model.conversion import TOLERANCE, Embedding, convert, difference
from patchcore_plugin.runtime.network import Network, NetworkFiles

if TYPE_CHECKING:
    from pathlib import Path

    from patchcore_plugin.bundle import Preprocessing
    from patchcore_plugin.model.lightning_model import FaissPatchcore


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
        BundleError: If the embeddings have another shape, or differ by more than
            :data:`patchcore_plugin.model.conversion.TOLERANCE`.
    """
    save_network(with_preprocessing(convert(model.model, *recipe.network_size), recipe), path)
    network = Network(NetworkFiles.read(path), recipe=recipe)
    _compare(network, recipe, model)
    return network


def save_network(network: ov.Model, path: Path) -> None:
    """Write a network as OpenVINO IR (``.xml``), and its weights in float32 beside it (``.bin``).

    Raises:
        OSError: If a file cannot be written.
    """
    with writing(path):
        ov.save_model(network, path, compress_to_fp16=False)


def _compare(network: Network, recipe: Preprocessing, model: FaissPatchcore) -> None:
    """Refuse a network whose embeddings are not the model's."""
    shape = (2, recipe.resize[0] + 37, recipe.resize[1] + 11, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.no_grad():
        transformed = model.pre_processor.transform(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        expected = Embedding(model.model)(transformed.cpu()).numpy()
    if network.shape != expected.shape[1:]:
        msg = f"The exported network gives embeddings of shape {network.shape}, the model of shape {expected.shape[1:]}."
        raise BundleError(msg)
    embedder = network.embedder()
    found = np.concatenate([embedder.embed(image) for image in images])
    error = difference(found, expected)
    if not error <= TOLERANCE:
        msg = f"The exported network differs from the model by {error:.2g} of its largest feature; nothing was written."
        raise BundleError(msg)
