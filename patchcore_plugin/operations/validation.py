"""Whether a bundle is fit for use on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from patchcore_plugin.bundle import BundleError, read_manifest, verify, version_of
from patchcore_plugin.images import ImageError
from patchcore_plugin.runtime import PatchcoreRuntime, self_test

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from patchcore_plugin.bundle import Manifest

_RUNS = 30  # of one image, for its latency


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: ``"manifest"``, ``"files"``, ``"network and bank"``, ``"self-test"``, ``"latency"`` or ``"images"``.
        result: ``"skipped"`` where an earlier check failed, or where the bundle has nothing to check.
        detail: What was found, in a sentence.
    """

    name: str
    result: Literal["ok", "failed", "skipped"]
    detail: str


@dataclass
class Report:
    """What a validation found.

    Attributes:
        checks: In order.
        version: The bundle's version; None without a readable manifest.
        deviations: Relative difference of each self-test score from the manifest's; None without a self-test.
        tolerance: Greatest that is accepted; see :data:`patchcore_plugin.runtime.self_test.TOLERANCE`.
        milliseconds: Median and 95th percentile of the time for one image, pre-processing, network and search.
        images: For each sample image its score, threshold and verdict, or the error that it cannot be read by.
    """

    checks: list[Check] = field(default_factory=list)
    version: str | None = None
    deviations: list[float] | None = None
    tolerance: float | None = None
    milliseconds: dict[str, float] | None = None
    images: list[dict[str, str | float | None]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(check.result != "failed" for check in self.checks)


def validate_bundle(path: Path, images: Sequence[Path] = (), progress: Callable[[str], object] = lambda _: None) -> Report:
    """Check a bundle from its manifest to its answers.

    Args:
        path: The bundle's folder.
        images: Sample images to give a verdict on.
        progress: Called with the name of the next check.

    Returns:
        The report. Nothing is raised for a damaged bundle: that is what it says.
    """
    validation = _Validation(path, images)
    report = validation.report
    for name, step in {
        "manifest": validation.read,
        "files": validation.compare,
        "network and bank": validation.load,
        "self-test": validation.reproduce,
        "latency": validation.measure,
        "images": validation.judge,
    }.items():
        if not report.ok and not hasattr(validation, "runtime"):
            report.checks.append(Check(name, "skipped", "a check before it failed"))
            continue
        progress(name)
        try:
            report.checks.append(Check(name, "ok", step()))
        except _Skipped as reason:
            report.checks.append(Check(name, "skipped", str(reason)))
        except (ValueError, RuntimeError, OSError) as error:
            report.checks.append(Check(name, "failed", str(error)))
    return report


class _Skipped(Exception):  # noqa: N818 - it is no error
    """There is nothing to check; the message says why."""


class _Validation:
    """The checks. Each returns what it found, or raises."""

    manifest: Manifest
    runtime: PatchcoreRuntime  # once it is loaded

    def __init__(self, path: Path, images: Sequence[Path]) -> None:
        self.path, self.images, self.report = path, images, Report()

    def read(self) -> str:
        self.manifest = read_manifest(self.path)
        self.report.version = version_of(self.path)
        return f"{self.manifest.name}, version {self.report.version}, format {self.manifest.format_version}"

    def compare(self) -> str:
        verify(self.path, self.manifest)
        return f"{len(self.manifest.files)} files, {self.manifest.total_bytes / 2**20:.1f} MiB, match their checksums"

    def load(self) -> str:
        self.runtime = PatchcoreRuntime.load(self.path, cache=False)
        shape = f"{self.manifest.bank_size:,} x {self.manifest.embedding_dimension}"
        return f"network in {self.manifest.precision}, bank of {shape}"

    def reproduce(self) -> str:
        found = self.report.deviations = self_test.deviations(self.runtime)
        if found is None:
            msg = "an older version wrote the bundle, without a self-test; export the model again to have one"
            raise _Skipped(msg)
        tolerance = self.report.tolerance = self_test.TOLERANCE[self.manifest.precision]
        said = f"{len(found)} scores, off by {max(found):.1e} at most (tolerance {tolerance:g})"
        if not max(found) <= tolerance:
            msg = f"{said}: this machine does not compute what the one that wrote the bundle did"
            raise BundleError(msg)
        return said

    def measure(self) -> str:
        picture, times = self_test.pictures()[:1], []
        for _ in range(_RUNS):
            started = time.perf_counter()
            self.runtime.predict(picture)
            times.append(1000 * (time.perf_counter() - started))
        median, high = (round(float(value), 3) for value in np.percentile(times, [50, 95]))
        self.report.milliseconds = {"median": median, "95 % below": high}
        return f"{median:.1f} ms for one image, 95 % below {high:.1f} ms ({self.runtime.threads} threads, {_RUNS} runs)"

    def judge(self) -> str:
        if not self.images:
            msg = "none given"
            raise _Skipped(msg)
        rows = self.report.images
        for image in self.images:
            try:
                (answer,) = self.runtime.predict([image])
            except (ImageError, OSError) as error:
                rows.append({"image": str(image), "error": str(error)})
            else:
                about = {"score": answer.score, "threshold": answer.threshold, "verdict": answer.verdict}
                rows.append({"image": str(image), **about})
        unreadable = sum("error" in row for row in rows)
        anomalous = sum(row.get("verdict") == "anomalous" for row in rows)
        said = f"{len(rows)} images: {anomalous} anomalous, {unreadable} unreadable"
        if unreadable:
            raise ValueError(said)
        return said
