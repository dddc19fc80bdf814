"""The network of a bundle, compiled by OpenVINO."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from patchcore_plugin.bundle import BundleError, FileContent, read_file
from patchcore_plugin.cpu import cores, keep_after_fork
from patchcore_plugin.runtime.device import CPU, choose, computed_in, device_facts, device_options
from patchcore_plugin.runtime.network_cache import cache_file, compile_or_restore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from typing_extensions import Self

    from patchcore_plugin.bundle import Precision, Preprocessing, TileLayout
    from patchcore_plugin.cpu import Mode

# OpenVINO fills its table of NumPy's types at first use, and hangs forever where two threads do so at once.
ov.Tensor(np.zeros(1, np.uint8), shared_memory=True).element_type.to_dtype()

INPUT, NORMALIZED = "images", "normalised"
"""Names of two nodes in the network file: the network's input, and the backbone's. Pre-processing lies between them."""

PLACE, MASK = "place", "mask"
"""Names of further inputs of a network that embeds tiles: first row and column of a tile, and what of it is inspected."""

_LARGE_IMAGE_VALUES = 16_000_000  # OpenVINO keeps buffers for the largest image so far, four bytes a value


class NetworkFiles(NamedTuple):
    """The files of a network in OpenVINO's format (IR).

    Attributes:
        model: Content of the network file (``.xml``).
        weights: Content of the file of its weights (``.bin``).
    """

    model: FileContent
    weights: FileContent

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a network file, and the weights beside it."""
        return cls(read_file(path), read_file(path.with_suffix(".bin")))


class Network:
    """Computes the patch embeddings of images.

    Args:
        files: The network's files.
        precision: Arithmetic: ``"f32"``, ``"bf16"`` (of the backbone; the pre-processing stays f32) or ``"int8"``, which
            is part of the file.
        mode: ``"latency"`` for one image with all threads, ``"throughput"`` for as many images at once as threads.
        threads: Number of threads; all cores by default.
        cache: Folder that keeps the compiled network; see :mod:`patchcore_plugin.runtime.network_cache`. None keeps nothing.
        recipe: Pre-processing that the file must have; None, for a network without tiles, checks nothing. A network from
            the cache was checked before.
        device: Device that computes the backbone; see :func:`patchcore_plugin.runtime.device.check_device`.

    Attributes:
        device: The device that computes it: of AUTO, the one that OpenVINO chose.
        arithmetic: What the device computes in: the precision, or another one where it lacks that.
        shape: Rows and columns of the patch grid, and values of an embedding; None where the file leaves one of them open.

    Raises:
        RuntimeError: If OpenVINO cannot read or compile the file.
        BundleError: If the file has another pre-processing, or the patches of its tiles do not lie on one grid.
    """

    def __init__(
        self,
        files: NetworkFiles,
        precision: Precision = "f32",
        mode: Mode = "latency",
        threads: int | None = None,
        cache: Path | None = None,
        recipe: Preprocessing | None = None,
        device: str = CPU,
    ) -> None:
        core = ov.Core()
        self.device = choose(core, device, lambda: _read_backbone(core, files))
        hint = "bf16" if precision == "bf16" else "f32"
        if (self.device, hint) == (CPU, "f32"):
            parts = [_Part(CPU, "f32", lambda: _read_checked(core, files, recipe, _read))]
        else:
            parts = [
                _Part(CPU, "f32", lambda: _read_checked(core, files, recipe, read_preprocessing)),
                _Part(self.device, hint, lambda: _read_backbone(core, files)),
            ]
        checksums, about = [file.sha256 for file in files], {"parts": len(parts), "recipe": recipe}
        self._parts = []
        for part in parts:
            options = device_options(core, part.device, part.precision, mode, threads or cores())
            kept = None
            if cache is not None:
                kept = cache_file(cache, checksums, {**options, **about}, device_facts(core, part.device))
            self._parts.append(compile_or_restore(core, part.read, part.device, options, kept))
        self.arithmetic = precision if precision == "int8" else computed_in(self._parts[-1], self.device, hint)
        shape = self._parts[-1].output(0).partial_shape
        fixed = len(shape) == 4 and all(size.is_static for size in list(shape)[1:])
        self.shape = tuple(size.get_length() for size in list(shape)[1:]) if fixed else None
        self._tiled = None
        if recipe is not None and recipe.tiles is not None and fixed:
            *cells, values = self.shape
            try:
                self._tiled = _Tiled(recipe, recipe.layout(tuple(cells)))
            except ValueError as error:
                msg = f"{files.model.path} does not go with the manifest: {error}."
                raise BundleError(msg) from error
            self.shape = (*self._tiled.layout.grid, values)
        keep_after_fork(self)

    def embedder(self) -> Embedder:
        """Make the buffers for one image at a time. Each thread that embeds needs its own."""
        return Embedder(self._parts, self._tiled)


class _Part(NamedTuple):
    device: str
    precision: Precision
    read: Callable[[], ov.Model]


class _Tiled(NamedTuple):
    recipe: Preprocessing
    layout: TileLayout


def network_inputs(image: NDArray[np.uint8], recipe: Preprocessing) -> Iterator[list[NDArray]]:
    """The inputs of a network for an image: of one that embeds tiles, for each tile.

    Args:
        image: RGB image (H, W, 3), u8.
        recipe: The network's pre-processing.

    Returns:
        For each call of the network, the image (1, H, W, 3); for a tile also its first row and column (2,), int32, and
        whether each of its pixels (1, 1, h, w), float32, is inspected: 1, or 0.
    """
    if recipe.tiles is None:
        yield [image[None]]
        return
    (height, width), inspected = recipe.tiles.size, recipe.region and recipe.region.pixels
    for top, left in recipe.tiles.places(recipe.size, inspected):
        mask = np.zeros((1, 1, height, width), np.float32)
        bottom, right = min(top + height, recipe.size[0]), min(left + width, recipe.size[1])
        inside = 1 if inspected is None else inspected[top:bottom, left:right]
        mask[0, 0, : bottom - top, : right - left] = inside
        yield [image[None], np.int32([top, left]), mask]


