"""One job of an evaluation, as a program: ``python -m patchcore_plugin.evaluation.job JOB.json RESULT DATA``.

Trains the model through anomalib's ``Engine``, scores the test images, and writes the folder ``RESULT`` with metrics.json,
predictions.csv and pictures. The folder appears once it is complete. The program ends when its standard input closes,
which happens when the evaluation ends or is killed.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.models.components import MemoryBankMixin, TimmFeatureExtractor
from lightning.pytorch import Callback, Trainer, seed_everything

from patchcore_plugin.elpv import lay_out
from patchcore_plugin.errors import PatchcoreError
from patchcore_plugin.evaluation.metrics import image_metrics, pixel_metrics
from patchcore_plugin.evaluation.pictures import draw_pictures
from patchcore_plugin.evaluation.plan import Job, component_class, component_parser, parse_component
from patchcore_plugin.evaluation.runner import METRICS_FILE, PREDICTIONS_FILE
from patchcore_plugin.model.backbone import Backbone
from patchcore_plugin.model.lightning_model import FaissPatchcore
from patchcore_plugin.model.spade import Spade
from patchcore_plugin.model.weights import PACKAGED
from patchcore_plugin.moving import rename
from patchcore_plugin.names import as_text, to_cell

if TYPE_CHECKING:
    from types import TracebackType

_WARM_UP_IMAGES = 5

TIMED_IMAGES = 30
"""Test images that a job scores once more, one by one, for the latency."""


class JobError(PatchcoreError):
    """A job cannot be done as the evaluation defines it, or gives no usable scores."""


def run(job: Job, data: Path, folder: Path) -> None:
    """Run a job, and write its result into ``folder``.

    Args:
        job: The job.
        data: Folder for images that the job copies out of a package.
        folder: Empty folder for the result.

    Raises:
        JobError: If there is no test image, a score is NaN or infinite, or the model cannot take the backbone's weights.
    """
    seed_everything(job.seed, workers=True, verbose=False)
    datamodule, model = _datamodule(job, data), build_model(job.network)
    collected, costs = _fit_and_score(job, model, datamodule, folder / "engine")
    qualities = image_metrics(collected.labels, collected.scores)
    if collected.masks:
        qualities |= pixel_metrics(np.concatenate(collected.masks), np.concatenate(collected.maps))
    content = {
        "job": job.model_dump(),
        "metrics": {**qualities, **costs, "latency_milliseconds": _latency(model, datamodule.test_data)},
        "threshold": _threshold(model),
        "pictures": draw_pictures(model, datamodule.test_data, collected.labels, collected.scores, collected.kinds, folder),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform()},
    }
    with (folder / PREDICTIONS_FILE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "kind", "label", "score"])
        names = [[to_cell(as_text(name)) for name in names] for names in (collected.images, collected.kinds)]
        table.writerows(zip(*names, collected.labels, map(repr, collected.scores), strict=True))
    (folder / METRICS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    shutil.rmtree(folder / "engine", ignore_errors=True)


def _fit_and_score(
    job: Job, model: AnomalibModule, datamodule: AnomalibDataModule, folder: Path
) -> tuple[_Collector, dict[str, float | None]]:
    """Train a model, and score the test images; returns the scores, and the costs of the training by metric."""
    clock, collected = _Clock(model), _Collector()
    engine = Engine(
        default_root_dir=folder,
        logger=False,
        callbacks=[clock, collected],
        **{"devices": 1, "enable_progress_bar": False, "enable_model_summary": False, **job.trainer},
    )
    with PeakMemory() as memory:
        started = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        fit_seconds = time.perf_counter() - started - clock.validation
    if model.post_processor is not None:
        model.post_processor.enable_normalization = False  # normalization clips scores outside the validation set's range
    engine.predict(model, datamodule=datamodule, return_predictions=False)
    collected.check()
    model.to(engine.trainer.strategy.root_device).eval()
    banks = [getattr(part, "memory_bank", None) for part in getattr(model.model, "members", [model.model])]
    banks = [bank for bank in banks if isinstance(bank, torch.Tensor) and bank.ndim == 2]
    state = sum(value.nbytes for value in model.state_dict().values() if isinstance(value, torch.Tensor))
    return collected, {
        "fit_seconds": fit_seconds,
        "bank_seconds": clock.bank,
        "peak_mebibytes": memory.peak / 2**20,
        "bank_vectors": sum(map(len, banks)) or None,
        "state_mebibytes": state / 2**20,
    }


def _datamodule(job: Job, data: Path) -> AnomalibDataModule:
    component = job.data
    arguments = dict(component["init_args"])
    if job.elpv is not None:
        root = data / f"elpv-{job.elpv}-{job.seed}"
        lay_out(root, job.elpv, job.seed)
        arguments["root"] = str(root)
    if job.planted:
        arguments["root"] = str(plant(arguments, job.planted, job.seed, data / f"planted-{job.key}"))
    return _build("data", {**component, "init_args": arguments})


def plant(arguments: dict[str, Any], share: float, seed: int, target: Path) -> Path:
    """Copy a data set, and move some of its defective test images among the training images.

    Args:
        arguments: Arguments of ``anomalib.data.Folder``.
        share: Share of the training images that are defective afterwards.
        seed: Draws the images.
        target: Folder for the copy; one of an earlier job is replaced.

    Returns:
        The copy's root.

    Raises:
        JobError: If there are too few defective images.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(arguments["root"], target)
    folders = arguments["abnormal_dir"]
    folders = [folders] if isinstance(folders, str) else folders
    masks = arguments.get("mask_dir") or [None] * len(folders)
    defective = [
        (image, mask and target / mask)
        for folder, mask in zip(folders, masks, strict=True)
        for image in sorted((target / folder).iterdir())
    ]
    good = target / arguments["normal_dir"]
    count = round(share / (1 - share) * sum(1 for _ in good.iterdir()))
    if count >= len(defective):
        msg = f"A share of {share:g} planted images takes {count} defective ones, and there are {len(defective)}."
        raise JobError(msg)
    for number in np.random.default_rng(seed).choice(len(defective), count, replace=False):
        image, masks_folder = defective[number]
        image.rename(good / f"planted-{image.parent.name}-{image.name}")
        for mask in masks_folder.glob(f"{image.stem}.*") if masks_folder else ():
            mask.unlink()
    return target


