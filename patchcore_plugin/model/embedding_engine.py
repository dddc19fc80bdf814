"""Patch embeddings of a training on a CPU by OpenVINO: the network that a bundle serves fits, validates and tests too."""

from __future__ import annotations

import logging
from itertools import chain
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import openvino as ov
import torch

from patchcore_plugin.cpu import compile_options, keep_after_fork
from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.conversion import TOLERANCE, Embedding, convert, difference
from patchcore_plugin.model.torch_model import read_tiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from patchcore_plugin.model.torch_model import FaissPatchcoreModel

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "torch", "openvino"]
"""What embeds images on a CPU. ``"auto"`` is OpenVINO where it can, and where there are images enough."""

_MIN_IMAGES = 64  # from which OpenVINO saves more time than its conversion of the network takes


class EmbeddingEngine:
    """Chooses what embeds images, and keeps the networks that OpenVINO compiled.

    OpenVINO embeds on the CPU, in float32. Under autocast, with a backbone in another type, and on an accelerator, torch
    does. A network is compiled for each size of images, and again where the backbone's weights have changed.

    Args:
        name: What the user asks for.

    Raises:
        UsageError: If there is no engine of that name.
    """

    def __init__(self, name: str) -> None:
        if name not in get_args(EngineName):
            msg = f"embedding_engine must be one of {', '.join(get_args(EngineName))}; got {name!r}."
            raise UsageError(msg)
        self.name: EngineName = name
        self._networks: dict[tuple[int, int], EmbeddingNetwork] = {}
        self._weights: list[tuple[int, int]] = []
        self._failed = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave networks out of pickles and copies: they are compiled again."""
        return {**self.__dict__, "_networks": {}, "_weights": []}

    def network(self, model: FaissPatchcoreModel, images: torch.Tensor, count: int | None) -> EmbeddingNetwork | None:
        """Give the network that embeds images in place of torch; of a tiled model, their tiles.

        Args:
            model: The model.
            images: Pre-processed images (B, 3, H, W).
            count: Number of images of this pass; None if unknown.

        Returns:
            The network, whose embeddings are those of the model within
            :data:`patchcore_plugin.model.conversion.TOLERANCE`. None where torch embeds.

        Raises:
            UsageError: If OpenVINO is asked for, and fails.
        """
        if self.name == "torch" or self._failed:
            return None
        tensors = [images, *(tensor for part in model.members for tensor in _weights(part.feature_extractor))]
        hindrance = _hindrance(tensors)
        if hindrance is not None:
            if self.name == "openvino":
                msg = f"embedding_engine='openvino' embeds on a CPU in float32, but {hindrance}: leave it at 'auto'."
                raise UsageError(msg)
            return None
        weights = [(part.data_ptr(), 0 if part.is_inference() else part._version) for part in tensors[1:]]
        if weights != self._weights:
            self._networks, self._weights = {}, weights
        whole = (int(images.shape[2]), int(images.shape[3]))
        size = whole if model.tiler is None else read_tiles(model.tiler).size
        if count is not None:
            count = count * max(1, whole[0] * whole[1] // (size[0] * size[1]))
            if self.name == "auto" and count < _MIN_IMAGES:  # also where the network is there: a fit again is the same fit
                return None
        if size not in self._networks:
            try:
                self._networks[size] = EmbeddingNetwork(model, *size)
            except UsageError:  # the backbone takes no images of this size
                raise
            except Exception as error:  # a trace runs the backbone's own code, and OpenVINO raises nearly any
                reason = shorten(f"{type(error).__name__}: {error}", 300)
                if self.name == "openvino":
                    msg = f"OpenVINO cannot embed images of {size[0]} x {size[1]} pixels with this backbone: {reason}"
                    raise UsageError(msg) from error
                logger.warning("OpenVINO cannot embed with this backbone, so torch does, which is slower: %s", reason)
                self._failed = True
                return None
            logger.info("Images of %d x %d pixels are embedded by OpenVINO.", *size)
        return self._networks[size]


class EmbeddingNetwork:
    """A model's network of pre-processed images or tiles of one size, compiled by OpenVINO.

    It has as many threads as torch.

    Args:
        model: The model, on the CPU.
        height: Height of the images or tiles, in pixels.
        width: Width, in pixels.

    Raises:
        ValueError: If its embeddings are not the model's.
        Exception: Whatever torch and OpenVINO raise where they cannot convert a backbone.
    """

    def __init__(self, model: FaissPatchcoreModel, height: int, width: int) -> None:
        network, threads = convert(model, height, width), torch.get_num_threads()
        network.reshape([1, 3, height, width])  # fixed sizes are faster
        options = {**compile_options("throughput", threads), "INFERENCE_PRECISION_HINT": "f32"}
        self._requests = ov.AsyncInferQueue(ov.Core().compile_model(network, "CPU", options), threads)
        self._requests.set_callback(_keep)
        keep_after_fork(self)
        images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        error = difference(self(images).numpy(), Embedding(model, part=True)(images).numpy())
        if not error <= TOLERANCE:
            msg = f"its embeddings differ from torch's by {error:.2g} of the largest value"
            raise ValueError(msg)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Patch embeddings (B, h, w, D), float32, of pre-processed images or tiles (B, 3, H, W)."""
        found: list[np.ndarray | None] = [None] * len(images)
        for number, image in enumerate(images.contiguous().numpy()):
            self._requests.start_async([image[None]], (found, number), share_inputs=True)
        self._requests.wait_all()
        return torch.from_numpy(np.concatenate(found))


def _keep(request: ov.InferRequest, place: tuple[list[np.ndarray | None], int]) -> None:
    found, number = place
    found[number] = request.get_output_tensor().data.copy()


def _weights(backbone: nn.Module) -> Iterator[torch.Tensor]:
    return chain(backbone.parameters(), backbone.buffers())


def _hindrance(tensors: Sequence[torch.Tensor]) -> str | None:
    """Why OpenVINO does not embed images, the first of the tensors, by the weights that follow; None where it does."""
    if tensors[0].device.type != "cpu":
        return f"the images are on {tensors[0].device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "the trainer computes in mixed precision"
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if dtypes != {torch.float32}:
        return f"backbone or images are of type {', '.join(str(dtype) for dtype in dtypes - {torch.float32})}"
    return None
