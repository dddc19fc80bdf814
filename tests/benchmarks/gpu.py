"""Our coreset sampler against anomalib's on a GPU, a training end to end, and several GPUs. It takes at most ten minutes.

    python tests/benchmarks/gpu.py                 # 1 % and 10 % of random patches that resemble embeddings
    python tests/benchmarks/gpu.py --images 411    # as many patches as of so many images (1,024 each)

First it checks that the picks are right: on a small set, those of a search in float64 on the CPU. Without a GPU it says so,
and measures nothing. Where a figure of anomalib's would take longer than is left, a share of its picks is timed, and the
whole is estimated from it, with a ~ before it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import LAYERS, clustered, heading
from helpers.training import folder_datamodule
from rich.console import Console
from rich.table import Table

from patchcore_plugin import FaissPatchcore
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.elpv import lay_out

COLUMNS = 152
ANOMALIB_SECONDS = 60.0  # that its sampler is timed for, at most, for each ratio
TRAIN = """
import sys, tempfile, time
sys.path[:0] = {paths!r}
import torch
from helpers.training import folder_datamodule
from patchcore_plugin import FaissPatchcore
from anomalib.engine import Engine

if __name__ == "__main__":
    model = FaissPatchcore(backbone="efficientnet_lite0", layers={layers!r}, coreset_sampling_ratio=0.01, visualizer=False)
    engine = Engine(default_root_dir=tempfile.mkdtemp(), accelerator="gpu", devices=2, strategy="ddp", logger=False)
    started = time.perf_counter()
    engine.fit(model, datamodule=folder_datamodule({data!r}, train_batch_size=16, eval_batch_size=16))
    if engine.trainer.is_global_zero:
        torch.save(model.model.memory_bank.cpu(), {output!r})
        print(f"fit on two GPUs: {{time.perf_counter() - started:.1f}} s")
"""


def check(device: torch.device) -> None:
    """Compare the picks on the device with those of a search in float64.

    Raises:
        click.ClickException: If they differ.
    """
    rows = clustered(4096, COLUMNS)
    found = np.asarray(torch.as_tensor(GreedyCoreset(size=200, progress=False).fit(rows.to(device))).cpu())
    exact, picks = rows.double(), [int(found[0])]
    nearest = (exact - exact[picks[0]]).square().sum(1)
    while len(picks) < len(found):
        picks.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (exact - exact[picks[-1]]).square().sum(1))
    if picks != found.tolist():
        wrong = int(np.flatnonzero(np.array(picks) != found)[0])
        msg = f"The picks on {device} are wrong from number {wrong} on: {found[wrong]} instead of {picks[wrong]}."
        raise click.ClickException(msg)
    click.echo(f"The 200 picks among 4,096 rows on {device} are those of a search in float64.")


def time_ours(rows: torch.Tensor, ratio: float) -> float:
    """Seconds of our sampler."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    GreedyCoreset(ratio=ratio, progress=False).fit(rows)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def time_anomalib(rows: torch.Tensor, ratio: float) -> tuple[float, bool]:
    """Seconds of anomalib's sampler, and whether they are estimated from a share of its picks."""
    from anomalib.models.components import KCenterGreedy

    def run(part: float) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        KCenterGreedy(embedding=rows, sampling_ratio=part).select_coreset_idxs()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    few, some = 100 / len(rows), 1100 / len(rows)
    fixed = run(few)
    each = (run(some) - fixed) / 1000
    whole = fixed + each * (ratio * len(rows) - 100)
    return (run(ratio), False) if whole < ANOMALIB_SECONDS else (whole, True)


def time_training(data: Path) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds of fit and test on one GPU, and AUROC; and the memory bank."""
    from anomalib.engine import Engine

    model = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS, coreset_sampling_ratio=0.01, visualizer=False)
    datamodule = folder_datamodule(data, train_batch_size=16, eval_batch_size=16)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, accelerator="gpu", devices=1, logger=False)
        started = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        fitted = time.perf_counter()
        metrics = engine.test(model, datamodule=datamodule)[0]
        tested = time.perf_counter()
    found = {"fit": fitted - started, "test": tested - fitted, "AUROC": float(metrics["image_AUROC"])}
    return found, model.model.memory_bank.cpu()


def run_two(data: Path, folder: Path, expected: torch.Tensor) -> None:
    """Fit on two GPUs by NCCL, and compare the memory bank with that of one."""
    script, output = folder / "two.py", folder / "bank.pt"
    values: dict[str, Any] = {"paths": [p for p in sys.path if p], "layers": LAYERS, "data": str(data)}
    script.write_text(TRAIN.format(**values, output=str(output)), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=180)
    if done.returncode:
        raise click.ClickException(f"Two GPUs failed: {done.stderr[-2000:]}")
    bank = torch.load(output, weights_only=True)
    farthest = float(torch.cdist(bank, expected).amin(1).max())
    click.echo(f"{done.stdout.strip().splitlines()[-1]}; {len(bank)} vectors, each within {farthest:.2g} of the bank of one")


@click.command()
@click.option("--images", default=411, show_default=True, help="Images whose patches are picked from, 1,024 each.")
def main(images: int) -> None:
    """Print the times of both samplers at 1 % and 10 %, of a training on one GPU, and of one on two where there are two."""
    if not torch.cuda.is_available():
        raise click.ClickException("There is no GPU that torch can use here; nothing was measured.")
    device = torch.device("cuda")
    click.echo(f"{heading()}; {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    check(device)
    rows = clustered(images * 1024, COLUMNS).to(device)
    time_ours(rows[:10_000], 0.01)  # libraries load
    table = Table(f"{len(rows):,} rows of {COLUMNS} values", "ours s", "anomalib s", "ratio", "peak memory MiB")
    for ratio in (0.01, 0.1):
        torch.cuda.reset_peak_memory_stats()
        ours = time_ours(rows, ratio)
        peak = torch.cuda.max_memory_allocated() / 2**20
        theirs, estimated = time_anomalib(rows, ratio)
        sign = "~" * estimated
        table.add_row(f"{ratio:.0%}", f"{ours:.2f}", f"{sign}{theirs:.1f}", f"{sign}{theirs / ours:.1f}", f"{peak:.0f}")
    Console(width=125).print(table)
    del rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder / "elpv")
        found, bank = time_training(folder / "elpv")
        click.echo(f"ELPV mono, one GPU: fit {found['fit']:.1f} s, test {found['test']:.1f} s, AUROC {found['AUROC']:.4f}")
        if torch.cuda.device_count() > 1:
            run_two(folder / "elpv", folder, bank)


if __name__ == "__main__":
    main()
