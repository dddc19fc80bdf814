"""SPADE, for comparison with PatchCore: nearest training images, and a gallery of their patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, DynamicBufferMixin, MemoryBankMixin
from anomalib.visualization import Visualizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.nn import functional as F

from patchcore_plugin.bundle import MAX_NEIGHBORS
from patchcore_plugin.checks import check_number
from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.backbone import Backbone, deepest_layer
from patchcore_plugin.model.data_checks import check_data, set_up
from patchcore_plugin.model.torch_model import MemoryBankError, nearest_by_product
from patchcore_plugin.model.training_images import check_finite, no_normal_image
from patchcore_plugin.scoring.scores import anomaly_map

COMPARISON_ONLY = (
    "Spade is for comparison only, and is not exported: it keeps the features of every training image, and compares each "
    "image with 50 of them. Train a FaissPatchcore for export."
)


class SpadeModel(DynamicBufferMixin, nn.Module):
    """Backbone, features of the training images, and the search among them.

    Args:
        layers: Feature layers of the pixels, shallow to deep. The first sets the resolution of the patch grid.
        image_layer: Feature layer whose mean over all places describes an image.
        backbone: timm model name, or one whose weights an installed package carries.
        pre_trained: Load ImageNet weights.
        backbone_weights: Local weight file instead of ``pre_trained``.
        num_neighbors: Training images that an image is compared with.

    Attributes:
        image_bank: Pooled features of the training images (N, C), float32; empty until fitted.
    """

    image_bank: torch.Tensor

    def __init__(
        self,
        layers: Sequence[str],
        image_layer: str,
        backbone: str = "wide_resnet50_2",
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        num_neighbors: int = 50,
    ) -> None:
        super().__init__()
        # the backbone refuses names that are no list, or none
        wanted = layers if not layers or isinstance(layers, str) or image_layer in layers else [*layers, image_layer]
        self.feature_extractor = Backbone(backbone, wanted, pre_trained, backbone_weights)
        self.num_neighbors = num_neighbors
        self._layers, self._image_place = len(layers), list(wanted).index(image_layer)
        self.register_buffer("image_bank", torch.empty(0))
        for layer in range(self._layers):
            self.register_buffer(f"gallery_{layer}", torch.empty(0))

    @property
    def galleries(self) -> list[torch.Tensor]:
        """Features of the training images in each layer of the pixels, each (N, C, h, w), float32."""
        return [getattr(self, f"gallery_{layer}") for layer in range(self._layers)]

    def extract(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Features of normalized images (B, 3, H, W): pooled ones (B, C), then those of each layer (B, C, h, w)."""
        with torch.no_grad():
            found = self.feature_extractor(images.to(next(self.feature_extractor.parameters()).dtype))
        found = [feature.float() for feature in found]
        return [found[self._image_place].mean((2, 3)), *found[: self._layers]]

    def keep(self, features: Sequence[torch.Tensor]) -> None:
        """Set the training images' features, in the order of :meth:`extract`."""
        self.image_bank, *galleries = features
        for layer, gallery in enumerate(galleries):
            setattr(self, f"gallery_{layer}", gallery)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Score pre-processed images.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            Image scores ``pred_score`` (B,) and anomaly maps ``anomaly_map`` (B, 1, H, W), both distances in feature units.

        Raises:
            MemoryBankError: If no training image is known.
            UsageError: If the backbone gives NaN or infinite features.
        """
        if not len(self.image_bank):
            msg = "Spade knows no training image, so nothing can be scored: train first, or load a trained checkpoint."
            raise MemoryBankError(msg)
        pooled, *features = self.extract(images)
        for feature in (pooled, *features):
            check_finite(feature, None)
        with torch.autocast(images.device.type, enabled=False):  # distances are float32 whatever the trainer's precision
            k = min(self.num_neighbors, len(self.image_bank))
            distances, neighbors = nearest_by_product(pooled, self.image_bank, k)
            patch = [
                self._patch_distances([feature[image, None] for feature in features], neighbors[image].tolist())
                for image in range(len(images))
            ]
            maps = anomaly_map(torch.stack(patch), (images.shape[-2], images.shape[-1]))
        return InferenceBatch(pred_score=distances.mean(1), anomaly_map=maps[:, None])

    def _patch_distances(self, features: Sequence[torch.Tensor], neighbors: Sequence[int]) -> torch.Tensor:
        """Distance (h, w) of each patch of one image to the nearest patch of its neighbors, image by image of them."""
        queries = concatenate(features)
        nearest = torch.full((len(queries),), torch.inf, device=queries.device)
        for neighbor in neighbors:
            gallery = concatenate([layer[neighbor, None] for layer in self.galleries])
            nearest = torch.minimum(nearest, nearest_by_product(queries, gallery, 1)[0][:, 0])
        return nearest.reshape(features[0].shape[-2:])


def concatenate(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Patches (h * w, D) of one image, whose layers (1, C, h, w) are brought to the grid of the first one."""
    grid = features[0].shape[-2:]
    resized = [F.interpolate(feature, size=grid, mode="bilinear") for feature in features[1:]]
    return torch.cat([features[0], *resized], dim=1)[0].flatten(1).T.contiguous()


