"""Peak memory of a whole fit against its matrix of embeddings, ours and anomalib's, and a fit of ten times its budget.

    python tests/benchmarks/coreset_memory.py

Every figure is the peak resident memory of a process of its own that trains through anomalib's Engine, less that of the
same training on 16 images. anomalib picks 0.01 % (its steps add no memory, but take long). Linux and macOS.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch
from common import LAYERS, elpv_embeddings, heading

MIB = 2**20
IMAGE = 1024 * 152 * 4  # bytes of one image's embeddings


def peak() -> int:
    """Bytes this process had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(root: str, name: str, ratio: float, options: dict, bank: str) -> None:
    """Train, and test where a place for the bank is given; prints what came of it."""
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Patchcore

    from patchcore_plugin import FaissPatchcore

    # anomalib's cannot load the embedded weights; memory does not depend on them
    model_class, backbone = {
        "anomalib": (Patchcore, {"backbone": "tf_efficientnet_lite0", "pre_trained": False}),
        "ours": (FaissPatchcore, {"backbone": "efficientnet_lite0"}),
    }[name]
    model = model_class(layers=LAYERS, coreset_sampling_ratio=ratio, visualizer=False, **backbone, **options)
    data = Folder(
        name="cells", root=root, normal_dir="train/good", normal_test_dir="test/good", abnormal_dir="test/defective",
        num_workers=0, train_batch_size=16, eval_batch_size=16, val_split_mode="same_as_test",
    )  # fmt: skip
    engine = Engine(
        default_root_dir=f"{root}/results", accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        limit_val_batches=1.0 if bank else 0,
    )  # fmt: skip
    engine.fit(model, datamodule=data)
    found = {"peak": peak(), "bank": len(model.model.memory_bank)}
    if bank:
        found["auroc"] = engine.test(model, datamodule=data)[0]["image_AUROC"]
        found["radius"] = float(model.model.covering_radius)
        torch.save(model.model.memory_bank, bank)
    print("RESULT", json.dumps(found))


def measure(root: Path, name: str, ratio: float, bank: Path | None = None, **options: object) -> dict:
    arguments = [sys.executable, __file__, json.dumps([str(root), name, ratio, options, str(bank or "")])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise click.ClickException(done.stderr[-2000:])
    return json.loads(lines[0].removeprefix("RESULT"))


def subset(elpv: Path, root: Path, images: int) -> Path:
    """A data set of some of the training images."""
    for kind in ("train/good", "test/good", "test/defective"):
        (root / kind).mkdir(parents=True)
        for image in sorted((elpv / kind).iterdir())[: images if kind == "train/good" else None]:
            shutil.copy(image, root / kind)
    return root


def covering_radius(points: torch.Tensor, bank: torch.Tensor) -> float:
    return max(float(torch.cdist(part, bank).amin(1).max()) for part in points.split(4096))


@click.command()
@click.option("--images", "sizes", multiple=True, default=[103, 206, 411], show_default=True, help="May be repeated.")
def main(sizes: tuple[int, ...]) -> None:
    """Print peak memory at several sizes, then a streamed fit against the exact one."""
    from patchcore_plugin.elpv import lay_out

    click.echo(heading("lightning"))
    fits = {
        "ours, 1 %": ("ours", 0.01, {}),
        "ours, 10 %": ("ours", 0.1, {}),
        "ours, 10 %, float16": ("ours", 0.1, {"embedding_dtype": "float16"}),
        "anomalib, 0.01 %": ("anomalib", 0.0001, {}),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lay_out(folder / "elpv")
        roots = {n: subset(folder / "elpv", folder / str(n), n) for n in (16, *sizes)}
        click.echo(f"\n{'fit':<22}{'images':>8}{'matrix MiB':>12}{'peak MiB':>10}{'ratio':>8}")
        for title, (name, ratio, options) in fits.items():
            value = 2 if options else 4
            base = measure(roots[16], name, ratio, **options)["peak"]
            for n in sizes:
                matrix = n * IMAGE * value // 4
                # what the small training took for its own matrix is part of neither
                more = measure(roots[n], name, ratio, **options)["peak"] - base + 16 * IMAGE * value // 4
                click.echo(f"{title:<22}{n:>8}{matrix / MIB:>12.0f}{more / MIB:>10.0f}{more / matrix:>8.2f}")
        largest = max(sizes)
        matrix = largest * IMAGE
        base = measure(roots[16], "ours", 0.01)["peak"]
        points = elpv_embeddings(largest)
        click.echo(f"\n{largest} images at 1 %, with room for all and with a tenth of it")
        for title, options in {"exact": {}, "streamed": {"memory_budget": matrix * 1.25 / 10 / 2**30}}.items():
            more = measure(roots[largest], "ours", 0.01, **options)["peak"] - base + 16 * IMAGE
            found = measure(roots[largest], "ours", 0.01, bank=folder / "bank.pt", **options)
            bank = torch.load(folder / "bank.pt")
            click.echo(
                f"{title:<10} peak {more / MIB:.0f} MiB ({more / matrix:.2f} of the matrix), bank {len(bank):,}, covering "
                f"radius {covering_radius(points, bank):.4g} (promised {found['radius']:.4g}), "
                f"image AUROC {found['auroc']:.4f}"
            )


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        train(*json.loads(sys.argv[1]))
    else:
        main()
