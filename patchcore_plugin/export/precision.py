"""The choice of the network's precision, by measurement on this machine."""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov

from patchcore_plugin import moving
from patchcore_plugin.bundle import BundleError, PrecisionTrial
from patchcore_plugin.cpu import has_bfloat16
from patchcore_plugin.export.network import save_network
from patchcore_plugin.progress import no_progress
from patchcore_plugin.runtime.network import INPUT, NORMALIZED, Network, NetworkFiles, network_inputs
from patchcore_plugin.side_effects import without_side_effects

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Literal

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Precision, Preprocessing
    from patchcore_plugin.memory_bank import EnsembleBank, MemoryBank
    from patchcore_plugin.progress import Progress
    from patchcore_plugin.scoring import ScoreRule

logger = logging.getLogger(__name__)

LEAST_RANK_CORRELATION = 0.99
"""Least rank correlation of image scores with those of f32, for a precision to be taken."""

LARGEST_MEAN_ERROR = 0.02
"""Largest mean relative error of image scores against f32, for a precision to be taken."""

_REPETITIONS = 5
_QUANTIZATION_INPUTS_LIMIT = 300  # tiles, or images: as many as NNCF takes by itself


def choose_precision(
    path: Path,
    recipe: Preprocessing,
    precision: Precision | Literal["auto"],
    bank: MemoryBank | EnsembleBank,
    images: Sequence[NDArray[np.uint8]],
    rule: ScoreRule,
    progress: Progress = no_progress,
) -> tuple[Precision, list[PrecisionTrial]]:
    """Choose the fastest precision whose image scores are near those of f32, and leave its network at ``path``.

    Args:
        path: The f32 network. Where int8 is chosen, it is replaced.
        recipe: The pre-processing in it.
        precision: ``"auto"``, or the only one to consider besides f32.
        bank: The memory bank.
        images: Normal images (H, W, 3), u8, RGB, that are not in the bank.
        rule: How the model scores images.
        progress: Called as each step begins.

    Returns:
        The precision, and what was measured: nothing, where only f32 was asked for.

    Raises:
        BundleError: As of :func:`check_precision`, or if the network cannot be used in the precision asked for.
    """
    check_precision(precision, len(images))
    if precision == "f32":
        return "f32", []
    files = _candidates(path, recipe, precision, images, progress)
    trials = _measure(files, recipe, precision, bank, images[1::2] or images, rule, progress)
    if precision == "auto":
        chosen = min((trial for trial in trials if trial.good), key=lambda trial: trial.milliseconds).precision
    else:
        chosen = precision
        if not trials[-1].good:
            logger.warning("Image scores in %s are not near those of f32: see the table.", chosen)
    if "int8" in files:
        _replace_or_delete(path, files["int8"], replace=chosen == "int8")
    return chosen, trials


def check_precision(precision: Precision | Literal["auto"], images: int) -> None:
    """Refuse a precision that cannot be had, before the work of an export.

    Args:
        precision: What is asked for.
        images: Number of normal images to measure on.

    Raises:
        BundleError: If there are no images to measure or to calibrate on, or int8 is asked for and NNCF is not installed.
    """
    if precision != "f32" and not images:
        msg = f"precision {precision!r} is measured on normal images, and the checkpoint keeps none. Give some (--images)."
        raise BundleError(msg)
    if precision == "int8" and find_spec("nncf") is None:
        msg = "int8 is made by NNCF, which is not installed: pip install 'patchcore-plugin[quantize]'"
        raise BundleError(msg)


def _candidates(
    path: Path,
    recipe: Preprocessing,
    precision: Precision | Literal["auto"],
    images: Sequence[NDArray[np.uint8]],
    progress: Progress,
) -> dict[Precision, Path]:
    """The network file of each precision to measure, f32 first."""
    files: dict[Precision, Path] = {"f32": path}
    if precision == "bf16" or (precision == "auto" and has_bfloat16()):
        files["bf16"] = path
    if precision in ("auto", "int8"):
        if find_spec("nncf") is None:
            logger.warning("int8 was not tried: it needs pip install 'patchcore-plugin[quantize]'.")
        else:
            progress("quantize to int8", 0, 1)
            files["int8"] = _quantized(path, recipe, images[::2])  # the other images measure it
    return files


