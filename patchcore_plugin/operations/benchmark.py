"""Where the time of a bundle goes on this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import openvino as ov

from patchcore_plugin.bundle import FEATURES
from patchcore_plugin.cpu import compile_options
from patchcore_plugin.images import read_image
from patchcore_plugin.runtime.device import CPU
from patchcore_plugin.runtime.network import NetworkFiles, read_preprocessing
from patchcore_plugin.scoring import anomaly_map

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from patchcore_plugin.runtime import PatchcoreRuntime

STAGES = ("decode", "preprocess", "backbone", "search", "map")


def stages(runtime: PatchcoreRuntime, images: Sequence[Path]) -> dict[str, list[float]]:
    """Milliseconds of each stage for each image but the first, one image at a time.

    Args:
        runtime: A bundle, loaded in mode ``"latency"``.
        images: Image files, at least two: the first takes longer, and is left out.

    Returns:
        For each of :data:`STAGES` one time per image. The time of the backbone is that of the whole network less that of
        its pre-processing, which is measured by itself.
    """
    core = ov.Core()
    options = {**compile_options("latency", runtime.threads), "INFERENCE_PRECISION_HINT": "f32"}
    steps = core.compile_model(read_preprocessing(core, NetworkFiles.read(runtime.path / FEATURES)), CPU, options)
    times = [_image_stages(runtime, steps, image) for image in images][1:]
    return {stage: [spent[number] for spent in times] for number, stage in enumerate(STAGES)}


def _image_stages(runtime: PatchcoreRuntime, steps: ov.CompiledModel, image: Path) -> tuple[float, ...]:
    """Milliseconds of each stage for one image."""
    pixels, decode = _timed(read_image, image, intensity_range=runtime.intensity_range)
    _, preprocess = _timed(steps, [pixels[None]], share_inputs=True, share_outputs=True)
    embedding, network = _timed(runtime.embed, [pixels])
    scores, search = _timed(runtime.bank.score, embedding, runtime.rule)
    _, smooth = _timed(anomaly_map, scores.patch, runtime.manifest.preprocessing.size)
    return decode, preprocess, network - preprocess, search, smooth


def _timed(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    """What a function returns, and how many milliseconds it takes."""
    started = time.perf_counter()
    result = function(*arguments, **options)
    return result, 1000 * (time.perf_counter() - started)


def images_per_second(runtime: PatchcoreRuntime, images: Sequence[Path]) -> float:
    """Images that the runtime scores in a second, from file to score and anomaly map."""
    runtime.predict(images[:2])  # the first images take longer
    started = time.perf_counter()
    for prediction in runtime.stream(images):
        _ = prediction.anomaly_map  # computed when asked for
    return len(images) / (time.perf_counter() - started)
