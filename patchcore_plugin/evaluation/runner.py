"""Runs the jobs of an evaluation one after the other, each in a process of its own, and goes on where it was stopped."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from patchcore_plugin.evaluation.plan import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from patchcore_plugin.evaluation.plan import Job

_DEFINITION, _LOG, _ERROR = "json", "log", "error"  # endings of files beside the result's folder
NUMBERS, PREDICTIONS = "metrics.json", "predictions.csv"
"""Files of a result."""


@dataclass
class Result:
    """What is known of a job.

    Attributes:
        job: The job.
        folder: Where its result lies, or would.
        content: What the job wrote; None until it is done.
        error: Why it failed.
        predictions: Of every test image ``image``, ``kind``, ``label`` and ``score``, in their order.
    """

    job: Job
    folder: Path
    content: dict[str, Any] | None = None
    error: str | None = None
    predictions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics that this job has."""
        return {name: value for name, value in (self.content or {}).get("metrics", {}).items() if value is not None}

    @property
    def status(self) -> str:
        """``done``, ``failed`` or ``not run``."""
        return "done" if self.content else "failed" if self.error else "not run"


def select(jobs: Sequence[Job], patterns: Sequence[str]) -> list[Job]:
    """Jobs whose label, data set/model/seed, matches one of the patterns (``*`` and ``?``); all where there is none.

    Raises:
        PlanError: If a pattern matches no job.
    """
    for pattern in patterns:
        if not any(fnmatchcase(job.label, pattern) for job in jobs):
            listed = "\n".join(f"  {job.label}" for job in jobs)
            msg = f"--only {pattern!r} matches no job, where * stands for anything. The jobs:\n{listed}"
            raise PlanError(msg)
    return [job for job in jobs if not patterns or any(fnmatchcase(job.label, pattern) for pattern in patterns)]


def run_jobs(jobs: Iterable[Job], output: Path, done: Callable[[Result], None], start: Callable[[Job], None]) -> None:
    """Run the jobs that have no result yet.

    A job is done when its folder is there: it is written beside, and renamed. One that failed leaves its log, and is
    tried again the next time.

    Args:
        jobs: What to run.
        output: Folder of the evaluation.
        done: Told of every job that is done, or was before.
        start: Told of every job that begins.
    """
    for job in jobs:
        result = read_result(job, output)
        if not result.content:
            start(job)
            _run(job, output)
            result = read_result(job, output)
        if result.content:  # also where an evaluation was killed while its job was ending
            for ending in (_DEFINITION, _LOG):
                _beside(result.folder, ending).unlink(missing_ok=True)
        done(result)


def _run(job: Job, output: Path) -> None:
    folder = output / "jobs" / job.key
    folder.parent.mkdir(parents=True, exist_ok=True)
    definition, log, error = (_beside(folder, ending) for ending in (_DEFINITION, _LOG, _ERROR))
    error.unlink(missing_ok=True)
    definition.write_text(job.model_dump_json(indent=1), encoding="utf-8")
    command = [sys.executable, "-m", "patchcore_plugin.evaluation.job", definition, folder, output / "data"]
    with log.open("wb") as file:
        # Its standard input closes when this process ends, however that happens, and then so does the job.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait()
        finally:
            process.kill()
            process.wait()
    if process.returncode and not error.exists():
        error.write_text(f"its process ended with exit code {process.returncode}; {log} may say why", encoding="utf-8")


def read_result(job: Job, output: Path) -> Result:
    """Find out what is known of a job."""
    folder = output / "jobs" / job.key
    result = Result(job, folder)
    if not folder.is_dir():
        error = _beside(folder, _ERROR)
        result.error = error.read_text(encoding="utf-8") if error.is_file() else None
        return result
    result.content = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    with (folder / PREDICTIONS).open(newline="", encoding="utf-8") as file:
        result.predictions = [
            {**row, "label": int(row["label"]), "score": float(row["score"])} for row in csv.DictReader(file)
        ]
    return result


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f"{folder.name}.{ending}")
