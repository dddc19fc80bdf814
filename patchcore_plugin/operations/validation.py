"""Whether a bundle is fit for use on this machine."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from patchcore_plugin.bundle import BundleError, read_manifest_and_version, verify
from patchcore_plugin.errors import PatchcoreError
from patchcore_plugin.progress import no_progress
from patchcore_plugin.runtime import PatchcoreRuntime, self_test
from patchcore_plugin.runtime.device import CPU, check_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from patchcore_plugin.bundle import Manifest
    from patchcore_plugin.cpu import Mode
    from patchcore_plugin.progress import Progress
    from patchcore_plugin.runtime.prediction import Outcome

_LATENCY_RUNS = 30


@dataclass(frozen=True)
class Check:
    """One check of a bundle.

    Attributes:
        name: ``"manifest"``, ``"files"``, ``"network and bank"``, ``"self-test"``, ``"latency"`` or ``"images"``.
        result: ``"skipped"`` where an earlier check failed, or where the bundle has nothing to check.
        detail: What was found, in a sentence.
    """

    name: str
    result: Literal["ok", "failed", "skipped"]
    detail: str


@dataclass(frozen=True)
class ValidationReport:
    """What a validation found.

    Attributes:
        checks: The checks, in order.
        version: The bundle's version; None without a readable manifest.
        deviations: Relative difference of each self-test score from the manifest's; None without a self-test.
        tolerance: Largest deviation that is accepted; see :data:`patchcore_plugin.runtime.self_test.TOLERANCE`.
        milliseconds: Median and 95th percentile of the time for one image: pre-processing, network and search.
        images: For each sample image its score, threshold and verdict, or the error that it cannot be read by.
    """

    checks: list[Check]
    version: str | None
    deviations: list[float] | None
    tolerance: float | None
    milliseconds: dict[str, float] | None
    images: list[dict[str, str | float | None]]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(check.result != "failed" for check in self.checks)


def validate_bundle(
    path: str | Path, images: Sequence[str | Path] = (), progress: Progress = no_progress, device: str = CPU
) -> ValidationReport:
    """Check a bundle from its manifest to its answers.

    Args:
        path: The bundle's folder.
        images: Sample images to give a verdict on.
        progress: Called as each check begins.
        device: Device that computes the network.

    Returns:
        The report. A damaged bundle raises nothing: the report says what is wrong with it.

    Raises:
        UsageError: If there is no such device.
    """
    check_device(device)
    checks: list[Check] = []

    def run(name: str, check: Callable[..., _Finding], *needed: Any) -> Any:
        """Run a check on what earlier checks found, and return what it found."""
        progress(name, 0, 1)
        finding = _find(check, *needed)
        checks.append(Check(name, finding.result, finding.detail))
        return finding.value

    path = Path(path)
    manifest, version = run("manifest", _check_manifest, path) or (None, None)
    intact = run("files", _check_files, path, manifest)
    runtime = run("network and bank", _check_loading, path, version, intact, device)
    deviations = run("self-test", _check_self_test, runtime)
    milliseconds = run("latency", _check_latency, runtime)
    rows = run("images", _check_images, runtime, images)
    return ValidationReport(
        checks=checks,
        version=version,
        deviations=deviations,
        tolerance=deviations and self_test.TOLERANCE[manifest.precision],
        milliseconds=milliseconds,
        images=rows or [],
    )


class _Finding(NamedTuple):
    """What a check found: a sentence, its result, and a value that later checks and the report need; None without one."""

    detail: str
    value: Any = None
    result: Literal["ok", "failed", "skipped"] = "ok"


def _find(check: Callable[..., _Finding], *needed: Any) -> _Finding:
    if any(value is None for value in needed):
        return _Finding("a check before it failed", result="skipped")
    try:
        return check(*needed)
    except (PatchcoreError, OSError, RuntimeError) as error:  # the last are OpenVINO's and FAISS's
        return _Finding(str(error), result="failed")


def _check_manifest(path: Path) -> _Finding:
    manifest, version = read_manifest_and_version(path)
    return _Finding(f"{manifest.name}, version {version}, format {manifest.format_version}", (manifest, version))


def _check_files(path: Path, manifest: Manifest) -> _Finding:
    verify(path, manifest)
    size = manifest.total_bytes / 2**20
    return _Finding(f"{len(manifest.files)} files, {size:.1f} MiB, match their checksums", manifest)


def _check_loading(path: Path, version: str, manifest: Manifest, device: str) -> _Finding:
    runtime = _load(path, version, device)
    shape = " and ".join(f"{member.bank_size:,} x {member.embedding_dimension}" for member in manifest.all_members)
    return _Finding(f"network in {_arithmetic(runtime)} on {runtime.device}, bank of {shape}", runtime)


def _load(path: Path, version: str, device: str, mode: Mode = "latency") -> PatchcoreRuntime:
    # a compiled network that is kept beside the bundle is no part of it
    runtime = PatchcoreRuntime.load(path, mode, cache=False, device=device)
    if runtime.version != version:
        msg = f"{path} was replaced by version {runtime.version} meanwhile; validate it again."
        raise BundleError(msg)
    return runtime


def _arithmetic(runtime: PatchcoreRuntime) -> str:
    wanted, taken = runtime.manifest.precision, runtime.arithmetic
    return wanted if taken == wanted else f"{wanted} (computed in {taken}, as {runtime.device} has no {wanted})"


def _check_self_test(runtime: PatchcoreRuntime) -> _Finding:
    deviations = self_test.deviations(runtime.manifest, runtime.self_test_scores())
    if deviations is None:
        detail = "an older version wrote the bundle, without a self-test; export the model again to have one"
        return _Finding(detail, result="skipped")
    tolerance = self_test.TOLERANCE[runtime.manifest.precision]
    detail = f"{len(deviations)} scores, off by {max(deviations):.1e} at most (tolerance {tolerance:g})"
    if max(deviations) <= tolerance:
        return _Finding(detail, deviations)
    return _Finding(f"{detail}: this machine computes other scores than the one that wrote it", deviations, "failed")


def _check_latency(runtime: PatchcoreRuntime) -> _Finding:
    picture, times = self_test.pictures(runtime.intensity_range)[:1], []
    for _ in range(_LATENCY_RUNS):
        started = time.perf_counter()
        runtime.predict(picture)
        times.append(1000 * (time.perf_counter() - started))
    median, high = (round(float(value), 3) for value in np.percentile(times, [50, 95]))
    runs = f"{runtime.threads} threads, {_LATENCY_RUNS} runs"
    detail = f"{median:.1f} ms for one image, 95 % below {high:.1f} ms ({runs})"
    return _Finding(detail, {"median": median, "95 % below": high})


def _check_images(runtime: PatchcoreRuntime, images: Sequence[str | Path]) -> _Finding:
    if not images:
        return _Finding("none given", result="skipped")
    many = _load(runtime.path, runtime.version, runtime.device, "throughput")
    outcomes = zip(images, many.stream_outcomes(images), strict=True)
    rows = [{"image": str(image), **_row(outcome)} for image, outcome in outcomes]
    unreadable = sum("error" in row for row in rows)
    verdicts = Counter(row.get("verdict") for row in rows)
    review = "" if runtime.manifest.image.review is None else f", {verdicts['review']} to review"
    detail = f"{len(rows)} images: {verdicts['anomalous']} anomalous{review}, {unreadable} unreadable"
    return _Finding(detail, rows, "failed" if unreadable else "ok")


def _row(outcome: Outcome) -> dict[str, str | float | None]:
    if outcome.error is not None:
        return {"error": str(outcome.error)}
    prediction = outcome.prediction
    return {"score": prediction.score, "threshold": prediction.threshold, "verdict": prediction.verdict}