def build_model(network: dict[str, Any]) -> AnomalibModule:
    """Build a model; another package's model gets our packaged weights if it names a packaged backbone.

    Args:
        network: ``class_path`` and ``init_args`` of the model.

    Raises:
        JobError: If the model has no timm feature extractor for the weights.
    """
    path, arguments = network["class_path"], network["init_args"]
    name = arguments.get("backbone")
    if name not in PACKAGED or issubclass(component_class(network), (FaissPatchcore, Spade)):
        return _build("model", network)
    net = Backbone(name, arguments.get("layers", ())).net
    # anomalib would download weights from a model hub. It builds timm's architecture instead, and our weights are copied.
    filled = {**arguments, "backbone": net.pretrained_cfg["architecture"], "pre_trained": False}
    model = _build("model", {"class_path": path, "init_args": filled})
    extractors = [module for module in model.modules() if isinstance(module, TimmFeatureExtractor)]
    if not extractors:
        msg = f"{path} has no timm feature extractor, so the weights of {name} cannot be loaded into it."
        raise JobError(msg)
    for extractor in extractors:
        extractor.feature_extractor.load_state_dict(net.state_dict())
    return model


def _build(kind: str, component: dict[str, Any]) -> Any:
    return component_parser(kind).instantiate_classes(parse_component(kind, component))[kind]


def _threshold(model: AnomalibModule) -> float | None:
    """Threshold of raw image scores in the model's post-processor; None if it has no threshold."""
    threshold = getattr(model.post_processor, "image_threshold", None)
    return None if threshold is None or not np.isfinite(float(threshold)) else float(threshold)


