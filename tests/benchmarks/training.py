"""How long a training takes, stage by stage: fit, validation and test through anomalib's Engine, as `anomalib train` does.

    python tests/benchmarks/training.py                               # ELPV's monocrystalline cells, EfficientNet-Lite0
    python tests/benchmarks/training.py --backbone wide_resnet50_2    # random weights, the paper's layers
    python tests/benchmarks/training.py --before CHECKOUT             # and another version of this repository
    python tests/benchmarks/training.py --row default --row torch     # these rows alone

Each row is a process of its own. Validation and test have the same images, as in configs/elpv.yaml. The last line is
OpenVINO alone: the time to embed the training images, decoded and pre-processed already, by the network of a bundle.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from common import LAYERS, heading
from helpers.training import folder_datamodule
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from patchcore_plugin import FaissPatchcore
from patchcore_plugin.elpv import lay_out

ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "torch": {"embedding_engine": "torch"},
    "outlier_rejection: 2": {"outlier_rejection": 2},
}
BEFORE, ANOMALIB = "before", "anomalib Patchcore"
STAGES = ("embed", "coreset", "validate", "test", "whole")
SETTINGS: dict[str, dict[str, Any]] = {
    "efficientnet_lite0": {"layers": LAYERS, "normalization": "backbone", "score_smoothing": 1},
    "wide_resnet50_2": {"layers": ["layer2", "layer3"], "pre_trained": False},
}


class Stages(Callback):
    """Times the stages of a training."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = 0.0

    def _start(self) -> None:
        self._started = time.perf_counter()

    def _end(self, stage: str) -> None:
        self.seconds[stage] = time.perf_counter() - self._started
        self._start()

    def on_train_epoch_start(self, *_: Any) -> None:
        """The first batch comes."""
        self._start()

    def on_train_batch_end(self, *_: Any) -> None:
        """The latest batch is embedded."""
        self.seconds["embed"] = time.perf_counter() - self._started
        self._end_of_embedding = time.perf_counter()

    def on_validation_batch_start(self, _trainer: Any, _model: Any, _batch: Any, number: int, *_: Any) -> None:
        """The memory bank is there."""
        if number == 0:
            self._started = self._end_of_embedding
            self._end("coreset")

    def on_validation_epoch_end(self, *_: Any) -> None:
        """Thresholds are there."""
        self._end("validate")

    def on_test_epoch_start(self, *_: Any) -> None:
        """The first test image comes."""
        self._start()

    def on_test_epoch_end(self, *_: Any) -> None:
        """Metrics are there."""
        self._end("test")


def make(backbone: str, row: str) -> Any:
    """Make the model of a row; random weights are the same in each."""
    torch.manual_seed(0)
    if row != ANOMALIB:
        return FaissPatchcore(backbone=backbone, coreset_sampling_ratio=0.01, **SETTINGS[backbone], **ROWS.get(row, {}))
    from anomalib.models import Patchcore

    name = {"efficientnet_lite0": "tf_efficientnet_lite0"}.get(backbone, backbone)
    layers = SETTINGS[backbone]["layers"]
    model = Patchcore(backbone=name, layers=layers, pre_trained=False, coreset_sampling_ratio=0.01)
    if backbone != name:
        weights = FaissPatchcore(backbone=backbone, layers=layers).model.feature_extractor.net.state_dict()
        model.model.feature_extractor.feature_extractor.load_state_dict(weights)
    return model


def measure(backbone: str, row: str, data: Path) -> dict[str, float]:
    """Train and test; returns seconds of each stage, AUROC, and MiB at the peak."""
    from anomalib.engine import Engine

    stages, model = Stages(), make(backbone, row)
    with tempfile.TemporaryDirectory() as folder:
        datamodule = folder_datamodule(data, train_batch_size=16, eval_batch_size=16)
        engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, callbacks=[stages])
        started = time.perf_counter()
        metrics = engine.train(model, datamodule=datamodule)
        stages.seconds["whole"] = time.perf_counter() - started
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    return {**stages.seconds, "AUROC": float(metrics[0]["image_AUROC"]), "MiB": peak}


def network_alone(backbone: str, data: Path) -> float:
    """Seconds in which OpenVINO embeds the training images, decoded and pre-processed."""
    import openvino as ov

    from patchcore_plugin.cpu import compile_options, cores
    from patchcore_plugin.model.conversion import convert

    model = make(backbone, "default")
    datamodule = folder_datamodule(data, train_batch_size=16)
    datamodule.prepare_data()
    datamodule.setup()
    images = torch.cat([model.pre_processor.transform(batch.image) for batch in datamodule.train_dataloader()]).numpy()
    network = convert(model.model, 256, 256)
    network.reshape([1, 3, 256, 256])
    options = {**compile_options("throughput", cores()), "INFERENCE_PRECISION_HINT": "f32"}
    queue = ov.AsyncInferQueue(ov.Core().compile_model(network, "CPU", options), cores())
    times = []
    for _ in range(2):
        started = time.perf_counter()
        for image in images:
            queue.start_async([image[None]], share_inputs=True)
        queue.wait_all()
        times.append(time.perf_counter() - started)
    return min(times)


@click.command()
@click.option("--backbone", type=click.Choice(list(SETTINGS)), default="efficientnet_lite0", show_default=True)
@click.option("--before", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout, for a first row.")
@click.option("--row", "rows", multiple=True, help=f"{', '.join([*ROWS, ANOMALIB])}; may be repeated.  [default: all]")
@click.option("--kind", type=click.Choice(["mono", "poly"]), default="mono", show_default=True, help="Cells of ELPV.")
@click.option("--every", default=1, show_default=True, help="Take every N-th image alone.")
@click.option("--one", nargs=2, hidden=True, help="A row and the folder of its data: measured in this process.")
def main(
    backbone: str, before: Path | None, rows: tuple[str, ...], kind: str, every: int, one: tuple[str, str] | None
) -> None:
    """Print the seconds of each stage of a training, AUROC and memory."""
    if one is not None:
        click.echo(f"\n{json.dumps(measure(backbone, one[0], Path(one[1])))}")
        return
    click.echo(heading("openvino", "faiss-cpu"))
    table = Table(backbone, *(f"{stage} s" for stage in STAGES), "images/s in test", "image AUROC", "MiB")
    with tempfile.TemporaryDirectory() as folder:
        counts = lay_out(Path(folder), kind)
        for part in counts:
            for number, image in enumerate(sorted((Path(folder) / part).iterdir())):
                if number % every:
                    image.unlink()
            counts[part] = -(-counts[part] // every)
        click.echo(str(counts))
        tested = sum(count for name, count in counts.items() if name.startswith("test"))
        for row in ([BEFORE] * (before is not None)) + list(rows or [*ROWS, ANOMALIB]):
            command = [sys.executable, __file__, "--backbone", backbone, "--one", row, folder]
            environment = {**os.environ, "PYTHONPATH": str(before.resolve())} if row == BEFORE else None
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1])
            seconds = [f"{found[stage]:.1f}" for stage in STAGES]
            table.add_row(row, *seconds, f"{tested / found['test']:.0f}", f"{found['AUROC']:.4f}", f"{found['MiB']:.0f}")
            click.echo(f"{row}: {found}")
        click.echo(f"OpenVINO alone, the training images: {network_alone(backbone, Path(folder)):.1f} s")
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
