"""FaissPatchcore: PatchCore as an anomalib model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from anomalib import LearningType, PrecisionType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from patchcore_plugin.bundle import RegionOfInterest, Tiles
from patchcore_plugin.bundle.origins import Origins
from patchcore_plugin.coreset.memory import GIB
from patchcore_plugin.coreset.sampler import GreedyCoreset
from patchcore_plugin.depth import IntensityRange, check_intensity_range
from patchcore_plugin.errors import PatchcoreError, UsageError
from patchcore_plugin.model.arguments import (
    check_ensemble,
    check_image_size,
    check_normalization,
    check_numbers,
    check_tiles,
    dtype_of_bank,
    dtype_of_embeddings,
)
from patchcore_plugin.model.augmentation import PixelScale, changes_of, check_augmentations
from patchcore_plugin.model.checkpoints import CheckedIO, CheckpointTeller, check_checkpoint
from patchcore_plugin.model.collector import PatchCollector
from patchcore_plugin.model.conversion import check_conversion
from patchcore_plugin.model.data_checks import check_data, set_up
from patchcore_plugin.model.deep_images import check_dataset, find_intensity_range, read_again
from patchcore_plugin.model.embedding_engine import EmbeddingEngine
from patchcore_plugin.model.exclusion import leave_out
from patchcore_plugin.model.graph_info import add_model_info
from patchcore_plugin.model.post_processing import ConformalPostProcessor
from patchcore_plugin.model.pre_processing import (
    Normalization,
    build_pre_processor,
    normalization_of,
    renormalization,
)
from patchcore_plugin.model.region import build_region, check_region, mask_size
from patchcore_plugin.model.scored_images import ScoredImages
from patchcore_plugin.model.spade import refuse_spade
from patchcore_plugin.model.torch_model import FaissPatchcoreModel, MemoryBankError, make_tiler, read_tiles
from patchcore_plugin.model.training_images import expected_images, hold_out, images_of, no_normal_image
from patchcore_plugin.model.visualizer import ParallelImageVisualizer
from patchcore_plugin.model.weights import weights_follow, weights_from_checkpoint
from patchcore_plugin.scoring import ScoreRule
from patchcore_plugin.side_effects import without_side_effects

logger = logging.getLogger(__name__)

_GRAPH_BANK_BYTES = 2**30  # of a memory bank in a graph, at most; an ONNX file ends at 2 GiB


class FaissPatchcore(MemoryBankMixin, AnomalibModule):
    """PatchCore with an exact, fast coreset and a memory bank searched by FAISS.

    The model takes the place of anomalib's ``Patchcore``, whose arguments keep their name, meaning and default. Source: Roth
    et al., "Towards Total Recall in Industrial Anomaly Detection", arXiv 2106.08265.

    With several devices (``devices: 2``, ``strategy: ddp``) each process embeds its share of the images, and all processes
    pick the coreset together. Each gets the bank that a single process would have picked, as long as the embeddings fit into
    the memory budget.

    Args:
        backbone: Any timm model that supports ``features_only`` and that OpenVINO can compute, or ``"efficientnet_lite0"``
            (or 1, 2), whose ImageNet weights come from an installed package, with no model hub.
        layers: Feature layers by timm's module names, shallow to deep (``"layer2"``, ``"blocks.2"``). A transformer has
            none of the default's.
        pre_trained: Whether to load the backbone's ImageNet weights.
        coreset_sampling_ratio: Share of the training patches that the memory bank keeps, in (0, 1].
        num_neighbors: Neighbors that re-weight the image score (equation 7); 1 turns that off.
        precision: ``"float32"`` or ``"float16"``: type of the memory bank's vectors in the model and, on an accelerator, of
            the backbone's arithmetic. Distances are always float32. An exported bundle sets both anew: ``storage`` is the
            type of its bank, ``precision`` the arithmetic of its network.
        pre_processor: anomalib pre-processor, or whether to use the default one.
        post_processor: anomalib post-processor, or whether to use the default one, which sets thresholds by defective
            images. :class:`patchcore_plugin.ConformalPostProcessor` needs none.
        evaluator: anomalib evaluator, or whether to use the default one.
        visualizer: anomalib visualizer, or whether to use the default one.
        backbone_weights: Local ``.pth`` or ``.safetensors`` file with the backbone's weights. Tensors only: nothing else
            in it is loaded. Wins over ``pre_trained``.
        random_state: Seed of the coreset's first patch: the same images give the same bank. ``None`` draws a new one.
        coreset_radius: Largest distance of any training patch to the memory bank, in feature units, instead of
            ``coreset_sampling_ratio``: the bank keeps as many patches as that takes. Start from the radius in the log of a
            training.
        coreset_projection: Largest relative error of squared distances, in (0, 1), that picking may make for speed, by a
            random projection of the embeddings; anomalib's sampler uses 0.9. ``None`` picks by the embeddings themselves.
        embedding_dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``: type in which training holds the embeddings. The
            last two halve their memory. ``None`` takes the bank's type.
        memory_budget: GiB that the embeddings and the coreset may take, per process. Where they need more, the coreset is
            kept up to date while embeddings come, at a somewhat larger radius. ``None`` takes most of the free memory.
        image_size: Height and width to which the default pre-processor resizes images, in pixels. ``None`` is 256 x 256.
        normalization: Mean and standard deviation by which the default pre-processor normalizes images. ``"imagenet"``
            takes ImageNet's, as the paper and anomalib do with every backbone; ``"backbone"`` takes those that the
            backbone's weights were trained with. ``None`` is ``"backbone"`` for ``efficientnet_lite0`` (1, 2), and
            ``"imagenet"`` for every name of timm, so that a config of anomalib's keeps its results.
        score_smoothing: Standard deviation, in patches, of a Gaussian that smooths the patch distances before the largest
            becomes the image score. 0 is the paper's. The anomaly map stays as it is.
        intensity_range: For images deeper than 8 bits (integers of 16 or 32 bits, floats): the two values that become 0 and
            255, e.g. ``[0, 4095]``, or ``"auto"``, the smallest and the largest value of the training images. Values outside
            are clipped: a single hot pixel widens ``"auto"``, and a defect brighter than every normal image ends at 255.
            ``None`` reads 8-bit images and refuses deeper ones; with a range, 8-bit ones are refused.
        outlier_rejection: Leaves patches out of the memory bank that have no like in two other training images, as a defect
            that hides among the normal ones. A patch is left out if it is farther from its likes than the median of the
            bank by this number of standard deviations. ``None`` leaves none out.
        exclude: Text file (UTF-8) with the path of an image in each line, as ``patchcore check`` writes it. These images are
            neither learned from nor in the validation set. Paths are relative to the file's folder.
        augmentations: Changed copies of each training image that the bank learns too, for trainings with few images: names
            of :data:`patchcore_plugin.model.augmentation.AUGMENTATIONS`. ``"mirror"`` (left and right), ``"flip"`` (top and
            bottom), ``"half_turn"``, ``"quarter_turns"``, ``"small_turns"`` (by 5 degrees) and ``"brightness"`` (by 20 %).
            What they show counts as normal: a part that lies the wrong way too. ``coreset_sampling_ratio`` is a share of
            all patches, those of copies included. ``None`` makes no copies.
        ensemble: Further members of an ensemble, each a dictionary with a ``backbone``, and with ``layers`` and
            ``backbone_weights`` where they are not the model's. Each member has a coreset and a memory bank of its own, and
            the members' patch distances are averaged, in units of the spread of their banks. Time, memory and size of a
            bundle are the sum of the members'. Their patches are brought to the grid of the model's own. ``None`` is a
            single model.
        region_of_interest: Where to look: the path of a mask image (white is inspected), or a list of shapes in shares of
            the image's width and height, each ``{"rectangle": [left, top, right, bottom]}`` or ``{"polygon": [[x, y],
            ...]}``, with ``"ignore": True`` where not to look; later shapes lie over earlier ones. What lies outside is
            hidden from the network, neither learned nor scored, and 0 in the map. A bundle keeps the region. ``None``
            looks everywhere.
        tile_size: Side, or height and width, of the tiles into which an image is cut after its resize, in pixels. The
            backbone embeds them one by one, so that large images (``image_size``) take the memory of a tile. ``None``
            embeds the image at once.
        tile_stride: Pixels from one tile to the next, down and across. Below ``tile_size``, tiles overlap, and patches in
            several tiles are averaged, which hides the tiles' edges and takes more time. ``None`` is the tile size.
        embedding_engine: What computes embeddings in training, validation and test on a CPU: ``"torch"``; ``"openvino"``,
            by the network that a bundle serves, many times as fast; or ``"auto"``: OpenVINO where it can, and where the
            images are enough (64) to be worth the conversion of some seconds. On an accelerator torch does.

    Raises:
        UsageError: If an argument is out of range, the backbone is unknown, or it has no such layer.
        BackboneWeightsError: If the backbone's weights cannot be had or do not fit.

    Example:
        >>> from anomalib.data import Folder
        >>> from anomalib.engine import Engine
        >>> model = FaissPatchcore(backbone="efficientnet_lite0", layers=["blocks.2", "blocks.4"])
        >>> Engine().train(model=model, datamodule=Folder(name="part", root="images", normal_dir="good"))
    """

    model: FaissPatchcoreModel
    _patches: PatchCollector | None = None  # from the start of training to the memory bank
    _finds_range = False
    _images: int | None = None  # of the present pass, copies included; None if unknown
    _scored: ScoredImages | None = None  # from the first validation or test on

    intensity_range: IntensityRange | None = None
    """Values that become 0 and 255 when an image is read; None for 8-bit images, and with ``"auto"`` until fitted."""

    held_out: torch.Tensor | None
    """Pre-processed normal images (B, 3, H, W), float16, that are not in the memory bank; None until validated."""

    origins: Origins | None
    """Training image, row and column of each bank vector; None until fitted, and where the images had no paths."""

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        coreset_sampling_ratio: float = 0.1,
        num_neighbors: int = 9,
        precision: str | PrecisionType = PrecisionType.FLOAT32,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        backbone_weights: str | Path | None = None,
        random_state: int | None = 0,
        coreset_radius: float | None = None,
        coreset_projection: float | None = None,
        embedding_dtype: str | None = None,
        memory_budget: float | None = None,
        image_size: tuple[int, int] | None = None,
        normalization: Normalization | None = None,
        score_smoothing: float = 0,
        intensity_range: tuple[float, float] | Literal["auto"] | None = None,
        outlier_rejection: float | None = None,
        exclude: str | Path | None = None,
        augmentations: Sequence[str] | None = None,
        ensemble: Sequence[dict[str, Any]] | None = None,
        region_of_interest: str | Path | Sequence[dict[str, Any]] | None = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_stride: int | tuple[int, int] | None = None,
        embedding_engine: str = "auto",
    ) -> None:
        check_numbers(
            coreset_sampling_ratio=coreset_sampling_ratio,
            coreset_radius=coreset_radius,
            coreset_projection=coreset_projection,
            random_state=random_state,
            memory_budget=memory_budget,
            outlier_rejection=outlier_rejection,
        )
        if coreset_radius is not None and coreset_projection is not None:
            msg = "coreset_radius is a distance of the embeddings themselves: leave coreset_projection out."
            raise UsageError(msg)
        ensemble = check_ensemble(ensemble)
        if coreset_radius is not None and ensemble:
            msg = "coreset_radius is a distance in one backbone's units: leave it out with an ensemble, or the ensemble."
            raise UsageError(msg)
        rule = ScoreRule(num_neighbors=num_neighbors, score_smoothing=score_smoothing)
        check_normalization(normalization)
        if image_size is not None:
            image_size = check_image_size(image_size)
        if normalization is None:  # the checkpoint keeps what it was trained with
            normalization = normalization_of(backbone) if pre_processor is True else "imagenet"
        if image_size is not None or normalization != "imagenet":
            if pre_processor is not True:
                msg = "image_size and normalization set up the default pre-processor: leave them out, or pre_processor."
                raise UsageError(msg)
            pre_processor = build_pre_processor(image_size, normalization=normalization, backbone=backbone)
        dtype = dtype_of_bank(precision)
        # Plain: Python 3.11.0 to 3.11.3, Debian's among them, pickle an enumeration so that torch refuses the checkpoint.
        precision = str(dtype).removeprefix("torch.")
        self.embedding_dtype = dtype if embedding_dtype is None else dtype_of_embeddings(embedding_dtype)
        tiles = check_tiles(tile_size, tile_stride)
        augmentations = check_augmentations(augmentations)
        region_of_interest = check_region(region_of_interest)
        if region_of_interest is not None and any(change.moves for change in changes_of(augmentations)):
            msg = (
                "Augmentations that move pixels would bring what lies outside the region_of_interest into it: of "
                f"{augmentations}, only brightness goes with it."
            )
            raise UsageError(msg)
        if not isinstance(layers, str):
            layers = list(layers)  # plain: a checkpoint with the list type of get_model's omegaconf could not be loaded
        self._engine = EmbeddingEngine(embedding_engine)
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.coreset_sampling_ratio = coreset_sampling_ratio
        self.coreset_radius = coreset_radius
        self.coreset_projection = coreset_projection
        self.memory_budget = memory_budget
        self.random_state = random_state
        self.outlier_rejection = outlier_rejection
        self.ensemble = ensemble
        self.region_of_interest = region_of_interest
        if region_of_interest is not None and not weights_follow():  # else it comes from the checkpoint, as they do
            region = build_region(region_of_interest, getattr(self.pre_processor, "transform", None))
            rule = replace(rule, region=region)
        self.model = FaissPatchcoreModel(
            layers=layers,
            backbone=backbone,
            pre_trained=pre_trained,
            backbone_weights=backbone_weights,
            dtype=dtype,
            rule=rule,
            further=[
                FaissPatchcoreModel(
                    layers=member.get("layers") or layers,
                    backbone=member["backbone"],
                    pre_trained=pre_trained,
                    backbone_weights=member.get("backbone_weights"),
                    dtype=dtype,
                )
                for member in ensemble or []
            ],
            tiles=tiles,
        )
        for part, member in zip(self.model.further, ensemble or [], strict=True):
            part.renormalization = renormalization(backbone, member["backbone"], normalization)
        self._finds_range = intensity_range == "auto"
        self.intensity_range = None if intensity_range in (None, "auto") else check_intensity_range(intensity_range)
        self.exclude = exclude
        self.augmentations = augmentations
        self.held_out = self.origins = None

    @classmethod
    def configure_pre_processor(
        cls,
        image_size: tuple[int, int] | None = None,
        center_crop_size: tuple[int, int] | None = None,
    ) -> PreProcessor:
        """Pre-processor of the paper: resize, crop the center, normalize with ImageNet's statistics.

        Args:
            image_size: Height and width after resizing, in pixels. ``None`` is 256 x 256.
            center_crop_size: Height and width of the crop, in pixels; the paper's is 224 x 224. ``None`` crops nothing.

        Raises:
            UsageError: If a size is none, or the crop is larger than the resized image.
        """
        if image_size is not None:
            image_size = check_image_size(image_size)
        if center_crop_size is not None:
            center_crop_size = check_image_size(center_crop_size, "center_crop_size")
        return build_pre_processor(image_size, center_crop_size)

    @staticmethod
    def configure_optimizers() -> None:
        """PatchCore trains nothing by gradient."""

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Thresholds and normalization by anomalib's default post-processor."""
        return PostProcessor()

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Pictures as anomalib draws them, saved beside the work."""
        return ParallelImageVisualizer()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the training images."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Trained on normal images only."""
        return LearningType.ONE_CLASS

    def configure_callbacks(self) -> Sequence[Callback]:
        """The callbacks of anomalib's parts, and one that says where a checkpoint lies when something fails."""
        return [*super().configure_callbacks(), CheckpointTeller()]

    def prepare_data(self) -> None:
        """Set the data module up ahead of Lightning, to say what hinders it.

        Raises:
            UsageError: If anomalib cannot set its data module up, for a reason that it does not tell.
        """
        set_up(self.trainer)

    def setup(self, stage: str) -> None:
        """Check what can be checked before the work; let damaged checkpoints be refused.

        Raises:
            UsageError: If the data module's images cannot be read with the intensity range, its masks do not fit, or the
                list of images to leave out cannot be used.
            ImageError: If an image of the data module is damaged.
        """
        super().setup(stage)
        strategy = self.trainer.strategy
        if not isinstance(strategy.checkpoint_io, CheckedIO):
            strategy.checkpoint_io = CheckedIO(strategy.checkpoint_io)
        own, tiler = check_tiles(self.hparams.get("tile_size"), self.hparams.get("tile_stride")), self.model.tiler
        if own is not None and tiler is not None and read_tiles(tiler) != own:
            msg = f"The model has {own!r}, and anomalib's tiling callback sets {read_tiles(tiler)!r}: leave one of them out."
            raise UsageError(msg)
        if stage == "fit":
            if self.exclude is not None:
                leave_out(self.trainer, Path(self.exclude))
            check_data(self.trainer, mask_size(self.region_of_interest))
        if self.intensity_range is not None or self._finds_range:  # long before the first batch
            datamodule = getattr(self.trainer, "datamodule", None)
            subsets = (getattr(datamodule, f"{name}_data", None) for name in ("train", "val", "test"))
            for dataset in filter(None, subsets):
                check_dataset(dataset)
        if stage == "fit" and self.trainer.world_size > 1:  # DistributedDataParallel needs one; its gradient is always zero
            next(self.model.feature_extractor.parameters()).requires_grad_(True)

    def on_fit_end(self) -> None:
        """Freeze the whole backbone again."""
        self.model.feature_extractor.requires_grad_(False)

    def on_train_start(self) -> None:
        """Find the intensity range, where the training images give it."""
        super().on_train_start()
        loader = self.trainer.train_dataloader
        if self._finds_range:
            group = torch.distributed.group.WORLD if self.trainer.world_size > 1 else None
            self.intensity_range = find_intensity_range(loader, group)
        self._check_loaders(loader)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Read deep images by the intensity range, which the data sets of anomalib clip; without a range, refuse them."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        read_again(batch, self.intensity_range, getattr(self.pre_processor, "transform", None))
        return batch

    def _check_loaders(self, loaders: Any) -> None:
        """Refuse data sets whose images cannot be read with the intensity range."""
        if self.intensity_range is not None:
            for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
                check_dataset(getattr(loader, "dataset", None))

    def on_train_epoch_start(self) -> None:
        """Start a new memory bank: training again replaces the old one."""
        self.held_out = self.origins = None
        self._is_fitted = torch.tensor([False], device=self.device)
        radius, images = self.coreset_radius, expected_images(self.trainer)
        self._images = images and images * (1 + len(changes_of(self.augmentations)))
        self._patches = PatchCollector(
            GreedyCoreset(
                ratio=self.coreset_sampling_ratio if radius is None else None,
                radius=radius,
                random_state=self.random_state,
                projection=self.coreset_projection,
            ),
            dtype=self.embedding_dtype,
            expected_images=self._images,
            budget=None if self.memory_budget is None else self.memory_budget * GIB,
            processes=self.trainer.num_devices,
            outlier_rejection=self.outlier_rejection,
            widths=self.model.widths if self.ensemble else None,
            region=self.model.rule.region,
        )

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Collect the patch embeddings of the batch's normal images.

        Raises:
            MemoryBankError: If the training is resumed in the middle of its epoch.
            UsageError: If the backbone cannot take images of this size, cannot be exported, or gives NaN or infinite
                features; or if the memory budget is far too small.
        """
        del args, kwargs
        if self._patches is None:
            msg = "PatchCore cannot resume in the middle of its epoch: the earlier patches are lost. Train from the start."
            raise MemoryBankError(msg)
        images, paths = self._patches.select(batch, self.trainer.train_dataloader)
        if len(images):
            embeddings, first = self.embed(images, self._images), not self._patches.patches
            self._patches.add(embeddings, paths)
            if first:
                check_conversion(self.model, images)
            scale = PixelScale.of(getattr(self.pre_processor, "transform", None))
            for change in changes_of(self.augmentations):
                self._patches.add_copies(self.embed(change.apply(images, scale), self._images), paths, change)
        # Lightning wants a loss. Nothing is learned from it: there is no optimizer.
        parameter = next(self.model.feature_extractor.parameters())
        if parameter.requires_grad:
            return parameter.sum() * 0
        return torch.zeros((), requires_grad=True, device=self.device)

    def embed(self, images: torch.Tensor, count: int | None = None) -> torch.Tensor:
        """Embed images by the ``embedding_engine``.

        Args:
            images: Pre-processed images (B, 3, H, W).
            count: Number of images that are to be embedded, these among them; None if unknown.

        Returns:
            Patch embeddings (B, h, w, D).
        """
        return self.model.embed(images, self._engine.network(self.model, images, count))

    def fit(self) -> None:
        """Reduce the collected embeddings to the coreset and make it the memory bank.

        Raises:
            MemoryBankError: If no embedding was collected.
        """
        fitting = self._is_fitting()
        if self._patches is None or not (fitting or self._patches.patches):
            return  # nothing was trained: scoring says so, and what to do
        group = torch.distributed.group.WORLD if fitting and self.trainer.world_size > 1 else None
        patches, anomalous = self._patches.totals(group, self.device)
        if anomalous and self.global_rank == 0:
            logger.warning("Left out %d anomalous images: PatchCore learns from normal ones only.", anomalous)
        if not patches:
            raise MemoryBankError(no_normal_image("PatchCore", anomalous))
        banks = self._patches.reduce_to_banks(group)
        self._patches = None
        for member, fitted in zip(self.model.members, banks, strict=True):
            member.memory_bank = fitted.vectors.to(member.memory_bank)
            member.covering_radius.fill_(fitted.radius)
            logger.info(
                "Memory bank: %d of %d patch embeddings, every other within %.4g of one of them.",
                len(member.memory_bank) + fitted.outliers,
                patches,
                fitted.radius,
            )
            if fitted.outliers:
                logger.info(
                    "%d of them are left out: they have no like in two other images (outlier_rejection: %g). `patchcore "
                    "check` ranks the images.",
                    fitted.outliers, self.outlier_rejection,
                )  # fmt: skip
        self.model.weigh_members()
        self.origins = Origins.of_members([fitted.origins for fitted in banks])

    def on_validation_start(self) -> None:
        """Build the memory bank before the first validation.

        Raises:
            MemoryBankError: If validation starts before the training epoch has collected all its embeddings.
        """
        if self.trainer.sanity_checking:
            msg = (
                "Lightning's sanity check validates before the training, when there is no memory bank: set the trainer's "
                "num_sanity_val_steps to 0."
            )
            raise MemoryBankError(msg)
        if self._is_fitting() and not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            collected = 0 if self._patches is None else self._patches.patches
            msg = (
                "Validation started in the middle of the training epoch, with a half-filled memory bank "
                f"({collected} embeddings so far). PatchCore validates after the epoch: leave "
                "val_check_interval at 1.0."
            )
            raise MemoryBankError(msg)
        self._refuse_half_filled()
        self._check_loaders(self.trainer.val_dataloaders)
        fitted = bool(self._is_fitted)
        super().on_validation_start()
        if self._is_fitting() and not fitted:
            self._keep_bank()
        self._begin_to_score(self.trainer.val_dataloaders)

    def _begin_to_score(self, loaders: Any) -> None:
        self._images = images_of(loaders)
        self._scored = self._scored or ScoredImages()
        self._scored.begin(self.model)

    def _keep_bank(self) -> None:
        """Write a checkpoint before the validation, which may fail; the one after it replaces it."""
        callback = self.trainer.checkpoint_callback
        if not isinstance(callback, ModelCheckpoint) or callback.monitor or not callback.save_top_k:
            return
        if self.trainer.fast_dev_run:
            return
        path = callback.format_checkpoint_name({name: torch.tensor(0) for name in ("epoch", "step")})
        self.trainer.save_checkpoint(path, weights_only=True)
        callback.best_model_path = path  # this name is taken again, instead of one with a number
        logger.info("The memory bank is kept in %s, yet without thresholds.", path)

    def on_test_start(self) -> None:
        """Refuse to test with an unfinished memory bank."""
        self._refuse_half_filled()
        self._check_loaders(self.trainer.test_dataloaders)
        self._begin_to_score(self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        """Refuse to predict with an unfinished memory bank."""
        self._refuse_half_filled()
        self._check_loaders(self.trainer.predict_dataloaders)
        self._begin_to_score(self.trainer.predict_dataloaders)

    def _is_fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def _refuse_half_filled(self) -> None:
        if self._patches is not None and self._patches.patches and not self._is_fitting():
            msg = (
                f"The memory bank is half-filled: training collected {self._patches.patches} embeddings and ended before "
                "the coreset was built from them. Run the training to its end (Engine.fit)."
            )
            raise MemoryBankError(msg)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score the images of a batch."""
        del args, kwargs
        if self._is_fitting() and batch.gt_label is not None:
            self.held_out = hold_out(self.held_out, batch.image[(batch.gt_label == 0).to(batch.image.device)])
        return batch.update(**self._score(batch.image)._asdict())

    def test_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score the images of a batch."""
        del args, kwargs
        return batch.update(**self._score(batch.image)._asdict())

    predict_step = test_step

    def _score(self, images: torch.Tensor) -> InferenceBatch:
        """Score pre-processed images (B, 3, H, W); one that comes again is not embedded again."""
        scores = self._scored.score(images, lambda new: self.model.raw_scores(self.embed(new, self._images)))
        return self.model.with_maps(scores, images.shape[-2:])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the intensity range, region of interest, tiles, held-out images and the bank's origins too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["intensity_range"] = self.intensity_range and list(self.intensity_range)
        region = self.model.rule.region
        checkpoint["region"] = region and region.model_dump()
        checkpoint["tiles"] = self.model.tiler and read_tiles(self.model.tiler).model_dump()
        checkpoint["held_out"] = self.held_out
        if self.origins is not None:
            patches = torch.from_numpy(self.origins.patches)
            checkpoint["origins"] = {"patches": patches, "images": self.origins.images}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read what older checkpoints lack: intensity range, region, tiles, held-out images, origins, post-processor.

        Hyper parameters of version 0.1 may have a ``position_weight``, which is no argument any more. Among the hyper
        parameters it also travels to the checkpoints of this model.

        Raises:
            UsageError: If the checkpoint is one of Spade.
        """
        refuse_spade(checkpoint)
        config = checkpoint.get("anomalib_post_processor_config", {})
        rate = config.get("false_positive_rate")
        if rate is not None and type(self.post_processor) is PostProcessor:
            self._replace_post_processor(ConformalPostProcessor(rate, config.get("groups"), config.get("review_rate")))
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and isinstance(self.post_processor, ConformalPostProcessor):
            self.post_processor.setup(self.trainer, self, self.trainer.state.fn)  # its groups may come from the checkpoint
        values = checkpoint.get("intensity_range")
        self.intensity_range = values and check_intensity_range(values)
        region = checkpoint.get("region")
        self.model.rule = replace(self.model.rule, region=region and RegionOfInterest.model_validate(region))
        if "tiles" in checkpoint:  # others do not tell whether anomalib's tiling callback was there
            tiles = checkpoint["tiles"]
            self.model.tiler = make_tiler(tiles and Tiles.model_validate(tiles))
        self.held_out = checkpoint.get("held_out")
        origins = checkpoint.get("origins")
        self.origins = origins and Origins(origins["patches"].numpy(), origins["images"])
        self.model.position_weight = checkpoint.get("hyper_parameters", {}).get("position_weight", 0.0)
        if self.model.position_weight:
            self.hparams["position_weight"] = self.model.position_weight

    def _replace_post_processor(self, new: PostProcessor) -> None:
        if self._trainer is not None:  # to which the old one is attached already
            callbacks = self.trainer.callbacks
            callbacks[callbacks.index(self.post_processor)] = new
        self.post_processor = new

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export the torch model, memory bank included; see anomalib's ``ExportMixin.to_torch``."""
        self._warn_of_export()
        return super().to_torch(*args, **kwargs)

    def _warn_of_export(self) -> None:
        if self.intensity_range is not None:
            logger.warning(
                "This export takes images in [0, 1], and anomalib's inferencers clip images deeper than 8 bits: scale their "
                "values from %s to [0, 1] yourself, or export a bundle, which does (`patchcore export CHECKPOINT BUNDLE`).",
                self.intensity_range,
            )

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:
        """Export to ONNX with the memory bank inside the graph; see anomalib's ``ExportMixin.to_onnx``.

        The default operator set is 18, the exporter's own.

        Raises:
            MemoryBankError: If the bank is empty, or too large: a graph computes the distances of all patches to all bank
                vectors as one matrix.
        """
        size = sum(member.memory_bank.numel() for member in self.model.members) * 4
        if not self.model.is_fitted:
            msg = "The memory bank is empty: train the model before exporting it."
            raise MemoryBankError(msg)
        if size > _GRAPH_BANK_BYTES:
            msg = (
                f"A memory bank of {sum(self.model.bank_sizes):,} vectors ({size / 2**20:,.0f} MiB) is too large for an "
                "ONNX or OpenVINO graph, which compares every patch with every vector. Export a bundle, which searches it "
                "by an index: `patchcore export CHECKPOINT BUNDLE`. Or lower coreset_sampling_ratio."
            )
            raise MemoryBankError(msg)
        self._warn_of_export()
        kwargs.setdefault("opset_version", 18)
        return super().to_onnx(*args, **kwargs)

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:
        """Export to OpenVINO, with what model_api needs to know; see anomalib's ``ExportMixin.to_openvino``.

        Raises:
            MemoryBankError: As :meth:`to_onnx` does.
        """
        with without_side_effects():
            path = super().to_openvino(*args, **kwargs)
        add_model_info(path)
        return path

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> FaissPatchcore:
        """Load a trained model; see anomalib's ``AnomalibModule.load_from_checkpoint``.

        The checkpoint holds the backbone too: neither hub, nor package, nor weight file is needed.

        Raises:
            UsageError: If the file is damaged, or no checkpoint of this model.
        """
        check_checkpoint(checkpoint_path)
        # A checkpoint loaded loosely may lack some of the backbone: then its weights are loaded first.
        loose = kwargs.get("strict") is False
        try:
            with nullcontext() if loose else weights_from_checkpoint():
                return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except (PatchcoreError, OSError):
            raise
        except Exception as error:  # an archive of anything makes torch and Lightning raise nearly any exception
            reason = shorten(f"{type(error).__name__}: {error}", 300)  # torch lists all tensors that it misses
            msg = f"{checkpoint_path} is not a checkpoint of FaissPatchcore: {reason}"
            raise UsageError(msg) from error