def _measure(
    files: dict[Precision, Path],
    recipe: Preprocessing,
    asked: Precision | Literal["auto"],
    bank: MemoryBank | EnsembleBank,
    images: Sequence[NDArray[np.uint8]],
    rule: ScoreRule,
    progress: Progress,
) -> list[PrecisionTrial]:
    """A trial of each precision that can be used, f32 first."""
    trials, reference = [], None
    for precision, file in files.items():
        progress(f"precision {precision}", 0, 1)
        try:
            milliseconds, scores = _run(Network(NetworkFiles.read(file), precision, recipe=recipe), bank, images, rule)
        except (RuntimeError, ValueError) as error:  # OpenVINO cannot compile it, or it gives NaN
            if precision in (asked, "f32"):
                msg = f"The network cannot be used in {precision}: {error}"
                raise BundleError(msg) from error
            logger.warning("The network cannot be used in %s: %s", precision, error)
            continue
        reference = scores if reference is None else reference
        trials.append(_trial(precision, milliseconds, scores, reference))
    return trials


def _run(
    network: Network, bank: MemoryBank | EnsembleBank, images: Sequence[NDArray[np.uint8]], rule: ScoreRule
) -> tuple[float, NDArray[np.float32]]:
    """Median milliseconds for the embeddings of an image, and all images' scores."""
    times, scores, embedder = [], [], network.embedder()
    for image in images:
        embedding = embedder.embed(image)  # the first image of a size takes longer
        for _ in range(_REPETITIONS):
            started = time.perf_counter()
            embedder.embed(image)
            times.append(time.perf_counter() - started)
        scores.append(bank.score(embedding, rule).image)
    return 1000 * float(np.median(times)), np.concatenate(scores)


def _trial(
    precision: Precision, milliseconds: float, scores: NDArray[np.float32], reference: NDArray[np.float32]
) -> PrecisionTrial:
    correlation = _rank_correlation(scores, reference)
    error = float(np.mean(np.abs(scores - reference)) / max(float(np.mean(reference)), 1e-12))
    good = correlation >= LEAST_RANK_CORRELATION and error <= LARGEST_MEAN_ERROR
    return PrecisionTrial(precision=precision, milliseconds=milliseconds, correlation=correlation, error=error, good=good)


def _rank_correlation(scores: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Spearman's rank correlation; 1 where there is nothing to rank."""
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (scores, reference)]
    return 1.0 if len(scores) < 2 else float(np.clip(np.corrcoef(*ranks)[0, 1], -1, 1))


def _quantized(path: Path, recipe: Preprocessing, images: Sequence[NDArray[np.uint8]]) -> Path:
    """Write the network in int8, calibrated on the images, beside the f32 one. Pre-processing stays as it is."""
    import nncf

    inputs = [values for image in images for values in network_inputs(image, recipe)]
    inputs = inputs[:: -(-len(inputs) // _QUANTIZATION_INPUTS_LIMIT)]
    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own set_log_level would change everybody's handlers
    with without_side_effects():
        network = nncf.quantize(
            # of a path, OpenVINO maps the weights, and Windows replaces no file that is mapped
            ov.Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes()),
            nncf.Dataset(inputs),
            subset_size=len(inputs),
            ignored_scope=nncf.IgnoredScope(
                # OpenVINO's int8 pooling of neighborhoods does not pad with zeros, which spoils the patches at the border.
                types=["AvgPool"],
                subgraphs=[nncf.Subgraph(inputs=[INPUT], outputs=[NORMALIZED])],
                validate=False,
            ),
        )
    file = path.with_name(f"int8_{path.name}")
    save_network(network, file)
    return file


def _replace_or_delete(path: Path, candidate: Path, *, replace: bool) -> None:
    """Put the candidate's network in place of the one at ``path``, or delete it."""
    for suffix in (".xml", ".bin"):
        if replace:
            moving.replace(candidate.with_suffix(suffix), path.with_suffix(suffix))
        else:
            candidate.with_suffix(suffix).unlink()
