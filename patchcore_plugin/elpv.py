"""The demo's images: the solar cells of ELPV, in the folders that anomalib's ``Folder`` reads."""

from __future__ import annotations

import csv
import random
from importlib.resources import files
from pathlib import Path
from typing import Literal

from patchcore_plugin.errors import MissingPackageError, writing

TRAIN_SHARE = 0.7
"""Share of the normal cells that are for training."""

SEED = 0
"""Seed of the split, by default."""


def lay_out(root: Path, kind: Literal["mono", "poly"] = "mono", seed: int = SEED) -> dict[str, int]:
    """Copy the cells of one kind into ``root``: train/good, test/good and test/defective.

    Experts gave each cell a defect probability. Cells of probability 0 are normal: 70 % of them, drawn at random, are for
    training, the others for testing. Cells of probability 1 are defective test images. All other cells are left out. The
    function may run again on the same folder.

    Args:
        root: Folder to fill; made if absent.
        kind: Monocrystalline or polycrystalline cells.
        seed: Seed of the draw.

    Returns:
        Number of images in each subfolder.

    Raises:
        MissingPackageError: If the package elpv-dataset is not installed.
    """
    folders = split(kind, seed)
    for folder, paths in folders.items():
        target = root / folder
        target.mkdir(parents=True, exist_ok=True)
        for path in paths:
            file, content = target / path.name, path.read_bytes()
            if not file.exists() or file.stat().st_size != len(content):
                with writing(file):
                    file.write_bytes(content)
    return {folder: len(paths) for folder, paths in folders.items()}


def split(kind: Literal["mono", "poly"] = "mono", seed: int = SEED) -> dict[str, list[Path]]:
    """Files of the cells for each folder of :func:`lay_out`, where the package elpv-dataset has them.

    Raises:
        MissingPackageError: If the package elpv-dataset is not installed.
    """
    try:
        data = files("elpv_dataset") / "data"
    except ModuleNotFoundError as error:
        msg = "The demo's images come with the package elpv-dataset, which is not installed: pip install elpv-dataset"
        raise MissingPackageError(msg) from error
    rows = list(
        csv.reader((data / "labels.csv").read_text(encoding="ascii").splitlines(), delimiter=" ", skipinitialspace=True)
    )
    cells = [(Path(str(data / path)), float(probability)) for path, probability, crystal, *_ in rows if crystal == kind]
    sound = sorted(path for path, probability in cells if probability == 0)
    random.Random(seed).shuffle(sound)  # noqa: S311
    count = int(len(sound) * TRAIN_SHARE)
    return {
        "train/good": sound[:count],
        "test/good": sound[count:],
        "test/defective": [path for path, probability in cells if probability == 1],
    }
