"""Estimates how long the jobs of an evaluation will take, and how much memory, before the first of them starts.

What a job computes is counted in operations. How fast this machine is at them is measured for a few seconds: the backbone on
one image, reading an image, a product of matrices, a pass over vectors, the metrics of pixels. Backbones get random weights,
so nothing is downloaded.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import ceil, log
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.models import MHPatchcore, Padim, Patchcore
from torch.utils.flop_counter import FlopCounterMode

from patchcore_plugin.elpv import split
from patchcore_plugin.errors import PatchcoreError
from patchcore_plugin.evaluation.job import TIMED_IMAGES, build_model
from patchcore_plugin.evaluation.metrics import pixel_metrics
from patchcore_plugin.evaluation.plan import component_class
from patchcore_plugin.images import find_images
from patchcore_plugin.model.augmentation import changes_of
from patchcore_plugin.model.lightning_model import FaissPatchcore
from patchcore_plugin.model.spade import Spade
from patchcore_plugin.names import as_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anomalib.models import AnomalibModule

    from patchcore_plugin.evaluation.plan import Job

_START_SECONDS = 10.0  # of a job's process, before it reads the first image
_CORESET_SHARE = 0.7  # of the products of all pairs of a patch and a pick: the time of our sampler, at 60,000 patches
_CACHE_LINE = 16  # float32 values that memory moves where one of them is written
_BATCH = 16


class EstimateError(PatchcoreError):
    """A job of a kind whose time and memory cannot be estimated."""


@dataclass(frozen=True)
class Speeds:
    """Speeds of a machine.

    Attributes:
        products: Multiplications and additions a second, float32, in products of matrices.
        passes: Bytes a second, of vectors whose distances from one vector are computed.
    """

    products: float
    passes: float


GPU = Speeds(products=10e12, passes=300e9)
"""A GPU that is nominally at 20 x 10^12 operations and 600 GB a second, and reaches half of that."""


@dataclass(frozen=True)
class Work:
    """What a job computes, apart from its network.

    Attributes:
        products: Multiplications and additions in products of matrices.
        passes: Bytes of vectors that are passed over.
        memory: Highest memory of what is learned, in bytes.
        image: Memory of each image in a batch, in bytes: features, and their copies.
    """

    products: float
    passes: float
    memory: float
    image: float


@dataclass(frozen=True)
class Line:
    """Estimate of all jobs of one model.

    Attributes:
        model: Name of the model.
        jobs: Number of jobs.
        seconds: Time of all of them on this machine.
        gpu_seconds: Time of all of them on :data:`GPU`, with this machine's processor beside it.
        memory: Memory of the largest job, libraries included, in bytes.
    """

    model: str
    jobs: int
    seconds: float
    gpu_seconds: float
    memory: float


@dataclass(frozen=True)
class Estimate:
    """Estimate of an evaluation.

    Attributes:
        lines: One line for each model.
        unknown: Reason why jobs are left out, by their labels.
    """

    lines: list[Line]
    unknown: dict[str, str]


@dataclass(frozen=True)
class _Images:
    """Images of a data set.

    Attributes:
        train: Number of training images.
        test: Number of test images.
        masked: Whether they have masks.
        sample: File of one of them.
        read: Seconds to read it.
        size: Bytes of its pixels, as floats.
    """

    train: int
    test: int
    masked: bool
    sample: Path
    read: float
    size: int


@dataclass(frozen=True)
class _Network:
    """A model's network on one image.

    Attributes:
        module: The model, with random weights.
        seconds: Time of resizing and embedding an image.
        operations: Multiplications and additions of the embedding.
        pixels: Pixels of an anomaly map.
        features: What the model keeps of an image.
    """

    module: AnomalibModule
    seconds: float
    operations: float
    pixels: int
    features: list[torch.Tensor]


def estimate(jobs: Sequence[Job]) -> Estimate:
    """Estimate the time and the memory of jobs.

    Args:
        jobs: The jobs, not finished yet.

    Returns:
        The estimate; jobs of other models than PatchCore, MHPatchcore, PaDiM and SPADE, or of data sets that only their
        datamodule knows, are left out.
    """
    try:
        return _estimate(jobs)
    finally:
        _give_memory_back()


def _estimate(jobs: Sequence[Job]) -> Estimate:
    lines, unknown = [], {}
    speeds, pixel_seconds = _measure()
    libraries = psutil.Process().memory_info().rss
    images: dict[str, _Images] = {}
    for model in dict.fromkeys(job.model for job in jobs):
        network, costs = None, []  # of one model at a time: networks may be large
        for job in (job for job in jobs if job.model == model):
            place = f"{job.dataset}/{job.seed}" if job.elpv else job.dataset
            try:
                images[place] = images.get(place) or _read_images(job)
                network = network or _read_network(job, images[place])
            except Exception as error:  # a class of the user's may raise anything; the job itself will say it again
                unknown[job.label] = as_text(str(error)).strip().split("\n")[0]
            else:
                costs.append(_costs(job, images[place], network, speeds, pixel_seconds))
        if costs:
            here, gpu, memory = zip(*costs, strict=True)
            lines.append(Line(model, len(costs), sum(here), sum(gpu), libraries + max(memory)))
    return Estimate(lines, unknown)


def _give_memory_back() -> None:
    """Return freed memory to the system: with GNU's C library, gigabytes of networks would stay beside the jobs."""
    gc.collect()  # models hold each other in circles
    with suppress(OSError, AttributeError, TypeError):  # another C library, or system
        ctypes.CDLL(None).malloc_trim(0)


