"""PatchCore in torch: images to embeddings to scores."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from anomalib.models.components import DynamicBufferMixin
from torch import nn
from torch.nn import functional as F

from patchcore_plugin.bundle import Tiles
from patchcore_plugin.errors import PatchcoreError, UsageError
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.model.backbone import Backbone
from patchcore_plugin.scoring.scores import (
    ScoreRule,
    Scores,
    anomaly_map,
    farthest_patches,
    image_score,
    reweight,
    weighted_mean,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    Statistics = tuple[tuple[float, ...], tuple[float, ...]]

_TILE_PIXELS = 2**21  # of the tiles that are embedded at once: bounds the memory of their features
_DISTANCE_ROWS = 1024  # of a distance matrix on an accelerator: bounds its memory at 1024 x M values


class MemoryBankError(PatchcoreError, ValueError):
    """The memory bank is missing, unfinished, or does not fit the model."""


class Renormalization(NamedTuple):
    """From pixels as they are normalized for one backbone to those that another one was trained with.

    Attributes:
        factor: Factor of each channel.
        offset: What is added to each channel afterwards.
    """

    factor: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def between(cls, given: Statistics, wanted: Statistics) -> Renormalization | None:
        """Between two means and standard deviations of pixels; None where they are the same."""
        if given == wanted:
            return None
        channels = list(zip(*given, *wanted, strict=True))
        factor = tuple(std / own_std for _, std, _, own_std in channels)
        offset = tuple((mean - own_mean) / own_std for mean, _, own_mean, own_std in channels)
        return cls(factor, offset)


class FaissPatchcoreModel(DynamicBufferMixin, nn.Module):
    """Backbone, patch embeddings and memory bank.

    In training mode :meth:`forward` returns embeddings; in evaluation mode it scores images against ``memory_bank``. On
    a CPU the bank is searched by FAISS; on an accelerator, and where the model is traced for export, by torch.

    An ensemble has further backbones, each with a memory bank of its own. An embedding holds the values of all members, one
    after the other, and each member searches its own values in its own bank. A patch's distance is the mean of the members'
    distances, each multiplied by the member's weight: the spread of the first bank, divided by that of the member's. So
    each has the same say, and scores are in feature units of the first backbone.

    Args:
        layers: Feature layers, shallow to deep. The first sets the resolution of the patch grid.
        backbone: timm model name, or one whose weights an installed package carries, as ``"efficientnet_lite0"``.
        pre_trained: Load ImageNet weights.
        backbone_weights: Local weight file instead of ``pre_trained``.
        dtype: Type of the memory bank and, on an accelerator, of the backbone's arithmetic.
        rule: How patch distances become an image score; ``None`` is the paper's.
        further: The other members of an ensemble.
        renormalization: What the backbone of a further member needs, as images are normalized for the first one.
        tiles: Tiles to embed one by one; None embeds whole images.

    Attributes:
        memory_bank: The coreset (M, D), empty until fitted.
        weight: Weight of a further member; see :func:`spread`.
        covering_radius: Largest distance of any training patch to the coreset, in feature units; NaN until fitted. It
            counts vectors that outlier rejection left out of the bank.
        tiler: anomalib's tiler, set by its tiling callback or by the model's ``tile_size``; None embeds whole images.
        position_weight: Distance, in feature units, by which patches at opposite edges of the image differ through their
            position alone. 0 but in models that version 0.1 trained with this argument.
    """

    memory_bank: torch.Tensor
    covering_radius: torch.Tensor
    weight: torch.Tensor

    def __init__(
        self,
        layers: Sequence[str],
        backbone: str = "wide_resnet50_2",
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        rule: ScoreRule | None = None,
        further: Sequence[FaissPatchcoreModel] = (),
        renormalization: Renormalization | None = None,
        tiles: Tiles | None = None,
    ) -> None:
        super().__init__()
        self.tiler = make_tiler(tiles)
        self.rule = rule or ScoreRule()
        self.position_weight = 0.0
        self.renormalization = renormalization
        self.layers = tuple(layers)
        self.feature_extractor = Backbone(backbone, layers, pre_trained, backbone_weights)
        self.register_buffer("memory_bank", torch.empty(0, dtype=dtype))
        self.register_buffer("covering_radius", torch.tensor(math.nan))
        self.further = nn.ModuleList(further)
        for member in further:
            member.register_buffer("weight", torch.tensor(1.0))
        self._faiss: tuple[torch.Tensor, int, MemoryBank] | None = None

    @property
    def members(self) -> list[FaissPatchcoreModel]:
        """The members of the ensemble, this one first; of a single model, itself."""
        return [self, *self.further]

    @property
    def weights(self) -> list[torch.Tensor | float]:
        """Weights of the members' distances."""
        return [1.0, *(member.weight for member in self.further)]

    @property
    def widths(self) -> list[int]:
        """Values of each member in an embedding."""
        return [member.feature_extractor.channels for member in self.members]

    @property
    def bank_sizes(self) -> list[int]:
        """Number of vectors of each member's bank."""
        return [len(member.memory_bank) for member in self.members]

    @property
    def is_fitted(self) -> bool:
        """Whether every member has a memory bank."""
        return all(member.memory_bank.numel() for member in self.members)

    def weigh_members(self) -> None:
        """Set the members' weights by the spread of their banks; a bank without any keeps the weight 1."""
        first, *others = (spread(member.memory_bank) for member in self.members)
        for member, own in zip(self.further, others, strict=True):
            member.weight.fill_(first / own if first and own else 1.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor | InferenceBatch:
        """Embed or score pre-processed images.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            In training mode the patch embeddings (B, h, w, D). Otherwise image scores ``pred_score`` (B,) and anomaly maps
            ``anomaly_map`` (B, 1, H, W), both raw distances in feature units.

        Raises:
            MemoryBankError: In evaluation mode, if the bank is empty or was built with other features.
        """
        embedding = self.embed(images)
        if self.training:
            return embedding
        return self.score(embedding, images.shape[-2:])

    def embed(self, images: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Embed images.

        Args:
            images: Normalized images (B, 3, H, W).
            network: Function from images or tiles to their embeddings; None computes them here.

        Returns:
            Patch embeddings (B, h, w, D), in the memory bank's type. D counts the values of all members, on the patch grid
            of the first.
        """
        network = network or self._embed
        if self.rule.region is not None:  # patches inside would see what lies outside
            images = images * images.new_tensor(self.rule.region.pixels)
        if self.tiler is None:
            embedding = network(images).to(self.memory_bank.dtype)
        else:
            embedding = self._embed_tiles(images, read_tiles(self.tiler), network)
        if self.position_weight:
            embedding = torch.cat([embedding, self._positions(embedding)], dim=-1)
        return embedding

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        """What :meth:`embed` gives, of images or tiles that are embedded at once."""
        parts = [member._embed_alone(images) for member in self.members]
        if not self.further:
            return parts[0]
        # As section 3.1 brings a backbone's layers to one grid.
        grid = parts[0].shape[1:3]
        parts = [parts[0], *(_resized(part, grid) for part in parts[1:])]
        return torch.cat(parts, dim=-1)

    def _embed_alone(self, images: torch.Tensor) -> torch.Tensor:
        """What :meth:`_embed` gives, of this member alone."""
        if self.renormalization is not None:
            factor, offset = (images.new_tensor(values)[:, None, None] for values in self.renormalization)
            images = images * factor + offset
        images = images.to(next(self.feature_extractor.parameters()).dtype)
        # A CPU computes float16 convolutions a hundred times slower than float32 ones: there only the bank is halved.
        half = self.memory_bank.dtype == torch.float16 and images.device.type != "cpu"
        with torch.no_grad(), torch.autocast(images.device.type, torch.float16) if half else nullcontext():
            features = self.feature_extractor(images)
            # Section 3.1: each patch is averaged with its 3 x 3 neighborhood, then layers are brought to one grid.
            features = [F.avg_pool2d(feature, kernel_size=3, stride=1, padding=1) for feature in features]
            grid = features[0].shape[-2:]
            features[1:] = [F.interpolate(feature, size=grid, mode="bilinear") for feature in features[1:]]
            embedding = torch.cat(features, dim=1)
        return embedding.permute(0, 2, 3, 1).to(self.memory_bank.dtype)

    def _embed_tiles(
        self, images: torch.Tensor, tiles: Tiles, network: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """What :meth:`embed` gives, put together from the embeddings of tiles, of which a few are computed at a time.

        Raises:
            UsageError: If the images cannot be cut into these tiles.
        """
        size, (height, width) = (int(images.shape[2]), int(images.shape[3])), tiles.size
        inspected = self.rule.region and self.rule.region.pixels
        try:
            places = tiles.places(size, inspected)
            below, right = (after - side for after, side in zip(tiles.padded(size), size, strict=True))
            images = F.pad(images, (0, right, 0, below))
            joined, count = None, max(1, _TILE_PIXELS // (len(images) * height * width))
            for start in range(0, len(places), count):
                cut = [images[..., top : top + height, left : left + width] for top, left in places[start : start + count]]
                found = network(torch.cat(cut)).float()
                if joined is None:
                    layout = tiles.layout(size, (int(found.shape[1]), int(found.shape[2])), inspected)
                    joined = found.new_zeros(len(images), *layout.grid, found.shape[-1])
                windows = layout.windows[start : start + count]
                for tile, (rows, columns) in zip(found.split(len(images)), windows, strict=True):
                    joined[:, rows, columns] += tile[:, : rows.stop - rows.start, : columns.stop - columns.start]
        except ValueError as error:
            msg = f"These images cannot be tiled: {error}. Set tile_size and tile_stride, or anomalib's tiling callback."
            raise UsageError(msg) from error
        return (joined / joined.new_tensor(layout.counts)[..., None]).to(self.memory_bank.dtype)

    def _positions(self, embedding: torch.Tensor) -> torch.Tensor:
        """Row and column (B, h, w, 2) of each patch, from 0 to ``position_weight`` across the image."""
        rows, columns = embedding.shape[1:3]
        axes = [(torch.arange(size, device=embedding.device) + 0.5) / size for size in (rows, columns)]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) * self.position_weight
        return positions.to(embedding.dtype).expand(embedding.shape[0], -1, -1, -1)

    def score(self, embedding: torch.Tensor, size: Sequence[int], upsampling: str = "bilinear") -> InferenceBatch:
        """Score patch embeddings.

        Args:
            embedding: Patch embeddings (B, h, w, D).
            size: Height and width of the anomaly maps, in pixels.
            upsampling: As in :func:`patchcore_plugin.scoring.scores.anomaly_map`.

        Returns:
            What :meth:`forward` does in evaluation mode.

        Raises:
            MemoryBankError: If the bank is empty or was built with other features.
            UsageError: If the embeddings hold NaN or infinite values.
        """
        return self.with_maps(self.raw_scores(embedding), size, upsampling)

    def raw_scores(self, embedding: torch.Tensor) -> Scores:
        """Score patch embeddings (B, h, w, D), without maps; see :meth:`score`."""
        self._check_bank(embedding)
        if not _is_traced() and not bool(embedding.isfinite().all()):
            msg = (
                "The backbone gives NaN or infinite features for these images. With 16-bit precision features can overflow: "
                "use float32. Otherwise check the images, and the backbone's weights for NaN."
            )
            raise UsageError(msg)
        with _without_autocast(embedding):
            embedding = embedding.float()
            inspected = self.rule.inspected(embedding)
            queries = self.split(inspected.reshape(-1, embedding.shape[-1]))
            found = [member._search(own, 1) for member, own in zip(self.members, queries, strict=True)]
            distances = weighted_mean([distances[:, 0] for distances, _ in found], self.weights)
            distances = distances.reshape(inspected.shape[:-1])
            rows = farthest_patches(distances)
            patch = self.rule.on_grid(distances, embedding.shape[1:3])
            neighbors = min(self.rule.num_neighbors, *(len(member.memory_bank) for member in self.members))
            support = [
                member._support(own[rows], indices[rows, 0], neighbors)
                for member, own, (_, indices) in zip(self.members, queries, found, strict=True)
            ]
            return Scores(reweight(image_score(patch, self.rule), weighted_mean(support, self.weights)), patch)

    def with_maps(self, scores: Scores, size: Sequence[int], upsampling: str = "bilinear") -> InferenceBatch:
        """Add the anomaly maps to scores; see :meth:`score`."""
        with _without_autocast(scores.patch):
            maps = anomaly_map(scores.patch, (size[0], size[1]), upsampling, region=self.rule.region)
        return InferenceBatch(pred_score=scores.image, anomaly_map=maps[:, None])

    def _check_bank(self, embedding: torch.Tensor) -> None:
        """Refuse banks that are empty or do not go with embeddings (B, h, w, D)."""
        if not self.is_fitted:
            msg = (
                "The memory bank is empty, so nothing can be scored. Train first (Engine.fit, or `anomalib train`), or load "
                "a trained checkpoint (ckpt_path=...)."
            )
            raise MemoryBankError(msg)
        flat = all(member.memory_bank.ndim == 2 for member in self.members)
        if not flat or sum(member.memory_bank.shape[1] for member in self.members) != embedding.shape[-1]:
            shapes = ", ".join(str(tuple(member.memory_bank.shape)) for member in self.members)
            layers = ", ".join(str(list(member.layers)) for member in self.members)
            msg = (
                f"The memory bank has shape {shapes}, but layers {layers} give embeddings of {embedding.shape[-1]} values. "
                "It was built with another backbone or other layers: train again, or restore the backbone and layers it was "
                "trained with."
            )
            raise MemoryBankError(msg)

    def split(self, embeddings: torch.Tensor) -> Sequence[torch.Tensor]:
        """Values (N, D) of each member, contiguous, in embeddings (N, D) of all."""
        if not self.further:
            return [embeddings]
        return [part.contiguous() for part in embeddings.split(self.widths, dim=-1)]

    def _support(self, queries: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
        """Distances (B, b) of patches (B, D) to the ``count`` neighbors of bank vectors (B,)."""
        vectors = self.memory_bank.float()
        _, neighbors = self._search(vectors[indices], count)
        around = vectors[neighbors.reshape(-1)].reshape(*neighbors.shape, -1)
        return (queries[:, None] - around).square().sum(2).sqrt()

    def _search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and bank indices (N, k) of the nearest bank vectors, nearest first."""
        if queries.device.type == "cpu" and not _is_traced():
            distances, indices = self._faiss_bank().search(queries.numpy(), k)
            return torch.from_numpy(distances), torch.from_numpy(indices)
        vectors = self.memory_bank.float()
        if _is_traced():
            return nearest_by_product(queries, vectors, k)
        blocks = [nearest_by_product(rows, vectors, k) for rows in queries.split(_DISTANCE_ROWS)]
        distances, indices = zip(*blocks, strict=True)
        return torch.cat(distances), torch.cat(indices)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "covering_radius", torch.tensor(math.nan))  # older checkpoints have none
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _faiss_bank(self) -> MemoryBank:
        """FAISS bank of the buffer's present content."""
        buffer = self.memory_bank
        version = -1 if buffer.is_inference() else buffer._version  # inference tensors count no versions
        if self._faiss is None or self._faiss[0] is not buffer or self._faiss[1] != version:
            self._faiss = (buffer, version, MemoryBank(buffer.detach().float().numpy()))
        return self._faiss[2]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the FAISS bank out of pickles and copies: it is built again from the buffer."""
        return {**self.__dict__, "_faiss": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read torch exports (.pt) of version 0.1 too, which hold the score rule's fields one by one."""
        if "rule" not in state:
            known = {field.name for field in fields(ScoreRule)} & state.keys()
            state = {"position_weight": 0.0, "rule": ScoreRule(**{name: state[name] for name in known}), **state}
        super().__setstate__({"renormalization": None, **state})
        if "further" not in self._modules:
            self.further = nn.ModuleList()


def make_tiler(tiles: Tiles | None) -> Tiler | None:
    """Make the tiler of anomalib that cuts into these tiles."""
    return tiles and Tiler(tiles.size, tiles.stride)


def read_tiles(tiler: Tiler) -> Tiles:
    """The tiles of anomalib's tiler.

    Raises:
        UsageError: If the tiler resizes instead of padding, or leaves the border of tiles out.
    """
    if tiler.mode != ImageUpscaleMode.PADDING:
        mode = ImageUpscaleMode(tiler.mode).value  # it may be text
        msg = f"Tiling mode {mode!r} would resize embeddings like images; use mode 'padding'."
        raise UsageError(msg)
    if tiler.remove_border_count:
        msg = (
            f"remove_border_count={tiler.remove_border_count} leaves patches without an embedding; use 0, and a stride "
            "below the tile size, which averages what overlaps."
        )
        raise UsageError(msg)
    return Tiles(size=(tiler.tile_size_h, tiler.tile_size_w), stride=(tiler.stride_h, tiler.stride_w))


def spread(vectors: torch.Tensor) -> float:
    """Root mean square distance of vectors (M, D) from their mean, in feature units: how large a member's distances are."""
    return float(vectors.double().var(0, correction=0).sum().sqrt())


def _resized(embedding: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Embeddings (B, h, w, D) on another grid, in their own type."""
    if not _is_traced() and embedding.shape[1:3] == grid:
        return embedding
    resized = F.interpolate(embedding.permute(0, 3, 1, 2).float(), size=grid, mode="bilinear")
    return resized.permute(0, 2, 3, 1).to(embedding.dtype)


def _without_autocast(values: torch.Tensor) -> AbstractContextManager[Any]:
    """Compute in float32 whatever the trainer's precision: bf16 has three digits."""
    device = values.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def nearest_by_product(queries: torch.Tensor, vectors: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the nearest vectors by one matrix product; distances are taken again by differences, which lose no digits.

    Args:
        queries: Vectors (N, D), float32.
        vectors: Vectors (M, D), float32, to search in.
        k: Vectors to find for each query.

    Returns:
        Distances and indices (N, k) of the nearest vectors, nearest first.
    """
    mean = vectors.mean(0)  # what both sides share would cost the product its digits
    centered = vectors - mean
    squared = centered.square().sum(1) - 2 * (queries - mean) @ centered.T  # without |query|^2, the same all along a row
    indices = squared.argmin(1, keepdim=True) if k == 1 else squared.topk(k, dim=1, largest=False).indices
    found = vectors[indices.reshape(-1)].reshape(-1, k, vectors.shape[1])
    distances = (queries[:, None] - found).square().sum(2).sqrt()
    if k == 1:
        return distances, indices
    distances, order = distances.sort(dim=1)
    return distances, indices.gather(1, order)
