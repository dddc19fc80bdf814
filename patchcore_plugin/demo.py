"""``patchcore demo``: the whole way on real images, from a folder of cells to an answer over HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import matplotlib as mpl
import psutil
from PIL import Image
from rich.console import Console

from patchcore_plugin.elpv import lay_out
from patchcore_plugin.images import find_images

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = "patchcore_plugin.bento.service:PatchcoreService"
_START_LIMIT = 120  # seconds
_CELLS_SHOWN = 4  # of each kind, in the figure

console = Console()
_http = httpx.Client(trust_env=False)  # the service is on this machine, whatever proxy leads out of it


def run(folder: Path) -> None:
    """Train, export and serve on ELPV's cells below ``folder``, and show what comes out.

    Raises:
        ImportError: If the images' package is not installed.
        RuntimeError: If the service does not start; the message has the end of its log.
    """
    started = time.monotonic()
    data, bundle, figure, log = (folder / name for name in ("data", "bundle", "figure.png", "service.log"))
    console.rule("1/5 Images")
    for name, count in lay_out(data).items():
        console.print(f"{count:4d} cells in {data / name}")

    console.rule("2/5 Train and test, by anomalib with configs/elpv.yaml")
    checkpoint, metrics = _train(data, folder / "results")

    console.rule("3/5 Export")
    from patchcore_plugin.export import export_bundle
    from patchcore_plugin.model.lightning_model import FaissPatchcore

    export_bundle(FaissPatchcore.load_from_checkpoint(checkpoint), bundle, "elpv", overwrite=True)
    size = sum(file.stat().st_size for file in bundle.iterdir())
    console.print(f"Bundle of {size / 1e6:.1f} MB in {bundle}")

    console.rule("4/5 Serve, and ask over HTTP")
    kinds = {"normal": data / "test" / "good", "defective": data / "test" / "defective"}
    cells = {kind: find_images(path) for kind, path in kinds.items()}
    shown: list[tuple[str, Path, dict[str, Any]]] = []
    with serving(bundle, log) as url:
        for kind, paths in cells.items():
            answers = [(kind, path, _ask(url, path)) for path in paths[:: len(paths) // _CELLS_SHOWN][:_CELLS_SHOWN]]
            shown += answers
            _, path, answer = sorted(answers, key=lambda item: item[2]["score"])[len(answers) // 2]
            console.print(f"A typical {kind} cell, {path.name}: POST {url}/predict")
            console.print_json(json.dumps({key: value for key, value in answer.items() if key != "heatmap"}))

    console.rule("5/5 Figure")
    _draw(shown, figure)
    console.print(f"Test metrics: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}")
    for label, path in {"Checkpoint": checkpoint, "Bundle": bundle, "Service log": log, "Figure": figure}.items():
        console.print(f"{label + ':':13s}{path}", soft_wrap=True)
    console.print(f"Done in {time.monotonic() - started:.0f} s. Serve it yourself:")
    console.print(f"  patchcore pack {bundle}\n  bentoml serve {SERVICE}", soft_wrap=True)


def _train(data: Path, results: Path) -> tuple[Path, dict[str, float]]:
    """Train with the packaged configuration; returns the checkpoint and the test metrics."""
    warnings.filterwarnings("ignore")  # the training stack's own remarks would bury the progress
    from patchcore_plugin.registry import run_anomalib

    with as_file(files("patchcore_plugin.configs") / "elpv.yaml") as config:
        cli = run_anomalib(
            ["train", "--config", str(config), "--data.init_args.root", str(data), "--default_root_dir", str(results)]
        )
    metrics = {name: float(value) for name, value in cli.engine.trainer.callback_metrics.items()}
    return Path(cli.engine.best_model_path), metrics


@contextmanager
def serving(bundle: Path, log: Path) -> Iterator[str]:
    """Run ``bentoml serve`` for a bundle on a free port of this machine alone; gives its URL, ends it afterwards.

    Raises:
        RuntimeError: If the service ends or is not ready in time; the message has the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "PATCHCORE_BUNDLE": str(bundle.resolve()), "BENTOML_DO_NOT_TRACK": "True"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(url, process, log)
            yield url
        finally:
            _end(process)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_LIMIT
    with console.status("Waiting for the service"):
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if _http.get(f"{url}/readyz", timeout=2).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    msg = f"The service did not start. The end of {log}:\n{tail}"
    raise RuntimeError(msg)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in family:
        if member.is_running():
            member.kill()


def _ask(url: str, path: Path) -> dict[str, Any]:
    response = _http.post(
        f"{url}/predict", files={"image": (path.name, path.read_bytes(), "image/png")}, data={"heatmap": "true"}, timeout=60
    )
    response.raise_for_status()
    return response.json()


def _draw(shown: list[tuple[str, Path, dict[str, Any]]], figure: Path) -> None:
    """Save image, heatmap and verdict of every cell, a column each."""
    from matplotlib import pyplot as plt

    mpl.use("Agg")
    drawing, axes = plt.subplots(2, len(shown), figsize=(2 * len(shown), 5), squeeze=False, layout="constrained")
    for column, (kind, path, answer) in enumerate(shown):
        upper, lower = axes[0][column], axes[1][column]
        upper.imshow(Image.open(path).convert("RGB"))
        upper.set_title(f"{path.stem}\n{kind}", fontsize=9)
        lower.imshow(Image.open(io.BytesIO(base64.b64decode(answer["heatmap"]))))
        wrong = (answer["verdict"] == "anomalous") != (kind == "defective")
        lower.set_title(f"{answer['verdict']}\nscore {answer['score']:.1f}", fontsize=9, color="red" if wrong else "black")
        for axis in (upper, lower):
            axis.set_axis_off()
    threshold = shown[0][2]["threshold"]
    drawing.suptitle(f"Solar cells: image, heatmap, verdict (threshold {threshold:.1f}; wrong verdicts in red)", fontsize=10)
    drawing.savefig(figure, dpi=120)
    plt.close(drawing)