def _costs(job: Job, images: _Images, network: _Network, speeds: Speeds, pixel_seconds: float) -> tuple[float, float, float]:
    """Seconds here, seconds on a GPU, and bytes of memory of one job."""
    module = network.module
    copies = 1 + len(changes_of(getattr(module, "augmentations", ())))
    epochs = module.trainer_arguments.get("max_epochs", 1)
    scored = images.test * (1 if job.trainer.get("limit_val_batches") == 0 else 2) + TIMED_IMAGES
    work = count_work(module, network.features, images.train * copies, scored)
    embedded = images.train * copies * epochs + scored
    reading = (images.train * epochs + scored) * images.read
    compared = images.test * network.pixels * images.masked
    fixed = _START_SECONDS + reading + compared * pixel_seconds
    here = fixed + embedded * network.seconds + work.products / speeds.products + work.passes / speeds.passes
    gpu = fixed + (embedded * network.operations + work.products) / GPU.products + work.passes / GPU.passes
    parameters = sum(value.nbytes for value in module.state_dict().values() if isinstance(value, torch.Tensor))
    maps = 20 * compared  # bytes: masks, maps, and what the metrics sort
    batch = _BATCH * (images.size + work.image)
    return here, gpu, max(work.memory, maps) + batch + parameters


def _read_images(job: Job) -> _Images:
    """Count the images of a job's data set, and read one."""
    if job.elpv:
        folders = split(job.elpv, job.seed)
        train, test, masked = folders["train/good"], [*folders["test/good"], *folders["test/defective"]], False
    elif component_class(job.data) is Folder and job.data["init_args"].get("root"):
        arguments = job.data["init_args"]
        train, test = (
            [
                image
                for name in names
                for folder in _as_list(arguments.get(name))
                for image in find_images(_join(job, folder))
            ]
            for names in (["normal_dir"], ["normal_test_dir", "abnormal_dir"])
        )
        masked = bool(arguments.get("mask_dir"))
    else:
        msg = f"only {job.data['class_path']} knows the images of data set {job.dataset}"
        raise EstimateError(msg)
    size = read_image(train[0], as_tensor=True).nbytes
    read = _timed(lambda: read_image(train[0], as_tensor=True))
    return _Images(len(train), len(test), masked, Path(train[0]), read, size)


def _join(job: Job, folder: str) -> Path:
    return Path(job.data["init_args"]["root"]) / folder