class Spade(MemoryBankMixin, AnomalibModule):
    """SPADE as a model of anomalib, for comparison with PatchCore; it is not exported.

    The image score is the mean distance of the image's pooled features to those of its nearest training images. The anomaly
    map is the distance of each patch to the nearest patch of these images, upsampled and smoothed by 4 pixels. Source: Cohen
    and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences", arXiv 2005.02357, with one nearest patch
    (kappa = 1). Distances are Euclidean, not squared.

    The model and its checkpoint keep all features of the layers in float32: 5.4 MiB for each training image of 224 x 224
    pixels with the default backbone and layers, 2.1 GiB for 391 images. Training takes up to half as much again. Scoring
    such an image takes 1.8 x 10^12 multiplications and additions with 50 neighbors, 77 times those of its backbone.

    Args:
        backbone: Any timm model that supports ``features_only``, or ``"efficientnet_lite0"`` (or 1, 2).
        layers: Feature layers of the pixels by timm's module names, shallow to deep.
        pre_trained: Whether to load the backbone's ImageNet weights.
        num_neighbors: Training images that an image is compared with; all of them where there are fewer.
        image_layer: Feature layer of the image score. ``None`` is the backbone's deepest.
        pre_processor: anomalib pre-processor, or whether to use the default one.
        post_processor: anomalib post-processor, or whether to use the default one.
        evaluator: anomalib evaluator, or whether to use the default one.
        visualizer: anomalib visualizer, or whether to use the default one.
        backbone_weights: Local ``.pth`` or ``.safetensors`` file with the backbone's weights. Wins over ``pre_trained``.

    Raises:
        UsageError: If an argument is out of range, the backbone is unknown, or it has no such layer.
        BackboneWeightsError: If the backbone's weights cannot be had or do not fit.
    """

    model: SpadeModel

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer1", "layer2", "layer3"),
        pre_trained: bool = True,
        num_neighbors: int = 50,
        image_layer: str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        backbone_weights: str | Path | None = None,
    ) -> None:
        check_number(
            "num_neighbors", num_neighbors, 1, MAX_NEIGHBORS, whole=True, hint="It is a number of images; the paper has 50."
        )
        if not isinstance(layers, str):
            layers = list(layers)  # plain: a checkpoint with the list type of get_model's omegaconf could not be loaded
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        image_layer = deepest_layer(backbone) if image_layer is None else image_layer
        self.model = SpadeModel(layers, image_layer, backbone, pre_trained, backbone_weights, num_neighbors)
        self._features: list[list[torch.Tensor]] = []  # of each batch of the training

    @staticmethod
    def configure_optimizers() -> None:
        """SPADE trains nothing by gradient."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the training images, in one process."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        """Trained on normal images only."""
        return LearningType.ONE_CLASS

    def prepare_data(self) -> None:
        """Set the data module up ahead of Lightning, to say what hinders it."""
        set_up(self.trainer)

    def setup(self, stage: str) -> None:
        """Check what can be checked before the work.

        Raises:
            UsageError: If there are several processes, or the data module's files do not fit.
            ImageError: If an image of the data module is damaged.
        """
        super().setup(stage)
        if stage == "fit":
            if self.trainer.world_size > 1:
                msg = f"Spade trains in one process, and the trainer has {self.trainer.world_size}: set devices to 1."
                raise UsageError(msg)
            check_data(self.trainer)

    def on_train_epoch_start(self) -> None:
        """Forget the images of an earlier training."""
        self._features = []
        self._is_fitted = torch.tensor([False], device=self.device)

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Collect the features of the batch's normal images.

        Raises:
            UsageError: If the backbone gives NaN or infinite features.
        """
        del args, kwargs
        images, paths = batch.image, batch.image_path
        if batch.gt_label is not None:
            normal = (batch.gt_label == 0).to(images.device)
            images = images[normal]
            paths = [path for path, used in zip(paths, normal, strict=True) if used] if paths else None
        if len(images):
            features = self.model.extract(images)
            for feature in features:
                check_finite(feature, paths)
            self._features.append(features)
        return torch.zeros((), requires_grad=True, device=self.device)  # Lightning wants a loss

    def fit(self) -> None:
        """Keep the collected features.

        Raises:
            MemoryBankError: If there is no normal image, or the training epoch has not ended.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return  # nothing was trained: scoring says so, and what to do
        if self.trainer.sanity_checking or not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            msg = (
                "Validation started before the end of the training epoch. Spade validates after it: leave the trainer's "
                "val_check_interval at 1.0 and num_sanity_val_steps at 0."
            )
            raise MemoryBankError(msg)
        if not self._features:
            raise MemoryBankError(no_normal_image("Spade"))
        kinds = [list(kind) for kind in zip(*self._features, strict=True)]
        self._features = []
        joined = []
        while kinds:  # each kind is freed before the next one is joined
            joined.append(torch.cat(kinds.pop(0)))
        self.model.keep(joined)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score the images of a batch."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def to_torch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse the export.

        Raises:
            UsageError: Always; it says what to train instead.
        """
        del args, kwargs
        raise UsageError(COMPARISON_ONLY)

    to_onnx = to_openvino = to_torch


def refuse_spade(checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of Spade where one of FaissPatchcore is asked for.

    Raises:
        UsageError: If the checkpoint is one of Spade; it says what to train instead.
    """
    if "model.image_bank" in checkpoint["state_dict"]:
        msg = f"This is a checkpoint of Spade. {COMPARISON_ONLY}"
        raise UsageError(msg)