class Embedder:
    """Buffers of a :class:`Network` for one image at a time."""

    def __init__(self, parts: list[ov.CompiledModel], tiled: _Tiled | None) -> None:
        self._parts, self._tiled = parts, tiled
        self._requests = [part.create_infer_request() for part in parts]
        keep_after_fork(self)

    def embed(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Patch embeddings (1, h, w, D), float32, of an RGB image (H, W, 3), u8, of any size."""
        embedding = self._run([image[None]]).copy() if self._tiled is None else self._embed_tiles(image, *self._tiled)
        if image.size > _LARGE_IMAGE_VALUES:
            self._parts[0].release_memory()  # the one that takes images of any size, on the CPU
        return embedding

    def _embed_tiles(self, image: NDArray[np.uint8], recipe: Preprocessing, layout: TileLayout) -> NDArray[np.float32]:
        """The embedding of an image, put together from those of its tiles."""
        joined = None
        for inputs, (rows, columns) in zip(network_inputs(image, recipe), layout.windows, strict=True):
            tile = self._run(inputs)
            if joined is None:
                joined = np.zeros((1, *layout.grid, tile.shape[-1]), np.float32)
            joined[:, rows, columns] += tile[:, : rows.stop - rows.start, : columns.stop - columns.start]
        if layout.overlap:
            joined /= layout.counts[..., None]
        return joined

    def _run(self, values: list[NDArray]) -> NDArray[np.float32]:
        """The network's output, which is valid until the next run."""
        for request in self._requests:  # inputs are not copied
            values = [request.infer(values, share_inputs=True, share_outputs=True)[0]]
        return values[0]


def read_preprocessing(core: ov.Core, files: NetworkFiles) -> ov.Model:
    """Read the steps of a network file up to the backbone's input."""
    network = _read(core, files)
    return ov.Model([_find_normalized(network)], network.get_parameters())


def _read(core: ov.Core, files: NetworkFiles) -> ov.Model:
    """Read a network file for one image at a time: fixed sizes after the resize are faster by a sixth."""
    model = bytes(files.model.data)
    if not model.lstrip().startswith(b"<"):  # OpenVINO reads other formats too, some of which open further files
        msg = "the file is no XML"
        raise RuntimeError(msg)
    network = core.read_model(model, bytes(files.weights.data))
    network.reshape({INPUT: [1, -1, -1, 3]})
    return network


def _read_backbone(core: ov.Core, files: NetworkFiles) -> ov.Model:
    """Read the steps of a network file after its pre-processing."""
    network = _read(core, files)
    normalized = _find_normalized(network)
    images = ops.parameter(normalized.partial_shape, np.float32)
    normalized.replace(images.output(0))
    return ov.Model(network.outputs, [images])


def _read_checked(
    core: ov.Core, files: NetworkFiles, recipe: Preprocessing | None, read: Callable[[ov.Core, NetworkFiles], ov.Model]
) -> ov.Model:
    """Read a network file, or a part of it; its pre-processing must be that of a recipe, if there is one."""
    if recipe is not None:
        steps = read_preprocessing(core, files)
        shape, (height, width) = steps.output(0).partial_shape, recipe.network_size
        if shape != ov.PartialShape([1, 3, height, width]):
            msg = f"{files.model.path} has an input of {shape[3]} x {shape[2]} pixels, the manifest says {width} x {height}."
            raise BundleError(msg)
        if not _computes(core.compile_model(steps, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}), recipe):
            msg = f"{files.model.path} resizes, crops or normalizes otherwise than the manifest says."
            raise BundleError(msg)
    return read(core, files)


def _computes(steps: ov.CompiledModel, recipe: Preprocessing) -> bool:
    """Whether the steps of a network are those of a recipe.

    A column of pixels as high as the resized image, and a row as wide, show it: resizing leaves their values as they are.
    """
    rng = np.random.default_rng(0)
    column = rng.integers(0, 256, (recipe.resize[0], 1, 3), np.uint8)
    row = rng.integers(0, 256, (1, recipe.resize[1], 3), np.uint8)
    (top, left), (height, width) = recipe.offset, recipe.size
    for image, seen in ((column, column[top : top + height]), (row, row[:, left : left + width])):
        expected = np.broadcast_to(((seen / 255 - recipe.mean) / recipe.std).transpose(2, 0, 1), (3, height, width))
        if recipe.region is not None:
            expected = expected * recipe.region.pixels
        for inputs in network_inputs(image, recipe):
            part = expected
            if recipe.tiles is not None:
                (top, left), mask = inputs[1], inputs[2][0]
                part = np.zeros((3, *mask.shape[1:]))
                within = expected[:, top : top + mask.shape[1], left : left + mask.shape[2]]
                part[:, : within.shape[1], : within.shape[2]] = within
            if not np.allclose(steps(inputs)[0][0], part, atol=1e-3):
                return False
    return True


def _find_normalized(network: ov.Model) -> ov.Output:
    for node in network.get_ops():
        if node.get_friendly_name() == NORMALIZED:
            return node.output(0)
    msg = f"the network has no node {NORMALIZED!r}"
    raise RuntimeError(msg)
