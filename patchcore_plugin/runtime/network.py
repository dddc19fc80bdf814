"""The network of a bundle, compiled by OpenVINO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from patchcore_plugin.cpu import compile_options, cores
from patchcore_plugin.runtime.network_cache import cache_file, compile_or_restore

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# OpenVINO makes its tables of NumPy's types when they are first used, and hangs for ever where two threads do so at once.
ov.Tensor(np.zeros(1, np.uint8), shared_memory=True).element_type.to_dtype()

INPUT, NORMALISED = "images", "normalised"
"""Names, in the IR, of its input and of the backbone's: pre-processing begins and ends with them."""


class Network:
    """From an image to its patch embeddings.

    Args:
        path: The IR, with its weights beside it.
        precision: ``"f32"``, ``"bf16"`` (of the backbone; the pre-processing stays f32) or ``"int8"``, which is in the IR.
        mode: ``"latency"`` for one image with all threads, ``"throughput"`` for as many images as threads.
        threads: All cores by default.
        cache: Folder to keep the compiled network in; see :mod:`patchcore_plugin.runtime.network_cache`. None keeps nothing.

    Attributes:
        shape: Rows and columns of the patch grid, and values of an embedding; None where the IR leaves one open.

    Raises:
        RuntimeError: If OpenVINO cannot read or compile it.
    """

    def __init__(
        self,
        path: Path,
        precision: str = "f32",
        mode: Literal["latency", "throughput"] = "latency",
        threads: int | None = None,
        cache: Path | None = None,
    ) -> None:
        options = compile_options(mode, threads or cores())
        core = ov.Core()
        # A mapped file must not change: where someone copied another over it, the process would be killed by the system.
        core.set_property({"ENABLE_MMAP": False})
        # Without a hint, OpenVINO computes in bfloat16 where the CPU has it, and scores move with the machine.
        parts = {"f32": lambda: _read(core, path)}
        if precision == "bf16":
            parts = {"f32": lambda: preprocessing(core, path), "bf16": lambda: _backbone(core, path)}
        self._parts = []
        for hint, read in parts.items():
            hinted = {**options, "INFERENCE_PRECISION_HINT": hint}
            kept = None if cache is None else cache_file(cache, path, {**hinted, "parts": len(parts)}, core)
            self._parts.append(compile_or_restore(core, read, hinted, kept))
        shape = self._parts[-1].output(0).partial_shape
        fixed = len(shape) == 4 and all(size.is_static for size in list(shape)[1:])
        self.shape = tuple(size.get_length() for size in list(shape)[1:]) if fixed else None

    def request(self) -> Request:
        """Buffers to compute one image at a time in; one for each thread that does."""
        return Request(self._parts)


_LARGE = 16_000_000  # values; OpenVINO keeps the buffers of the largest image, four bytes a value


class Request:
    """One image on its way through a :class:`Network`."""

    def __init__(self, parts: list[ov.CompiledModel]) -> None:
        self._parts = parts
        self._requests = [part.create_infer_request() for part in parts]

    def embed(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Patch embeddings (1, h, w, D) of an RGB image (H, W, 3), u8."""
        values = image[None]
        for request in self._requests:  # nothing is copied in, and what comes out is good until the next image
            values = request.infer([values], share_inputs=True, share_outputs=True)[0]
        found = values.copy()
        if image.size > _LARGE:
            for part in self._parts:
                part.release_memory()
        return found


def preprocessing(core: ov.Core, path: Path) -> ov.Model:
    """The steps of the IR at ``path`` up to the backbone's input."""
    network = _read(core, path)
    return ov.Model([_normalised(network)], network.get_parameters())


def _read(core: ov.Core, path: Path) -> ov.Model:
    """The IR, for one image at a time: fixed sizes behind the resize are a sixth faster."""
    network = core.read_model(path)
    network.reshape([1, -1, -1, 3])
    return network


def _backbone(core: ov.Core, path: Path) -> ov.Model:
    """What comes after the IR's pre-processing."""
    network = _read(core, path)
    end = _normalised(network)
    images = ops.parameter(end.partial_shape, np.float32)
    end.replace(images.output(0))
    return ov.Model(network.outputs, [images])


def _normalised(network: ov.Model) -> ov.Output:
    for node in network.get_ops():
        if node.get_friendly_name() == NORMALISED:
            return node.output(0)
    msg = f"the network has no node {NORMALISED!r}"
    raise RuntimeError(msg)
