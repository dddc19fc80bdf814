"""Runs the jobs of an evaluation one after another, each in its own process; finished jobs are not repeated."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from patchcore_plugin.bundle import lock_folder
from patchcore_plugin.evaluation.plan import PlanError
from patchcore_plugin.names import from_cell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from patchcore_plugin.evaluation.plan import Job

_DEFINITION, _LOG, _ERROR = "json", "log", "error"  # suffixes of the files next to a result's folder
METRICS_FILE, PREDICTIONS_FILE = "metrics.json", "predictions.csv"
"""Files in a result's folder."""


@dataclass
class Result:
    """State and result of a job.

    Attributes:
        job: The job.
        folder: Folder of the result; it exists once the job is done.
        content: Content of metrics.json; None until the job is done.
        error: Reason why the job failed; None if it did not.
        predictions: ``image``, ``kind``, ``label`` and ``score`` of every test image, in order.
    """

    job: Job
    folder: Path
    content: dict[str, Any] | None = None
    error: str | None = None
    predictions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics that the job has a value for."""
        return {name: value for name, value in (self.content or {}).get("metrics", {}).items() if value is not None}

    @property
    def status(self) -> str:
        """``done``, ``failed`` or ``not run``."""
        return "done" if self.content else "failed" if self.error else "not run"


def select(jobs: Sequence[Job], patterns: Sequence[str]) -> list[Job]:
    """Select the jobs whose label matches one of the patterns; without patterns, all jobs.

    Args:
        jobs: All jobs of the plan.
        patterns: Patterns of labels ``DATA SET/MODEL/SEED``; ``*`` and ``?`` stand for any text and any character.

    Raises:
        PlanError: If a pattern matches no job.
    """
    for pattern in patterns:
        if not any(fnmatchcase(job.label, pattern) for job in jobs):
            listed = "\n".join(f"  {job.label}" for job in jobs)
            msg = f"--only {pattern!r} matches no job (* stands for any text). The jobs:\n{listed}"
            raise PlanError(msg)
    return [job for job in jobs if not patterns or any(fnmatchcase(job.label, pattern) for pattern in patterns)]


def run_jobs(jobs: Iterable[Job], output: Path, done: Callable[[Result], None], start: Callable[[Job], None]) -> None:
    """Run the jobs that have no result yet.

    A job is done when its folder exists: the job writes a folder under another name, and renames it at the end. A job
    that fails leaves its log, and is tried again the next time. Of jobs that were killed, what they had written is removed.

    Args:
        jobs: Jobs to run.
        output: Folder of the evaluation.
        done: Called with the result of every job that has ended, now or earlier.
        start: Called with every job that begins.

    Raises:
        PlanError: If another evaluation is at work in the folder.
    """
    with _locked(output / "jobs"):
        _run_all(jobs, output, done, start)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other evaluations out of a folder of jobs, where the system can lock one."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_folder(folder, wait=False)
    except BlockingIOError as error:
        msg = f"Another evaluation is at work in {folder.parent}. Wait for its end, or choose another folder (--output)."
        raise PlanError(msg) from error
    try:
        if lock is not None:
            for partial in folder.glob(".*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _run_all(jobs: Iterable[Job], output: Path, done: Callable[[Result], None], start: Callable[[Job], None]) -> None:
    for job in jobs:
        result = read_result(job, output)
        if not result.content:
            start(job)
            _run(job, output)
            result = read_result(job, output)
        if result.content:  # these files also stay behind if an evaluation is killed while its job ends
            for suffix in (_DEFINITION, _LOG):
                _beside(result.folder, suffix).unlink(missing_ok=True)
        done(result)


def _run(job: Job, output: Path) -> None:
    folder = output / "jobs" / job.key
    definition, log, error = (_beside(folder, suffix) for suffix in (_DEFINITION, _LOG, _ERROR))
    error.unlink(missing_ok=True)
    definition.write_text(json.dumps(job.model_dump(), indent=1), encoding="utf-8")
    command = [sys.executable, "-m", "patchcore_plugin.evaluation.job", definition, folder, output / "data"]
    with log.open("wb") as file:
        # The job ends when its standard input closes, which happens whenever this process ends, even if it is killed.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUTF8": "1"},  # on Windows, the packages that train could not print every name
        )
        try:
            process.wait()
        finally:
            process.kill()
            process.wait()
    if process.returncode and not error.exists():
        error.write_text(f"the process of the job ended with exit code {process.returncode}; see {log}", encoding="utf-8")


def read_result(job: Job, output: Path) -> Result:
    """Read the state and the result of a job."""
    folder = output / "jobs" / job.key
    result = Result(job, folder)
    if not folder.is_dir():
        error = _beside(folder, _ERROR)
        result.error = error.read_text(encoding="utf-8") if error.is_file() else None
        return result
    result.content = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    with (folder / PREDICTIONS_FILE).open(newline="", encoding="utf-8") as file:
        result.predictions = [
            {
                "image": from_cell(row["image"]),
                "kind": from_cell(row["kind"]),
                "label": int(row["label"]),
                "score": float(row["score"]),
            }
            for row in csv.DictReader(file)
        ]
    return result


def _beside(folder: Path, suffix: str) -> Path:
    """Path of a file next to a result's folder."""
    return folder.with_name(f"{folder.name}.{suffix}")
