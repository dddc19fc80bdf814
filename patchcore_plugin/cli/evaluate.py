"""``patchcore evaluate``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from patchcore_plugin.cli.common import as_cell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patchcore_plugin.evaluation.plan import Job
    from patchcore_plugin.evaluation.runner import Result
    from patchcore_plugin.evaluation.summary import Row

_PRINTED = (
    "image_auroc",
    "average_precision",
    "f1_max",
    "fpr_at_95_tpr",
    "pixel_auroc",
    "aupro",
    "fit_seconds",
    "latency_milliseconds",
)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--output", "-o", type=click.Path(path_type=Path, file_okay=False), help="Folder for results, instead of CONFIG's."
)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Run only the jobs DATA SET/MODEL/SEED that match, as in 'ELPV*/*/0'. May be given several times.",
)
@click.option(
    "--estimate", "estimate_only", is_flag=True, help="Only estimate how long the jobs will take, and how much memory."
)
def evaluate(config: Path, output: Path | None, only: tuple[str, ...], estimate_only: bool) -> None:
    """Compare models on data sets, over several seeds.

    CONFIG is a YAML file that names data sets, models and seeds; configs/evaluate.yaml is one to start from. Each
    combination is a job in a process of its own. Writes results.csv (a line per job), summary.csv and report.html, one
    file that needs no other, into the output folder. The tables hold names as patchcore predict writes them.

    Run it again after an interruption, however hard, or with other jobs in --only: finished ones are not repeated, unless
    their part of CONFIG has changed. A job that fails has its reason in the table, the others go on, and the command ends
    with exit code 1.

    First, the time and memory of the jobs that are left are estimated, for this machine and for a GPU. That takes seconds,
    and downloads nothing: backbones have random weights in it. Times may be wrong by a factor of two.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # the training stack's remarks about itself
    from patchcore_plugin.evaluation.plan import list_jobs, read_plan

    plan = read_plan(config)  # before the slow imports, so that a mistake in the file is reported at once
    from patchcore_plugin.evaluation.report import write_report
    from patchcore_plugin.evaluation.runner import read_result, select
    from patchcore_plugin.evaluation.summary import summarize, write_csv

    jobs, skipped = list_jobs(plan, config.parent)
    for name, reason in skipped.items():
        click.echo(f"Data set {name} is skipped: {reason}.")
    output = output or plan.output
    selected = select(jobs, only)
    left = [job for job in selected if not read_result(job, output).content]
    if left:
        _print_estimate(left)
    if estimate_only:
        click.echo(f"{len(selected) - len(left)} of {len(selected)} jobs are finished.")
        return
    _run(selected, output)
    results = [read_result(job, output) for job in jobs]
    with Console(stderr=True).status("Comparing, and writing the report"):
        rows = summarize(results)
        write_csv(results, rows, output)
        write_report(results, rows, skipped, output / "report.html")
    _print_table(rows)
    failed = [result for result in results if result.error]
    for result in failed:
        click.echo(f"Failed: {result.job.label}: {result.error}", err=True)
    missing = sum(result.status == "not run" for result in results)
    if missing:
        click.echo(f"{missing} of {len(jobs)} jobs have not been run yet.")
    click.echo(f"Tables: {output / 'results.csv'}, {output / 'summary.csv'}\nReport: {output / 'report.html'}")
    if any(result.job in selected for result in failed):
        sys.exit(1)


def _print_estimate(jobs: Sequence[Job]) -> None:
    """Print how long the jobs will take, and how much memory."""
    import psutil
    import torch

    from patchcore_plugin.evaluation.estimate import estimate

    with Console(stderr=True).status("Estimating time and memory"):
        found = estimate(jobs)
    if found.lines:
        table = Table("model", "jobs", "here", "GPU", "memory", box=box.MARKDOWN)
        for line in found.lines:
            times = _duration(line.seconds), _duration(line.gpu_seconds)
            table.add_row(as_cell(line.model), str(line.jobs), *times, f"{line.memory / 2**30:.1f} GiB")
        times = (_duration(sum(getattr(line, name) for line in found.lines)) for name in ("seconds", "gpu_seconds"))
        table.add_row("all", str(sum(line.jobs for line in found.lines)), *times, "")
        Console(width=max(160, Console().width)).print(table)
        cores, memory = torch.get_num_threads(), f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
        click.echo(
            f"An estimate, by measurements of a few seconds. Here: with {cores} threads on this processor, and {memory} of "
            "memory. GPU: a rough guess, for one of 10^13 operations and 300 GB a second. Memory: of the largest job."
        )
    for reason in dict.fromkeys(found.unknown.values()):
        labels = [label for label, own in found.unknown.items() if own == reason]
        click.echo(f"Not in the estimate: {len(labels)} jobs, the first of them {labels[0]}: {reason}.")


def _duration(seconds: float) -> str:
    """A time in hours and minutes, or in minutes where it is short."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def _run(jobs: Sequence[Job], output: Path) -> None:
    """Run the jobs with a bar, and a line for each that ends."""
    from patchcore_plugin.evaluation.runner import run_jobs

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("Evaluate", total=len(jobs))

        def start(job: Job) -> None:
            progress.update(task, description=escape(job.label))

        def done(result: Result) -> None:
            auroc = result.metrics.get("image_auroc")
            said = result.error or ("done" if auroc is None else f"image AUROC {auroc:.4f}")
            progress.console.print(escape(f"{result.job.label}: {said}"), soft_wrap=True, highlight=False)
            progress.advance(task)

        run_jobs(jobs, output, done, start)


def _print_table(rows: Sequence[Row]) -> None:
    """Print the summary, as Markdown."""
    from patchcore_plugin.evaluation.metrics import METRICS

    shown = [name for name in _PRINTED if any(name in row.means for row in rows)]
    table = Table("data set", "model", "seeds", *(METRICS[name].title for name in shown), box=box.MARKDOWN)
    table.add_column("AUROC difference")
    for row in rows:
        cells = []
        for name in shown:
            spread = f" ± {row.spreads[name]:{METRICS[name].format}}" if name in row.spreads else ""
            cells.append(f"{row.means[name]:{METRICS[name].format}}{spread}" if name in row.means else "")
        bounds = "" if row.interval is None else " ({:+.4f} to {:+.4f})".format(*row.interval)
        difference = "" if row.difference is None else f"{row.difference:+.4f}{bounds}"
        table.add_row(as_cell(row.dataset), as_cell(row.model), str(row.seeds), *cells, difference)
    Console(width=max(220, Console().width)).print(table)
