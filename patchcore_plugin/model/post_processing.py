"""Thresholds from normal images alone, in anomalib's post-processor slot."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import DynamicBufferMixin
from anomalib.post_processing import PostProcessor

from patchcore_plugin.bundle import MAX_CALIBRATION, Calibration, Sessions
from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.sessions import check_groups, hold_back_sessions, session_of, warn_of_one_session
from patchcore_plugin.scoring.conformal import (
    check_review_rate,
    check_sessions,
    describe_promise,
    images_needed,
    set_thresholds,
    thin_sessions,
)

if TYPE_CHECKING:
    from anomalib.data import Batch
    from lightning import LightningModule, Trainer

logger = logging.getLogger(__name__)


class ConformalPostProcessor(DynamicBufferMixin, PostProcessor):
    """Sets the thresholds for a false-alarm rate, by the normal images of the validation set.

    anomalib's default needs defective images, to find the threshold of the best F1 score. Here the validation set may hold
    defective images, which are left out. :mod:`patchcore_plugin.scoring.conformal` says on what condition this holds:

    * at most ``false_positive_rate`` of normal images score above the image threshold;
    * at most ``false_positive_rate`` of normal images have any pixel above the pixel threshold.

    A ``review_rate`` makes a third answer, for a person to look at the part: at most this share of normal images is called
    anomalous or is one to review. The bundle, its runtime and the service answer ``"review"`` then; anomalib's own
    predictions, which are two-valued, do not. The pixel threshold is that of the ``review_rate``, so that regions say where
    to look.

    The two rates hold separately: an image may be above one threshold and not above the other. Both hold for images of the
    recording sessions (days, batches, cameras) that are known. With ``groups``, whole sessions are held back, and the
    thresholds are made for a new session: each is the largest that a session held back would set alone. With J sessions held
    back, on average at least J of J + 1 new sessions keep the rate.

    Normal images for validation must not be in the memory bank. anomalib's ``val_split_mode: from_train`` holds back a share
    of the training images (``val_split_ratio``); ``same_as_test`` and ``from_test`` take normal test images. With
    ``groups``, ``from_train`` holds back whole sessions with about that share of the images, drawn at random by the data
    module's ``seed``; in other modes no session may be in training and validation.

    Normalization follows the thresholds: :func:`patchcore_plugin.scoring.conformal.set_thresholds`. Leave anomalib's
    sensitivities at 0.5: another value moves the thresholds, and the rates with them.

    Args:
        false_positive_rate: Share of normal images that may be called anomalous, in (0, 1).
        groups: What tells the recording session of an image: ``"folder"`` for its folder, or a regular expression that is
            searched in its path, written with ``/``, and whose first capture group is the session. ``None`` takes all
            images as one session.
        review_rate: Share of normal images that may be called anomalous or be to review, above ``false_positive_rate`` and
            below 1. ``None`` makes two answers, normal and anomalous.

    Attributes:
        calibration: Three numbers of each calibration image (n, 3), float32, in feature units: its score, and the largest
            value and the mean of its anomaly map; with ``groups`` a fourth, the number of its session. At most 10,000 images
            are kept, drawn at random, for which the rates hold too.

    Raises:
        UsageError: If a rate is out of range, or ``groups`` is no such expression; before training or after validation, if
            there are too few normal images for the rate (0.01 needs 99, with ``groups`` of each session held back), or if
            sessions cannot be held back.

    Example:
        >>> from patchcore_plugin import ConformalPostProcessor, FaissPatchcore
        >>> model = FaissPatchcore(post_processor=ConformalPostProcessor(false_positive_rate=0.01))
    """

    calibration: torch.Tensor

    def __init__(
        self, false_positive_rate: float = 0.01, groups: str | None = None, review_rate: float | None = None
    ) -> None:
        if images_needed(false_positive_rate) > MAX_CALIBRATION:
            msg = (
                f"false_positive_rate must be at least {1 / (MAX_CALIBRATION + 1):.2g}, got {false_positive_rate!r}: a "
                f"calibration keeps {MAX_CALIBRATION:,} images at most."
            )
            raise UsageError(msg)
        check_review_rate(review_rate, false_positive_rate)
        if groups is not None:
            check_groups(groups)
        super().__init__()
        self.false_positive_rate = false_positive_rate
        self.review_rate = review_rate
        self.groups = groups
        self.register_buffer("calibration", torch.empty(0, 3))
        self._rows: dict[Any, torch.Tensor | None] = {}  # by image; None for an anomalous image

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_positive_rate", "groups", "review_rate")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hold whole sessions back, or say that the images seem to be of one session.

        Raises:
            UsageError: If sessions cannot be held back.
        """
        del pl_module
        if self.groups is not None and stage in ("fit", "validate"):
            hold_back_sessions(trainer, self.groups, self.false_positive_rate)
        elif stage == "fit":
            warn_of_one_session(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a validation set that is too small before training starts, where its labels are known by then."""
        del pl_module
        datamodule = getattr(trainer, "datamodule", None)  # absent where loaders were given instead
        if not isinstance(datamodule, AnomalibDataModule):
            return
        samples = getattr(getattr(datamodule, "val_data", None), "samples", ())
        if len(samples) == 0:
            self._check_count(0)
        elif "label_index" in samples:
            self._check_count(int((samples["label_index"] != 1).sum()))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what an interrupted validation has collected."""
        del trainer, pl_module
        self._rows = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Batch, *args: Any, **kwargs: Any
    ) -> None:
        """Collect the calibration's numbers of the batch's normal images; without labels, all images are normal."""
        del pl_module, args, kwargs
        maps = outputs.anomaly_map.flatten(1)
        rows = torch.stack([outputs.pred_score.flatten(), maps.amax(1), maps.mean(1)], dim=1).float().cpu()
        # A distributed sampler repeats images to make all shares equally large: by its name, an image counts once.
        start = len(self._rows)
        names = outputs.image_path or [(trainer.global_rank, start + number) for number in range(len(rows))]
        anomalous = torch.zeros(len(rows)) if outputs.gt_label is None else outputs.gt_label.flatten()
        self._rows.update(
            {name: None if bad else row for name, row, bad in zip(names, rows, anomalous.tolist(), strict=True)}
        )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds and the range of normalization.

        Raises:
            UsageError: If there are too few normal images for the rate.
        """
        del pl_module
        found, self._rows = self._rows, {}
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, found)
            found = {name: row for share in shares for name, row in share.items()}
        found = {name: row for name, row in found.items() if row is not None}
        self._check_count(len(found))
        names = sorted(found)  # in one order, however processes shared them
        rows = torch.stack([found[name] for name in names])
        if self.groups is not None:
            rows = self._with_sessions(rows, names)
        elif len(rows) > MAX_CALIBRATION:
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MAX_CALIBRATION]]
        self.calibration = rows.to(self.calibration)
        record = self.record()
        if trainer.global_rank == 0:
            logger.info("%s", describe_promise(record))
        image, pixel = set_thresholds(record)
        buffers = (
            (self._image_threshold, self.image_min, self.image_max),
            (self._pixel_threshold, self.pixel_min, self.pixel_max),
        )
        for scale, (limit, low, high) in zip((image, pixel), buffers, strict=True):
            limit.fill_(scale.threshold)
            low.fill_(scale.minimum)
            high.fill_(scale.maximum)

    def record(self) -> Calibration | None:
        """The calibration as a bundle keeps it; None before a validation."""
        if not len(self.calibration):
            return None
        scores, peaks, means = (sorted(column.tolist()) for column in self.calibration[:, :3].T)
        sessions = None
        if self.calibration.shape[1] > 3:
            number = self.calibration[:, 3].int()
            by_score, by_peak = (number[self.calibration[:, column].argsort(stable=True)].tolist() for column in (0, 1))
            sessions = Sessions(scores=by_score, peaks=by_peak)
        return Calibration(
            false_positive_rate=self.false_positive_rate,
            scores=scores,
            peaks=peaks,
            means=means,
            sessions=sessions,
            review_rate=self.review_rate,
        )

    def _with_sessions(self, rows: torch.Tensor, names: list[Any]) -> torch.Tensor:
        """The calibration (n, 4) with the number of each image's session.

        Raises:
            UsageError: If the session of an image is unknown, or a session has too few images.
        """
        sessions = [session_of(name, self.groups) for name in names]
        counts = Counter(sessions)
        check_sessions(counts, self.false_positive_rate)
        numbers = torch.tensor([sorted(counts).index(session) for session in sessions])
        return torch.cat([rows, numbers[:, None]], dim=1)[thin_sessions(numbers.numpy())]

    def _check_count(self, count: int) -> None:
        needed = images_needed(self.false_positive_rate)
        if count < needed:
            lowest = f"{1 / (count + 1):.3g} is the lowest rate for {count} images" if count else "that takes an image too"
            msg = (
                f"false_positive_rate={self.false_positive_rate:g} needs at least {needed} normal images in the validation "
                f"set, which has {count}. Hold back more of the training images (val_split_mode: from_train, and a larger "
                f"val_split_ratio), take more images, or allow more false alarms: {lowest}. Or train without thresholds, as "
                "configs/few_images.yaml does (val_split_mode: none, and the trainer's limit_val_batches: 0): such a model "
                "gives scores and no verdict."
            )
            raise UsageError(msg)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of anomalib's post-processor has no calibration; a validation gives it one.
        state_dict.setdefault(prefix + "calibration", torch.empty(0, 3))
        super()._load_from_state_dict(state_dict, prefix, *args)
