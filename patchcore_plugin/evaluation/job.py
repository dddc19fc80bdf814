"""One job of an evaluation, in a process of its own: ``python -m patchcore_plugin.evaluation.job JOB.json RESULT DATA``.

Fits the model through anomalib's ``Engine``, scores the test images, and leaves a folder ``RESULT``, whole or not at all:
metrics.json, predictions.csv and pictures. Ends by itself when its standard input closes, as it does when the evaluation
is killed.
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
from patchcore_plugin.evaluation.metrics import image_metrics, pixel_metrics
from patchcore_plugin.evaluation.pictures import draw_pictures
from patchcore_plugin.evaluation.plan import Job, component_class, component_parser
from patchcore_plugin.evaluation.runner import NUMBERS, PREDICTIONS
from patchcore_plugin.model.backbone import EMBEDDED, Backbone
from patchcore_plugin.model.lightning_model import FaissPatchcore

if TYPE_CHECKING:
    from types import TracebackType

_WARM_UP, _TIMED = 5, 30  # images by which the latency is measured


def run(job: Job, data: Path, folder: Path) -> None:
    """Do a job, and write its result into ``folder``.

    Args:
        job: What to do.
        data: Folder for images that are laid out for the job.
        folder: Empty folder for the result.

    Raises:
        ValueError: If there is no test image, or a score is NaN or infinite.
    """
    seed_everything(job.seed, workers=True, verbose=False)
    datamodule, model = _datamodule(job, data), _model(job)
    clock, collected = _Clock(model), _Collector()
    engine = Engine(
        default_root_dir=folder / "engine",
        logger=False,
        callbacks=[clock, collected],
        **{"devices": 1, "enable_progress_bar": False, "enable_model_summary": False, **job.trainer},
    )
    with PeakMemory() as memory:
        started = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        fit_seconds = time.perf_counter() - started - clock.validation
    if model.post_processor is not None:
        model.post_processor.enable_normalization = False  # it would clip scores beyond the validation set's range
    engine.predict(model, datamodule=datamodule, return_predictions=False)
    collected.check()
    model.to(engine.trainer.strategy.root_device).eval()
    bank = getattr(model.model, "memory_bank", None)
    state = sum(value.nbytes for value in model.state_dict().values() if isinstance(value, torch.Tensor))
    metrics = {
        **image_metrics(collected.labels, collected.scores),
        **(pixel_metrics(np.concatenate(collected.masks), np.concatenate(collected.maps)) if collected.masks else {}),
        "fit_seconds": fit_seconds,
        "bank_seconds": clock.bank,
        "peak_mebibytes": memory.peak / 2**20,
        "latency_milliseconds": _latency(model, datamodule.test_data),
        "bank_vectors": len(bank) if isinstance(bank, torch.Tensor) and bank.ndim == 2 else None,
        "state_mebibytes": state / 2**20,
    }
    shown = draw_pictures(model, datamodule.test_data, collected.labels, collected.scores, collected.kinds, folder)
    with (folder / PREDICTIONS).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "kind", "label", "score"])
        table.writerows(zip(collected.images, collected.kinds, collected.labels, map(repr, collected.scores), strict=True))
    content = {
        "job": job.model_dump(),
        "metrics": metrics,
        "threshold": _threshold(model),
        "pictures": shown,
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform()},
    }
    (folder / NUMBERS).write_text(json.dumps(content, indent=1), encoding="utf-8")
    shutil.rmtree(folder / "engine", ignore_errors=True)


def _datamodule(job: Job, data: Path) -> AnomalibDataModule:
    component = job.data
    if job.elpv is not None:
        root = data / f"elpv-{job.elpv}-{job.seed}"
        lay_out(root, job.elpv, job.seed)
        component = {**component, "init_args": {**component["init_args"], "root": str(root)}}
    return _build("data", component)


def _model(job: Job) -> AnomalibModule:
    """The model; one that is not ours gets an embedded backbone's weights where it asks for that backbone.

    Raises:
        ValueError: If it has no timm feature extractor to fill.
    """
    path, arguments = job.network["class_path"], job.network["init_args"]
    name = arguments.get("backbone")
    if name not in EMBEDDED or issubclass(component_class(job.network), FaissPatchcore):
        return _build("model", job.network)
    net = Backbone(name, arguments.get("layers", ())).net
    # anomalib would ask a model hub for the weights; here they are ours, under timm's name of the architecture.
    filled = {**arguments, "backbone": net.pretrained_cfg["architecture"], "pre_trained": False}
    model = _build("model", {"class_path": path, "init_args": filled})
    extractors = [module for module in model.modules() if isinstance(module, TimmFeatureExtractor)]
    if not extractors:
        msg = f"{path} has no timm feature extractor that the weights of {name} could be given to."
        raise ValueError(msg)
    for extractor in extractors:
        extractor.feature_extractor.load_state_dict(net.state_dict())
    return model


def _build(kind: str, component: dict[str, Any]) -> Any:
    parser = component_parser(kind)
    return parser.instantiate_classes(parser.parse_object({kind: component}))[kind]


def _threshold(model: AnomalibModule) -> float | None:
    """Raw image score from which the model's post-processor calls an image anomalous; None where it has no threshold."""
    threshold = getattr(model.post_processor, "image_threshold", None)
    return None if threshold is None or not np.isfinite(float(threshold)) else float(threshold)


def _latency(model: AnomalibModule, dataset: Any) -> float:
    """Median milliseconds of one image through the model as it was trained, on its device."""
    times = []
    for turn in range(_WARM_UP + _TIMED):
        image = dataset[turn * len(dataset) // (_WARM_UP + _TIMED)].image[None].to(model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            float(model(image).pred_score)  # waits for an accelerator
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[_WARM_UP:]))


class PeakMemory:
    """Highest resident memory of this process, in bytes, sampled a hundred times a second.

    The system's own maximum is no help: on Linux a new process inherits that of its parent.
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
    """Seconds of a fit that go into the bank, and into scoring the validation images."""

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
        self._began = time.perf_counter()  # the bank is there: it is built when validation starts, before its epoch

    def on_validation_end(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        self.validation += time.perf_counter() - self._began


class _Collector(Callback):
    """Scores, labels and names of the test images in their order; masks and maps where there are masks."""

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
        """Kind of defect of each image: its folder's name."""
        return [Path(image).parent.name for image in self.images]

    def check(self) -> None:
        if not self.images:
            msg = "The data set has no test image."
            raise ValueError(msg)
        bad = [image for image, score in zip(self.images, self.scores, strict=True) if not np.isfinite(score)]
        if bad:
            msg = f"{len(bad)} scores are NaN or infinite, among them that of {bad[0]}."
            raise ValueError(msg)


def _end_with_parent() -> None:
    """Wait for the end of standard input, which the evaluation never writes to: then it is gone."""
    while os.read(sys.stdin.fileno(), 1):  # not by the buffered stream, whose lock would be held when Python ends
        pass
    os._exit(1)


def main() -> None:
    """Do the job of a file; the result's folder appears when it is complete."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore")  # the training stack's own remarks would bury an error
    file, result, data = map(Path, sys.argv[1:])
    partial = result.with_name(f".{result.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        run(Job.model_validate_json(file.read_text(encoding="utf-8")), data, partial)
    except Exception as error:
        result.with_name(f"{result.name}.error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise
    partial.rename(result)


if __name__ == "__main__":
    main()
