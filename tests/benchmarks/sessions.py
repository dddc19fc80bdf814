"""False alarms in a new recording session, with thresholds by single images and by whole sessions.

    python tests/benchmarks/sessions.py

ELPV's monocrystalline cells become six sessions: each has its own brightness, blur and turn. A draw leaves one session
unseen. Of the other five, images drawn at random, or whole sessions drawn at random, are held back to set the threshold; the
bank learns from the rest. The table shows the false alarms among the normal images of the unseen session: the mean over the
draws and the range from the 5th to the 95th percentile of single draws, the share of draws that keep the rate asked for,
beside the share promised, and the share of the unseen session's defective images that are found.

Each image is embedded once. So that 200 banks take a minute, a bank is the union of its images' own coresets, ten patches of
1,024 (1 %) each, instead of one coreset of them all. An image's score is its largest patch distance.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from common import LAYERS, embed, heading
from PIL import Image, ImageEnhance, ImageFilter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from patchcore_plugin import FaissPatchcore
from patchcore_plugin.bundle import Calibration, Sessions
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.images import find_images
from patchcore_plugin.scoring.conformal import set_thresholds

SESSIONS = [(1.0, 0, 0), (1.1, 0.5, 0.5), (0.9, 0.3, -1), (1.2, 0.8, 1), (0.85, 0.6, -0.5), (1.05, 1.0, 1.5)]
"""Brightness, blur (standard deviation in pixels) and turn (degrees) of each session."""

MARGIN = 10  # pixels cut off on each side, so that no turn shows a corner without image
CORESET = 10  # patches of each image
RATES = (0.05, 0.1)


class Cells(NamedTuple):
    """Images of all sessions, the N normal ones first.

    Attributes:
        distances: Distance of each patch of each image to each normal image's coreset (B, N, 1024), float32.
        session: Session of each image (B,).
    """

    distances: torch.Tensor
    session: np.ndarray

    @property
    def normal(self) -> np.ndarray:
        """Whether each image is normal (B,)."""
        return np.arange(len(self.session)) < self.distances.shape[1]


def record(path: Path, session: int, folder: Path) -> Path:
    """Write the image as the session's camera would see it."""
    brightness, blur, turn = SESSIONS[session]
    with Image.open(path) as image:
        turned = image.convert("L").rotate(turn, Image.Resampling.BICUBIC)
    seen = turned.crop((MARGIN, MARGIN, turned.width - MARGIN, turned.height - MARGIN))
    seen = ImageEnhance.Brightness(seen.filter(ImageFilter.GaussianBlur(blur))).enhance(brightness)
    seen.save(folder / path.name)
    return folder / path.name


def make_sessions(folder: Path) -> Cells:
    """Embed the cells, each in the session that its number gives."""
    lay_out(folder / "elpv")
    paths = sorted(find_images(folder / "elpv"), key=lambda path: path.name)
    np.random.default_rng(0).shuffle(paths)
    paths.sort(key=lambda path: path.parent.name != "good")
    session = np.arange(len(paths)) % len(SESSIONS)
    seen = [record(path, number, folder) for path, number in zip(paths, session, strict=True)]
    model = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS, normalization="imagenet").eval()
    with torch.inference_mode():
        embeddings = embed(model, seen).reshape(len(seen), -1, 152)
    return Cells(distances_to_coresets(embeddings, sum(path.parent.name == "good" for path in paths)), session)


def distances_to_coresets(embeddings: torch.Tensor, normal: int) -> torch.Tensor:
    """Distance of each patch of each image to the coreset of each of the first images, which are normal (B, N, 1024)."""
    coresets = torch.stack([rows[GreedyCoreset(size=CORESET, progress=False).fit(rows)] for rows in embeddings[:normal]])
    distances = torch.empty(len(embeddings), len(coresets), embeddings.shape[1])
    for image, rows in enumerate(track(embeddings, "Distances")):
        distances[image] = torch.cdist(rows, coresets.flatten(0, 1)).reshape(len(rows), -1, CORESET).amin(2).T
    return distances


def score(cells: Cells, learned: np.ndarray, image: int) -> float:
    """Largest patch distance of an image to the bank of the normal images ``learned``."""
    return cells.distances[image, learned].amin(0).max().item()


def alarms(cells: Cells, unseen: int, held: np.ndarray, whole: bool) -> list[tuple[float, float]]:
    """Shares of the unseen session's normal and defective images above the threshold, for each rate.

    Args:
        cells: Images.
        unseen: The session that is neither learned from nor held back.
        held: Normal images held back.
        whole: Whether they are whole sessions.
    """
    learned = np.setdiff1d(np.flatnonzero(cells.normal & (cells.session != unseen)), held)
    scores = np.array([score(cells, learned, image) for image in held])
    held, scores = held[scores.argsort()], np.sort(scores).tolist()
    numbers = np.unique(cells.session[held], return_inverse=True)[1].tolist()
    sessions = Sessions(scores=numbers, peaks=numbers) if whole else None
    new = [
        np.array(
            [score(cells, learned, image) for image in np.flatnonzero((cells.session == unseen) & (cells.normal == kind))]
        )
        for kind in (True, False)
    ]
    found = []
    for rate in RATES:
        calibration = Calibration(false_positive_rate=rate, scores=scores, peaks=scores, means=scores, sessions=sessions)
        limit = set_thresholds(calibration)[0].threshold
        found.append(tuple(np.mean(kind > limit) for kind in new))
    return found


@click.command()
@click.option("--draws", default=200, show_default=True)
def main(draws: int) -> None:
    """Print the false alarms in an unseen session."""
    click.echo(heading())
    with tempfile.TemporaryDirectory() as folder:
        cells = make_sessions(Path(folder))
    counts = np.bincount(cells.session[cells.normal]), np.bincount(cells.session[~cells.normal])
    click.echo(f"{draws} draws; normal images of the sessions {counts[0]}, defective {counts[1]}")
    table = Table("held back, of five sessions", "rate", "false alarms", "single draws", "draws that keep it", "promised",
                  "defects found")  # fmt: skip
    for label, count in (("40 % of the images", 0), ("1 session", 1), ("2 sessions", 2), ("3 sessions", 3)):
        rng, results = np.random.default_rng(0), []
        for _ in track(range(draws), label):
            unseen, *known = rng.permutation(len(SESSIONS)).tolist()
            if count:
                held = np.flatnonzero(np.isin(cells.session, known[:count]) & cells.normal)
            else:
                held = rng.permutation(np.flatnonzero((cells.session != unseen) & cells.normal))
                held = held[: round(0.4 * len(held))]
            results.append(alarms(cells, unseen, held, whole=count > 0))
        for rate, (normal, defective) in zip(RATES, np.moveaxis(np.array(results), (1, 2), (0, 1)), strict=True):
            low, high = np.quantile(normal, [0.05, 0.95])
            margin = 1.96 * normal.std(ddof=1) / math.sqrt(draws)
            table.add_row(
                label, f"{rate:.0%}", f"{normal.mean():.1%} ± {margin:.1%}", f"{low:.1%} to {high:.1%}",
                f"{np.mean(normal <= rate):.0%}", f"{count / (count + 1):.0%}" if count else "none",
                f"{defective.mean():.0%}",
            )  # fmt: skip
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