def _as_list(value: str | Sequence[str] | None) -> Sequence[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _read_network(job: Job, images: _Images) -> _Network:
    """Build a job's model with random weights, and embed an image of the data set."""
    arguments = {**job.network["init_args"], "pre_trained": False}
    if component_class(job.network) not in _WORKS:
        msg = f"the work of {job.network['class_path']} is not known"
        raise EstimateError(msg)
    if "backbone_weights" in arguments:
        arguments["backbone_weights"] = None
    if arguments.get("ensemble"):
        arguments["ensemble"] = [{**member, "backbone_weights": None} for member in arguments["ensemble"]]
    logging.disable(logging.WARNING)  # that the weights are random is no news here
    try:
        module = build_model({**job.network, "init_args": arguments}).eval()
    finally:
        logging.disable(logging.NOTSET)
    if isinstance(module, Padim | Patchcore | MHPatchcore):
        module.model.training = True  # of the model alone, which then gives its embedding
    image = read_image(images.sample, as_tensor=True)[None]
    transform = getattr(module.pre_processor, "transform", None) or (lambda whole: whole)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            features = _embed(module, transform(image))
        embed = module.embed if isinstance(module, FaissPatchcore) else partial(_embed, module)
        seconds = min(_timed(lambda: embed(transform(image))) for _ in range(2))
        height, width = transform(image).shape[-2:]
    return _Network(module, seconds, counter.get_total_flops(), height * width, features)


def _embed(module: AnomalibModule, images: torch.Tensor) -> list[torch.Tensor]:
    if isinstance(module, FaissPatchcore):
        return [module.model.embed(images)]
    return module.model.extract(images) if isinstance(module, Spade) else [module.model(images)]


def count_work(module: AnomalibModule, features: list[torch.Tensor], train: int, scored: int) -> Work:
    """Count what a model computes, apart from its network.

    Args:
        module: A model of a class that :func:`estimate` knows.
        features: What the model keeps of a single image.
        train: Number of training images.
        scored: Number of times that an image is scored.
    """
    return _WORKS[type(module)](module, features, train, scored)


def _of_ours(module: FaissPatchcore, features: list[torch.Tensor], train: int, scored: int) -> Work:
    """PatchCore: the coreset of the training patches, and the products of test patches and bank, by FAISS or torch."""
    rows, values = features[0][..., 0].numel(), features[0].shape[-1]
    patches = rows * train
    bank = max(1, int(patches * module.coreset_sampling_ratio))
    products = 2 * values * bank * (_CORESET_SHARE * patches + rows * scored)
    value_bytes = torch.empty(0, dtype=module.embedding_dtype).element_size()
    memory = patches * (values * value_bytes + 48) + 2 * 4 * bank * values
    return Work(products, 0, memory, 3 * 4 * rows * values)


def _of_patchcore(module: Patchcore, features: list[torch.Tensor], train: int, scored: int) -> Work:
    """Patchcore of anomalib: a pass over all projected patches for each pick; distances are computed in five steps."""
    rows, values = features[0].shape
    patches = rows * train
    bank = max(1, int(patches * module.coreset_sampling_ratio))
    projected = min(values, ceil(4 * log(max(2, patches)) / (0.9**2 / 2 - 0.9**3 / 3)))
    products = 2 * values * (bank * rows * scored + patches * projected)
    passes = 4 * patches * projected * bank + 4 * 5 * rows * bank * scored
    memory = 4 * patches * (2 * values + 2 * projected) + 4 * bank * values
    return Work(products, passes, memory, 3 * 4 * rows * values)


def _of_padim(module: Padim, features: list[torch.Tensor], train: int, scored: int) -> Work:
    """PaDiM: a covariance matrix for each patch of the grid, written value by value, and its inverse."""
    _, values, height, width = features[0].shape
    patches, matrices = height * width, 4 * height * width * values**2
    channels = sum(module.model.feature_extractor.out_dims)
    products = patches * (2 * values**2 * (train + scored) + 2 * values**3)
    passes = 2 * _CACHE_LINE * matrices + matrices * scored / _BATCH
    return Work(products, passes, 3 * matrices + 4 * patches * values * train, 2 * 4 * patches * channels)


def _of_mh_patchcore(module: MHPatchcore, features: list[torch.Tensor], train: int, scored: int) -> Work:
    """MHPatchcore of anomalib: a principal component analysis by batches, a covariance, and a coreset of each batch."""
    rows, values = features[0].shape
    patches, bank = rows * train, module.model.memory_bank.memory_bank_size
    merged = module.model.memory_bank.local_coreset_size
    decomposed = 8 * values**2 * (patches + ceil(patches / max(values, rows * _BATCH)) * values)
    products = decomposed + 4 * values**2 * (patches + rows * scored) + 2 * values * bank * rows * scored
    passes = 8 * values / 2 * merged * patches  # the analysis keeps a part of the values: half of them, perhaps
    windows = 9 * rows * sum(module.model.feature_extractor.out_dims)  # values of all neighborhoods of 3 x 3
    return Work(products, passes, 6 * 8 * values * (rows * _BATCH + values), 1.5 * 4 * windows)


def _of_spade(module: Spade, features: list[torch.Tensor], train: int, scored: int) -> Work:
    """SPADE: the products of all patches of an image with those of each of its neighbors."""
    values, rows = sum(feature.shape[1] for feature in features[1:]), features[1][0, 0].numel()
    compared = min(module.model.num_neighbors, train)
    products = 2 * values * compared * rows**2 * scored
    passes = 4 * 2 * rows**2 * compared * scored
    kept = 4 * sum(feature.numel() for feature in features)
    return Work(products, passes, 1.5 * kept * train, 2 * kept)


_WORKS: dict[type, Callable[[Any, list[torch.Tensor], int, int], Work]] = {
    FaissPatchcore: _of_ours,
    Patchcore: _of_patchcore,
    Padim: _of_padim,
    MHPatchcore: _of_mh_patchcore,
    Spade: _of_spade,
}
"""The function that counts for each class of models."""


def _measure() -> tuple[Speeds, float]:
    """Measure this machine's speeds, and the seconds that the metrics of a pixel take."""
    queries, bank, vectors = torch.rand(784, 1536), torch.rand(4096, 1536), torch.rand(40_000, 256)
    product = min(_timed(lambda: queries @ bank.T) for _ in range(3))
    passed = fmean(_timed(lambda: torch.linalg.norm(vectors - vectors[0], dim=1)) for _ in range(3))
    maps = np.random.default_rng(0).random((4, 224, 224), np.float32)
    metrics = _timed(lambda: pixel_metrics(maps > 0.99, maps))
    return Speeds(2 * bank.numel() * len(queries) / product, vectors.nbytes / passed), metrics / maps.size


def _timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