def _latency(model: AnomalibModule, dataset: Any) -> float:
    """Median milliseconds of one image through the torch model, on the model's device."""
    times = []
    for turn in range(_WARM_UP_IMAGES + TIMED_IMAGES):
        image = dataset[turn * len(dataset) // (_WARM_UP_IMAGES + TIMED_IMAGES)].image[None].to(model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            float(model(image).pred_score)  # float() waits until an accelerator has finished
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[_WARM_UP_IMAGES:]))


class PeakMemory:
    """Context in which the highest resident memory of this process is measured: ``peak``, in bytes.

    A thread samples the memory every 10 ms, because on Linux the system's own maximum includes that of the parent process.
    """

    def __enter__(self) -> PeakMemory:
        self._process, self._ended = psutil.Process(), threading.Event()
        self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()


class _Clock(Callback):
    """Callback that measures two parts of a training: seconds for the bank, and seconds for validation."""

    def __init__(self, model: AnomalibModule) -> None:
        self.bank: float | None = None
        self.validation = 0.0
        self._began = 0.0
        if isinstance(model, MemoryBankMixin):
            fit = model.fit

            def timed() -> None:
                started = time.perf_counter()
                fit()
                self.bank = (self.bank or 0) + time.perf_counter() - started

            model.fit = timed

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        self._began = time.perf_counter()  # anomalib builds the bank before the validation epoch, so it is not counted here

    def on_validation_end(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        self.validation += time.perf_counter() - self._began


class _Collector(Callback):
    """Callback that collects paths, labels and scores of the test images in order; masks and maps if there are masks."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.labels: list[int] = []
        self.scores: list[float] = []
        self.masks: list[np.ndarray] = []
        self.maps: list[np.ndarray] = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: AnomalibModule, outputs: Any, *args: Any) -> None:
        self.images += [str(path) for path in outputs.image_path]
        self.labels += outputs.gt_label.int().flatten().tolist()
        scores, maps = outputs.pred_score, outputs.anomaly_map
        if scores is None:
            scores = maps.flatten(1).amax(1)
        self.scores += scores.float().flatten().tolist()
        if outputs.gt_mask is not None and maps is not None:
            self.masks.append(outputs.gt_mask.bool().flatten(0, -3).cpu().numpy())
            self.maps.append(maps.float().flatten(0, -3).cpu().numpy())

    @property
    def kinds(self) -> list[str]:
        """Kind of each image: the name of its folder."""
        return [Path(image).parent.name for image in self.images]

    def check(self) -> None:
        """Refuse an empty test set and scores that are not finite.

        Raises:
            JobError: If there is no test image, or a score is NaN or infinite.
        """
        if not self.images:
            msg = "The data set has no test image."
            raise JobError(msg)
        bad = [image for image, score in zip(self.images, self.scores, strict=True) if not np.isfinite(score)]
        if bad:
            msg = f"{len(bad)} scores are NaN or infinite; the first is the score of {bad[0]}."
            raise JobError(msg)


def _end_with_parent() -> None:
    """End this process when its standard input closes: the evaluation writes nothing to it, so the evaluation has ended."""
    while os.read(sys.stdin.fileno(), 1):  # unbuffered: Python cannot exit while a thread holds the lock of sys.stdin
        pass
    os._exit(1)


def main() -> None:
    """Run the job that a file defines; the result's folder appears once it is complete."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore")  # warnings of the training packages would hide an error in the log
    file, result, data = map(Path, sys.argv[1:])
    partial = result.with_name(f".{result.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        run(Job.model_validate(json.loads(file.read_bytes())), data, partial)
    except Exception as error:
        result.with_name(f"{result.name}.error").write_text(_reason(error), encoding="utf-8")
        raise
    rename(partial, result)


def _reason(error: Exception) -> str:
    return as_text(str(error) if isinstance(error, PatchcoreError) else f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
