"""Peak memory of a training, ours and anomalib's; and trainings within a tenth of their memory. Linux only.

    python tests/benchmarks/coreset_memory.py

Each line of the first table comes from its own process, which collects embeddings in batches as training does, and picks
the bank. The line shows the peak resident memory minus the memory before the first batch. anomalib's sampler picks 30 rows
only: further steps take long, and add no memory. The second part trains and tests through anomalib's Engine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from common import LAYERS, elpv_embeddings, heading

from patchcore_plugin import FaissPatchcore
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.coreset.embedding_store import EmbeddingStore
from patchcore_plugin.elpv import lay_out

MIB = 2**20
COLUMNS = 152
BATCH = 4 * 1024  # rows of 4 images


def batches(path: str, rows: int) -> Iterator[torch.Tensor]:
    """Read the first rows of a file of float32 values."""
    with Path(path).open("rb") as file:
        for start in range(0, rows, BATCH):
            count = min(BATCH, rows - start) * COLUMNS
            yield torch.from_numpy(np.fromfile(file, np.float32, count).reshape(-1, COLUMNS))


def peak() -> int:
    """Highest resident memory of this process, in bytes."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def ours(path: str, rows: int, size: int, dtype: str, budget: float | None = None) -> torch.Tensor:
    store = EmbeddingStore(GreedyCoreset(size=size), dtype=getattr(torch, dtype), expected_rows=rows, budget=budget)
    for batch in batches(path, rows):
        store.append(batch)
    return store.reduce_to_bank()


def anomalib(path: str, rows: int, size: int, dtype: str) -> torch.Tensor:
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    del dtype  # anomalib collects embeddings in float32 only
    model = PatchcoreModel(layers=["layer1"], backbone="resnet18", pre_trained=False)
    for batch in batches(path, rows):
        model.embedding_store.append(batch)
    model.subsample_embedding(size / rows)
    return model.memory_bank


def fit(name: str, path: str, rows: int, size: int, *options: object) -> None:
    """Print by how many bytes a fit raises this process's memory, and the size of its bank in bytes."""
    pick = {"ours": ours, "anomalib": anomalib}[name]
    pick(path, 4096, 40, options[0])  # the libraries load their kernels before the measurement
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present memory
    before = peak()
    bank = pick(path, rows, size, *options)
    print("RESULT", json.dumps({"peak": peak() - before, "bank": bank.nbytes}))


def train(root: str, budget: float | None, bank: str) -> None:
    """Train and test, save the bank, and print radius and AUROC."""
    import anomalib.data
    from anomalib.engine import Engine

    model = FaissPatchcore(
        backbone="efficientnet_lite0",
        layers=LAYERS,
        normalization="imagenet",
        coreset_sampling_ratio=0.01,
        memory_budget=budget,
        visualizer=False,
    )
    data = anomalib.data.Folder(
        name="cells", root=root, normal_dir="train/good", normal_test_dir="test/good", abnormal_dir="test/defective",
        num_workers=0, train_batch_size=16, eval_batch_size=16, val_split_mode="same_as_test",
    )  # fmt: skip
    engine = Engine(default_root_dir=f"{root}/results", accelerator="cpu", devices=1, logger=False)
    engine.fit(model, datamodule=data)
    auroc = engine.test(model, datamodule=data)[0]["image_AUROC"]
    torch.save(model.model.memory_bank, bank)
    print("RESULT", json.dumps({"auroc": auroc, "radius": float(model.model.covering_radius)}))


def in_own_process(*arguments: object) -> dict:
    """Run :func:`fit` or :func:`train` in a new process, and return what it prints."""
    command = [sys.executable, __file__, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise click.ClickException(done.stderr[-2000:])
    return json.loads(lines[0].removeprefix("RESULT"))


def covering_radius(points: torch.Tensor, bank: torch.Tensor) -> float:
    return max(float(torch.cdist(part, bank).amin(1).max()) for part in points.split(4096))


@click.command()
@click.option(
    "--images",
    "sizes",
    multiple=True,
    type=int,
    default=[411, 1000, 2000],
    show_default=True,
    help="Cells; may be repeated.",
)
def main(sizes: tuple[int, ...]) -> None:
    """Print peak memory at several sizes, then compare a training within a tenth of its memory with the exact one."""
    click.echo(heading("lightning"))
    fits = {
        "ours, 1 %": ("ours", 0.01, "float32"),
        "ours, 10 %": ("ours", 0.1, "float32"),
        "ours, 1 %, float16": ("ours", 0.01, "float16"),
        "ours, 10 %, float16": ("ours", 0.1, "float16"),
        "anomalib": ("anomalib", None, "float32"),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        points = elpv_embeddings(max(sizes))
        file = str(folder / "rows")
        points.numpy().tofile(file)
        click.echo(f"\n{'fit':<20}{'rows':>11}{'matrix MiB':>12}{'peak MiB':>10}{'ratio':>7}{'without the bank':>18}")
        for title, (name, ratio, dtype) in fits.items():
            for rows in (n * 1024 for n in sizes):
                matrix = rows * COLUMNS * getattr(torch, dtype).itemsize
                found = in_own_process("fit", name, file, rows, int(rows * ratio) if ratio else 30, dtype)
                ratios = f"{found['peak'] / matrix:>7.2f}{(found['peak'] - found['bank']) / matrix:>18.2f}"
                click.echo(f"{title:<20}{rows:>11,}{matrix / MIB:>12.0f}{found['peak'] / MIB:>10.0f}{ratios}")
        found = in_own_process("fit", "ours", file, rows, rows // 100, "float32", points.nbytes / 10)
        click.echo(
            f"\n{len(points):,} rows at 1 % within a tenth of their size, {points.nbytes / 10 / MIB:.0f} MiB: "
            f"peak {found['peak'] / MIB:.0f} MiB"
        )
        lay_out(folder / "elpv")
        points = elpv_embeddings()
        click.echo(f"\n{len(points):,} rows at 1 %, with memory for all rows and for a tenth of them")
        for title, budget in {"exact": None, "streamed": points.nbytes / 10 / 2**30}.items():
            found = in_own_process("train", str(folder / "elpv"), budget, str(folder / "bank.pt"))
            bank = torch.load(folder / "bank.pt")
            click.echo(
                f"{title:<10} bank {len(bank):,}, covering radius {covering_radius(points, bank):.4g} (reported "
                f"{found['radius']:.4g}), image AUROC {found['auroc']:.4f}"
            )


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        job, *rest = json.loads(sys.argv[1])
        {"fit": fit, "train": train}[job](*rest)
    else:
        main()
