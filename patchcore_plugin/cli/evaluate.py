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
def evaluate(config: Path, output: Path | None, only: tuple[str, ...]) -> None:
    """Compare models on data sets, over several seeds.

    CONFIG is a YAML file that names data sets, models and seeds; configs/evaluate.yaml is one to start from. Each
    combination is a job in a process of its own. Writes results.csv (a line per job), summary.csv and report.html, one
    file that needs no other, into the output folder. The tables hold names as patchcore predict writes them.

    Run it again after an interruption, however hard, or with other jobs in --only: finished ones are not repeated, unless
    their part of CONFIG has changed. A job that fails has its reason in the table, the others go on, and the command ends
    with exit code 1.
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
