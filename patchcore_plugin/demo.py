"""``patchcore demo``: the whole way on real images, from a folder of solar cells to an answer over HTTP."""

from __future__ import annotations

import base64
import io
import json
import time
import warnings
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import matplotlib as mpl
from PIL import Image
from rich.console import Console

from patchcore_plugin.elpv import lay_out
from patchcore_plugin.images import find_images
from patchcore_plugin.operations.serving import SERVE, SERVICE, run_server

if TYPE_CHECKING:
    from collections.abc import Sequence

_CELLS_PER_KIND = 4  # that the service is asked about, and the figure shows

console = Console(markup=False)  # a folder may have brackets in its name


class _Answer(NamedTuple):
    """The service's answer for one cell.

    Attributes:
        kind: ``"normal"`` or ``"defective"``, as experts say.
        path: The cell's image.
        content: The answer's JSON object.
    """

    kind: str
    path: Path
    content: dict[str, Any]


def run(folder: Path) -> None:
    """Train, export and serve on ELPV's cells, and show what comes out.

    Args:
        folder: Folder for everything that the demo writes.

    Raises:
        MissingPackageError: If the package with the images is not installed.
        ServerStartError: If the service does not start; the message has the end of its log.
    """
    started = time.monotonic()
    data, bundle, figure, log = (folder / name for name in ("data", "bundle", "figure.png", "service.log"))
    console.rule("1/5 Images")
    for name, count in lay_out(data).items():
        console.print(f"{count:4d} cells in {data / name}")

    console.rule("2/5 Train and test, by anomalib with configs/elpv.yaml")
    checkpoint, metrics = _train(data, folder / "results")

    console.rule("3/5 Export")
    _export(checkpoint, bundle)

    console.rule("4/5 Serve, and ask over HTTP")
    answers = _ask_about_cells(data / "test", bundle, log)

    console.rule("5/5 Figure")
    _draw(answers, figure)
    console.print(f"Test metrics: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}")
    for label, path in {"Checkpoint": checkpoint, "Bundle": bundle, "Service log": log, "Figure": figure}.items():
        console.print(f"{label + ':':13s}{path}", soft_wrap=True)
    console.print(f"Done in {time.monotonic() - started:.0f} s. To serve the bundle yourself:")
    console.print(f"  patchcore pack {bundle}\n  bentoml serve {SERVICE}", soft_wrap=True)


def _train(data: Path, results: Path) -> tuple[Path, dict[str, float]]:
    """Train with the packaged configuration; returns the checkpoint and the test metrics."""
    warnings.filterwarnings("ignore")  # those of the training stack about itself would bury the progress
    from patchcore_plugin.registry import run_anomalib

    with as_file(files("patchcore_plugin.configs") / "elpv.yaml") as config:
        cli = run_anomalib(
            ["train", "--config", str(config), "--data.init_args.root", str(data), "--default_root_dir", str(results)]
        )
    metrics = {name: float(value) for name, value in cli.engine.trainer.callback_metrics.items()}
    return Path(cli.engine.best_model_path), metrics


def _export(checkpoint: Path, bundle: Path) -> None:
    from patchcore_plugin.export import export_bundle
    from patchcore_plugin.model.lightning_model import FaissPatchcore

    export_bundle(FaissPatchcore.load_from_checkpoint(checkpoint), bundle, "elpv", overwrite=True)
    size = sum(file.stat().st_size for file in bundle.iterdir())
    console.print(f"Bundle of {size / 1e6:.1f} MB in {bundle}")


def _ask_about_cells(test: Path, bundle: Path, log: Path) -> list[_Answer]:
    """Serve the bundle, ask about a few cells of each kind, and print a typical answer of each."""
    answers = []
    with (
        console.status("Start the service") as status,
        # a home of its own: a server clears the metrics of others that have the same one
        run_server(
            SERVE, log, PATCHCORE_BUNDLE=str(bundle.resolve()), BENTOML_HOME=str(log.resolve().parent / "bentoml")
        ) as server,
    ):
        status.stop()
        for kind, name in {"normal": "good", "defective": "defective"}.items():
            paths = find_images(test / name)
            chosen = paths[:: len(paths) // _CELLS_PER_KIND][:_CELLS_PER_KIND]
            found = [_Answer(kind, path, _ask(server.url, path)) for path in chosen]
            answers += found
            typical = sorted(found, key=lambda answer: answer.content["score"])[len(found) // 2]
            console.print(f"A typical {kind} cell, {typical.path.name}: POST {server.url}/predict")
            console.print_json(json.dumps({key: value for key, value in typical.content.items() if key != "heatmap"}))
    return answers


def _ask(url: str, path: Path) -> dict[str, Any]:
    files = {"image": (path.name, path.read_bytes(), "image/png")}
    with httpx.Client(trust_env=False, timeout=60) as client:  # whatever proxy leads out of this machine
        response = client.post(f"{url}/predict", files=files, data={"heatmap": "true"})
    response.raise_for_status()
    return response.json()


def _draw(answers: Sequence[_Answer], figure: Path) -> None:
    """Save image, heatmap and verdict of every cell, a column each."""
    from matplotlib import pyplot as plt

    mpl.use("Agg")
    drawing, axes = plt.subplots(2, len(answers), figsize=(2 * len(answers), 5), squeeze=False, layout="constrained")
    for column, (kind, path, content) in enumerate(answers):
        upper, lower = axes[0][column], axes[1][column]
        upper.imshow(Image.open(path).convert("RGB"))
        upper.set_title(f"{path.stem}\n{kind}", fontsize=9)
        lower.imshow(Image.open(io.BytesIO(base64.b64decode(content["heatmap"]))))
        wrong = (content["verdict"] == "anomalous") != (kind == "defective")
        lower.set_title(f"{content['verdict']}\nscore {content['score']:.1f}", fontsize=9, color="red" if wrong else "black")
        for axis in (upper, lower):
            axis.set_axis_off()
    threshold = answers[0].content["threshold"]
    drawing.suptitle(f"Solar cells: image, heatmap, verdict (threshold {threshold:.1f}; wrong verdicts in red)", fontsize=10)
    drawing.savefig(figure, dpi=120)
    plt.close(drawing)
