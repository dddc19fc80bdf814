"""The choice of the network's precision, by measurement on this machine."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov

from patchcore_plugin.bundle import BundleError, PrecisionTrial
from patchcore_plugin.cpu import has_bfloat16
from patchcore_plugin.runtime.network import INPUT, NORMALIZED, Network

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from patchcore_plugin.memory_bank import MemoryBank
    from patchcore_plugin.scoring import ScoreRule

logger = logging.getLogger(__name__)

CORRELATION = 0.99
"""Least rank correlation of image scores with f32's, for a precision to be taken."""

ERROR = 0.02
"""Largest mean relative error of image scores against f32, for a precision to be taken."""

_REPETITIONS = 5


def choose_precision(
    path: Path,
    precision: str,
    bank: MemoryBank,
    images: Sequence[NDArray[np.uint8]],
    rule: ScoreRule,
    progress: Callable[[str], object],
) -> tuple[str, list[PrecisionTrial]]:
    """Take the fastest precision whose image scores are near enough to f32's, and leave its network at ``path``.

    Args:
        path: The f32 network.
        precision: ``"auto"``, or the only one to consider besides f32.
        bank: The memory bank.
        images: Normal images (H, W, 3), u8, RGB, that are not in the bank.
        rule: How the model scores images.
        progress: Called with what is done next.

    Returns:
        The precision, and what was measured; nothing was where only f32 was asked for.

    Raises:
        BundleError: If there are no images to measure or to calibrate on, or int8 is asked for and NNCF is not installed.
    """
    if precision == "f32":
        return "f32", []
    if not images:
        msg = f"precision {precision!r} is measured on normal images, and the checkpoint keeps none. Give some (--images)."
        raise BundleError(msg)
    files = _candidates(path, precision, images, progress)
    trials, reference = [], None
    for name, file in files.items():
        progress(f"precision {name}")
        try:
            milliseconds, scores = _measure(Network(file, name), bank, images[1::2] or images, rule)
        except (RuntimeError, ValueError) as error:  # it does not compile, or gives NaN
            if name in (precision, "f32"):
                msg = f"The network cannot be used in {name}: {error}"
                raise BundleError(msg) from error
            logger.warning("The network cannot be used in %s: %s", name, error)
            continue
        reference = scores if reference is None else reference
        trials.append(_compared(name, milliseconds, scores, reference))
    if precision == "auto":
        chosen = min((trial for trial in trials if trial.good), key=lambda trial: trial.milliseconds).precision
    else:
        chosen = precision
        if not trials[-1].good:
            logger.warning("Image scores in %s are not near those of f32: see the table.", chosen)
    if "int8" in files:
        _settle(files["int8"], path, take=chosen == "int8")
    return chosen, trials


def _candidates(
    path: Path, precision: str, images: Sequence[NDArray[np.uint8]], progress: Callable[[str], object]
) -> dict[str, Path]:
    """The network of each precision to measure."""
    files = {"f32": path}
    if precision == "bf16" or (precision == "auto" and has_bfloat16()):
        files["bf16"] = path
    if precision in ("auto", "int8"):
        progress("int8")
        try:
            files["int8"] = _quantized(path, images[::2])  # the others judge it
        except ModuleNotFoundError as error:
            if precision == "int8":
                msg = "int8 is made by NNCF, which is not installed: pip install 'patchcore-plugin[quantize]'"
                raise BundleError(msg) from error
            logger.warning("int8 was not tried: it needs pip install 'patchcore-plugin[quantize]'.")
    return files


def _measure(
    network: Network, bank: MemoryBank, images: Sequence[NDArray[np.uint8]], rule: ScoreRule
) -> tuple[float, NDArray[np.float32]]:
    """Median milliseconds of an image's embeddings, and all images' scores."""
    times, scores, embedder = [], [], network.embedder()
    for image in images:
        embedding = embedder.embed(image)  # the first of its size takes longer
        for _ in range(_REPETITIONS):
            started = time.perf_counter()
            embedder.embed(image)
            times.append(time.perf_counter() - started)
        scores.append(bank.score(embedding, rule).image)
    return 1000 * float(np.median(times)), np.concatenate(scores)


def _compared(
    precision: str, milliseconds: float, scores: NDArray[np.float32], reference: NDArray[np.float32]
) -> PrecisionTrial:
    correlation = _rank_correlation(scores, reference)
    error = float(np.mean(np.abs(scores - reference)) / max(float(np.mean(reference)), 1e-12))
    good = correlation >= CORRELATION and error <= ERROR
    return PrecisionTrial(precision=precision, milliseconds=milliseconds, correlation=correlation, error=error, good=good)


def _rank_correlation(scores: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Spearman's; 1 where there is nothing to rank."""
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (scores, reference)]
    return 1.0 if len(scores) < 2 else float(np.clip(np.corrcoef(*ranks)[0, 1], -1, 1))


def _quantized(path: Path, images: Sequence[NDArray[np.uint8]]) -> Path:
    """The network in int8, calibrated on ``images``, beside the f32 one; pre-processing stays as it is."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own set_log_level would change everybody's handlers
    network = nncf.quantize(
        ov.Core().read_model(path),
        nncf.Dataset([image[None] for image in images]),
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(
            # In int8, OpenVINO pads the pooling of neighbourhoods with something else than zero: borders would be far off.
            types=["AvgPool"],
            subgraphs=[nncf.Subgraph(inputs=[INPUT], outputs=[NORMALIZED])],
            validate=False,
        ),
    )
    file = path.with_name(f"int8_{path.name}")
    ov.save_model(network, file, compress_to_fp16=False)
    return file


def _settle(file: Path, path: Path, *, take: bool) -> None:
    """Move the int8 network to ``path``, or remove it."""
    for suffix in (".xml", ".bin"):
        if take:
            file.with_suffix(suffix).replace(path.with_suffix(suffix))
        else:
            file.with_suffix(suffix).unlink()
