"""FaissPatchcore: PatchCore as an anomalib model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType, PrecisionType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from patchcore_plugin.bundle.origins import Origins, locate_patches
from patchcore_plugin.coreset.embedding_store import GIB, EmbeddingStore, check_budget
from patchcore_plugin.coreset.sampler import (
    GreedyCoreset,
    check_count,
    check_projection,
    check_radius,
    check_random_state,
    check_ratio,
)
from patchcore_plugin.model.arguments import (
    check_image_size,
    check_normalization,
    check_position_weight,
    check_smoothing,
    dtype_of_bank,
    dtype_of_embeddings,
)
from patchcore_plugin.model.backbone import weights_from_checkpoint
from patchcore_plugin.model.post_processing import ConformalPostProcessor
from patchcore_plugin.model.pre_processing import Normalization, build
from patchcore_plugin.model.torch_model import FaissPatchcoreModel, MemoryBankError
from patchcore_plugin.model.training_images import check_finite, expected_images, hold_out, own_images

logger = logging.getLogger(__name__)

_GRAPH_LIMIT = 2**30  # bytes of the memory bank in a graph; an ONNX file ends at 2 GiB


class FaissPatchcore(MemoryBankMixin, AnomalibModule):
    """PatchCore with an exact, fast coreset and a memory bank searched by FAISS.

    A drop-in for anomalib's ``Patchcore``: its arguments keep their name, meaning and default. Source: Roth et al.,
    "Towards Total Recall in Industrial Anomaly Detection", arXiv 2106.08265.

    Args:
        backbone: Any timm model that supports ``features_only``, or ``"efficientnet_lite0"`` (or 1, 2), whose ImageNet
            weights come from an installed package, with no model hub.
        layers: Feature layers by timm's module names, shallow to deep (``"layer2"``, ``"blocks.2"``).
        pre_trained: Load the backbone's ImageNet weights.
        coreset_sampling_ratio: Share of the training patches that the memory bank keeps, in (0, 1].
        num_neighbors: Neighbours that re-weight the image score (equation 7); 1 turns that off.
        precision: ``"float32"`` or ``"float16"``: precision of the stored bank and, on an accelerator, of the backbone.
            Distances are always float32.
        pre_processor: anomalib pre-processor, or whether to use the default one.
        post_processor: anomalib post-processor, or whether to use the default one, which sets thresholds by defective
            images. :class:`patchcore_plugin.ConformalPostProcessor` needs none.
        evaluator: anomalib evaluator, or whether to use the default one.
        visualizer: anomalib visualizer, or whether to use the default one.
        backbone_weights: Local ``.pth`` or ``.safetensors`` file with the backbone's weights. Tensors only: nothing else
            in it is loaded. Wins over ``pre_trained``.
        random_state: Seed of the coreset's first patch: the same images give the same bank. ``None`` draws a new one.
        coreset_radius: Keep as many patches as it takes for every training patch to lie within this distance of one of
            them, instead of ``coreset_sampling_ratio``. In feature units; the log of any training tells the radius that
            it reached.
        coreset_projection: Pick by randomly projected embeddings, for speed, with at most this relative error of squared
            distances, in (0, 1); anomalib's sampler does so with 0.9. ``None`` picks by the embeddings themselves.
        embedding_dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``: type in which training holds the embeddings. The
            last two halve their memory. ``None`` takes the bank's.
        memory_budget: GiB that the embeddings and the coreset may take, per process. Where they need more, the coreset is
            kept up to date while embeddings come, at a somewhat larger radius. ``None`` takes most of the free memory.
        image_size: Height and width to which the default pre-processor resizes images, in pixels. ``None`` is 256 x 256.
        normalization: How the default pre-processor normalises images: ``"imagenet"``, with ImageNet's mean and standard
            deviation, as the paper and anomalib do with every backbone; or ``"backbone"``, with what the backbone's weights
            were trained with, where timm knows that it was something else.
        score_smoothing: Standard deviation, in patches, of a Gaussian that smooths the patch distances before the largest
            becomes the image score. 0 is the paper's. The anomaly map is not touched by it.
        position_weight: How much the place of a patch counts, for parts that always lie alike: the distance, in feature
            units, by which patches at opposite edges of the image differ through their place alone. 0 is the paper's: a
            patch may resemble a normal one from anywhere.

    With several devices (``devices: 2``, ``strategy: ddp``) each process embeds its share of the images, all of them pick
    the coreset together, and every one gets the bank that a single process would have picked, as long as the embeddings
    fit into the memory budget.

    Raises:
        ValueError: If an argument is out of range, the backbone unknown, or a layer not one of its own.
        BackboneWeightsError: If the backbone's weights cannot be had or do not fit.

    Example:
        >>> from anomalib.data import Folder
        >>> from anomalib.engine import Engine
        >>> model = FaissPatchcore(backbone="efficientnet_lite0", layers=["blocks.2", "blocks.4"])
        >>> Engine().train(model=model, datamodule=Folder(name="part", root="images", normal_dir="good"))
    """

    model: FaissPatchcoreModel
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
        normalization: Normalization = "imagenet",
        score_smoothing: float = 0,
        position_weight: float = 0,
    ) -> None:
        check_ratio(coreset_sampling_ratio)
        if coreset_radius is not None:
            check_radius("coreset_radius", coreset_radius)
        if coreset_projection is not None:
            check_projection("coreset_projection", coreset_projection)
            if coreset_radius is not None:
                msg = "coreset_radius is a distance of the embeddings themselves: leave coreset_projection out."
                raise ValueError(msg)
        if memory_budget is not None:
            check_budget(memory_budget)
        check_count("num_neighbors", num_neighbors)
        check_random_state(random_state)
        check_smoothing(score_smoothing)
        check_position_weight(position_weight)
        check_normalization(normalization)
        if image_size is not None:
            image_size = check_image_size(image_size)
        if image_size is not None or normalization != "imagenet":
            if pre_processor is not True:
                msg = "image_size and normalization set up the default pre-processor: leave them out, or pre_processor."
                raise ValueError(msg)
            pre_processor = build(image_size, normalization=normalization, backbone=backbone)
        dtype = dtype_of_bank(precision)
        self.embedding_dtype = dtype if embedding_dtype is None else dtype_of_embeddings(embedding_dtype)
        if not isinstance(layers, str):
            layers = list(layers)  # a plain list: what get_model's omegaconf gives could not be loaded from the checkpoint
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
        self.model = FaissPatchcoreModel(
            layers=layers,
            backbone=backbone,
            pre_trained=pre_trained,
            num_neighbors=num_neighbors,
            backbone_weights=backbone_weights,
            dtype=dtype,
            score_smoothing=score_smoothing,
            position_weight=position_weight,
        )
        self._embeddings: EmbeddingStore | None = None
        self._seen = self._skipped = 0
        self._sources: list[tuple[str, int, int]] = []  # path, and rows and columns of the patch grid
        self.held_out: torch.Tensor | None = None
        self.origins: Origins | None = None

    @classmethod
    def configure_pre_processor(
        cls,
        image_size: tuple[int, int] | None = None,
        center_crop_size: tuple[int, int] | None = None,
    ) -> PreProcessor:
        """Pre-processor of the paper: resize, crop the centre, normalise with ImageNet's statistics.

        Args:
            image_size: Height and width after resizing, in pixels. ``None`` is 256 x 256.
            center_crop_size: Height and width of the crop, in pixels; the paper's is 224 x 224. ``None`` crops nothing.

        Raises:
            ValueError: If the crop is larger than the resized image.
        """
        return build(image_size, center_crop_size)

    @staticmethod
    def configure_optimizers() -> None:
        """PatchCore trains nothing by gradient."""

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Thresholds and normalisation by anomalib's default post-processor."""
        return PostProcessor()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the training images."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Trained on normal images only."""
        return LearningType.ONE_CLASS

    def setup(self, stage: str) -> None:
        """Give DistributedDataParallel the parameter without which it refuses to run; its gradient is always zero."""
        super().setup(stage)
        if stage == "fit" and self.trainer.world_size > 1:
            next(self.model.feature_extractor.parameters()).requires_grad_(True)

    def on_fit_end(self) -> None:
        """Freeze the whole backbone again."""
        self.model.feature_extractor.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        """Start a new memory bank: training again replaces the old one."""
        self._embeddings = self.held_out = self.origins = None
        self._sources = []
        self._seen = self._skipped = 0
        self._is_fitted = torch.tensor([False], device=self.device)

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Collect the patch embeddings of the batch's normal images.

        Raises:
            ValueError: If the backbone gives NaN or infinite features, or the memory budget is far too small.
        """
        del args, kwargs
        images, paths = batch.image, batch.image_path
        use = torch.ones(len(images), dtype=torch.bool)
        use[own_images(self.trainer.train_dataloader, self._seen, len(images)) :] = False
        self._seen += len(images)
        if batch.gt_label is not None:
            anomalous = (batch.gt_label != 0).cpu()
            self._skipped += int((anomalous & use).sum())
            use &= ~anomalous
        if not use.all():
            images = images[use.to(images.device)]
            paths = [path for path, used in zip(paths, use, strict=True) if used] if paths else None
        if len(images):
            embedding = self.model.embed(images)
            check_finite(embedding, paths)
            embedding = embedding.to(self.embedding_dtype)
            if not embedding.to(self.model.memory_bank.dtype).isfinite().all():
                msg = "The backbone's features are too large for float16: use 'bfloat16' or 'float32' for embedding_dtype."
                raise ValueError(msg)
            if self._embeddings is None:
                self._embeddings = self._new_store(embedding)
            self._embeddings.append(embedding.reshape(-1, embedding.shape[-1]))
            grid = embedding.shape[1:3]
            self._sources += [(path and str(Path(path).absolute()), *grid) for path in paths or [""] * len(images)]
        # Lightning wants a loss. Nothing is learned from it: there is no optimizer.
        parameter = next(self.model.feature_extractor.parameters())
        if parameter.requires_grad:
            return parameter.sum() * 0
        return torch.zeros((), requires_grad=True, device=self.device)

    def _new_store(self, embedding: torch.Tensor | None) -> EmbeddingStore:
        """Store for the embeddings of this process's images; ``embedding`` (B, h, w, D) is the first batch, if any."""
        images = 0 if embedding is None else expected_images(self.trainer)
        radius = self.coreset_radius
        return EmbeddingStore(
            GreedyCoreset(
                ratio=self.coreset_sampling_ratio if radius is None else None,
                radius=radius,
                random_state=self.random_state,
                projection=self.coreset_projection,
            ),
            dtype=self.embedding_dtype,
            expected_rows=images and images * embedding.shape[1] * embedding.shape[2],
            budget=None if self.memory_budget is None else self.memory_budget * GIB,
            processes=self.trainer.num_devices,
        )

    def fit(self) -> None:
        """Reduce the collected embeddings to the coreset and make it the memory bank.

        Raises:
            MemoryBankError: If no embedding was collected.
        """
        group = None
        counts = torch.tensor([self._embeddings.rows if self._embeddings else 0, self._skipped], device=self.device)
        if self._is_fitting() and self.trainer.world_size > 1:
            group = torch.distributed.group.WORLD
            torch.distributed.all_reduce(counts, group=group)
        rows, skipped = counts.tolist()
        if skipped and self.global_rank == 0:
            logger.warning("Left out %d anomalous images: PatchCore learns from normal ones only.", skipped)
        if not rows and not self._is_fitting():
            return  # nothing was trained: scoring says so, and what to do
        if not rows:
            found = f" It has {skipped} anomalous ones." if skipped else ""
            msg = (
                f"The training set has no normal image, and PatchCore learns from normal images only.{found} Check the data "
                "section of the config: normal_dir (or the data set's training split) must hold defect-free images."
            )
            raise MemoryBankError(msg)
        store = self._embeddings or self._new_store(None)  # this process has none; others have
        self._embeddings = None
        self.model.memory_bank = store.bank(group).to(self.model.memory_bank)
        self.model.covering_radius.fill_(store.radius_)
        self.origins = self._origins(store.numbers_, group)
        logger.info(
            "Memory bank: %d of %d patch embeddings, every other within %.4g of one of them.",
            len(self.model.memory_bank),
            rows,
            store.radius_,
        )

    def _origins(self, numbers: torch.Tensor, group: torch.distributed.ProcessGroup | None) -> Origins | None:
        """Where the patches of some numbers come from, which count the images of all processes by rank."""
        shares = [self._sources]
        if group is not None:
            shares = [[] for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather_object(shares, self._sources, group=group)
        images, self._sources = [image for share in shares for image in share], []
        return locate_patches(numbers.numpy(), images) if all(path for path, *_ in images) else None

    def on_validation_start(self) -> None:
        """Build the memory bank before the first validation.

        Raises:
            MemoryBankError: If validation starts before the training epoch has collected all its embeddings.
        """
        if self._is_fitting() and not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            seen = self._embeddings.rows if self._embeddings else 0
            msg = (
                f"Validation started in the middle of the training epoch, with a half-filled memory bank ({seen} embeddings "
                "so far). PatchCore validates after the epoch: leave val_check_interval at 1.0."
            )
            raise MemoryBankError(msg)
        self._refuse_half_filled()
        super().on_validation_start()

    def on_test_start(self) -> None:
        """Refuse to test with an unfinished memory bank."""
        self._refuse_half_filled()

    def on_predict_start(self) -> None:
        """Refuse to predict with an unfinished memory bank."""
        self._refuse_half_filled()

    def _is_fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def _refuse_half_filled(self) -> None:
        if self._embeddings is not None and not self._is_fitting():
            msg = (
                f"The memory bank is half-filled: training collected {self._embeddings.rows} embeddings and ended before "
                "the coreset was built from them. Run the training to its end (Engine.fit)."
            )
            raise MemoryBankError(msg)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score the images of a batch."""
        del args, kwargs
        if self._is_fitting() and batch.gt_label is not None:
            self.held_out = hold_out(self.held_out, batch.image[(batch.gt_label == 0).to(batch.image.device)])
        return batch.update(**self.model(batch.image)._asdict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the held-out images and the bank's origins with the model."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["held_out"] = self.held_out
        if self.origins is not None:
            patches = torch.from_numpy(self.origins.patches)
            checkpoint["origins"] = {"patches": patches, "images": self.origins.images}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Find held-out images, the bank's origins and the kind of post-processor again; older checkpoints have none."""
        rate = checkpoint.get("anomalib_post_processor_config", {}).get("false_positive_rate")
        if rate is not None and type(self.post_processor) is PostProcessor:
            self._replace_post_processor(ConformalPostProcessor(rate))
        super().on_load_checkpoint(checkpoint)
        self.held_out = checkpoint.get("held_out")
        origins = checkpoint.get("origins")
        self.origins = origins and Origins(origins["patches"].numpy(), origins["images"])

    def _replace_post_processor(self, new: PostProcessor) -> None:
        if self._trainer is not None:  # to which the old one is attached already
            callbacks = self.trainer.callbacks
            callbacks[callbacks.index(self.post_processor)] = new
        self.post_processor = new

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:
        """Export to ONNX, the memory bank inside; see anomalib's ``ExportMixin.to_onnx``.

        The default operator set is 18, the exporter's own.

        Raises:
            MemoryBankError: If the bank is empty, or too large for a graph: the distances of all patches to all bank
                vectors are one matrix there.
        """
        size = self.model.memory_bank.numel() * 4
        if not size:
            msg = "The memory bank is empty: train the model before exporting it."
            raise MemoryBankError(msg)
        if size > _GRAPH_LIMIT:
            msg = (
                f"A memory bank of {len(self.model.memory_bank):,} vectors ({size / 2**20:,.0f} MiB) is too large for an "
                "ONNX or OpenVINO graph, which compares every patch with every vector. Export a bundle, which searches it "
                "by an index: `patchcore export CHECKPOINT BUNDLE`. Or lower coreset_sampling_ratio."
            )
            raise MemoryBankError(msg)
        kwargs.setdefault("opset_version", 18)
        return super().to_onnx(*args, **kwargs)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> FaissPatchcore:
        """Load a trained model; see anomalib's ``AnomalibModule.load_from_checkpoint``.

        The checkpoint holds the backbone too: neither hub, nor package, nor weight file is needed.
        """
        # A checkpoint loaded loosely may lack some of the backbone: then its weights are loaded first.
        loose = kwargs.get("strict") is False
        with nullcontext() if loose else weights_from_checkpoint():
            return super().load_from_checkpoint(*args, **kwargs)
