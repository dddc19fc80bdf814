"""Does `patchcore tune` choose settings that are best on images that it has not seen?

    python tests/benchmarks/tune.py mono poly MTD_FOLDER

Of each data set (ELPV's mono or poly cells, or a folder with train/good, test/good and test/DEFECT) 400 normal and 200
defective images are drawn. 200 of the normal ones are for the test; each seed draws 160 of the other 200. `tune` gets them
and, in each of several draws, 10 defective images, which are not tested. A bank of the 160 then scores the test images with
every setting. What synthetic defects would choose is shown too. The margin of `tune` is not chosen on these images.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from common import LAYERS, heading
from rich.progress import track

from patchcore_plugin.elpv import lay_out
from patchcore_plugin.images import find_images
from patchcore_plugin.model.embedder import Embedder
from patchcore_plugin.scoring import ScoreRule
from patchcore_plugin.tuning import criterion, tune
from patchcore_plugin.tuning.cross_fit import cross_fit, draw_folds, fit_bank, read, score
from patchcore_plugin.tuning.settings import list_settings
from patchcore_plugin.tuning.synthetic import draw_defects

NORMAL, DEFECTIVE, KNOWN, TUNED, DRAWN = 400, 200, 200, 160, 10
BASE = {"backbone": "efficientnet_lite0", "layers": LAYERS, "normalization": "backbone", "score_smoothing": 1}


@dataclass
class Split:
    """What one seed and setting give: scores of `tune` on real and synthetic defects, and scores of the test images."""

    real: criterion.FoldScores
    synthetic: criterion.FoldScores
    normal: np.ndarray
    defective: np.ndarray


def draw(folder: Path) -> dict[str, list]:
    """Normal, defective and synthetic images of a data set."""
    images = [path for part in ("train", "test") for path in find_images(folder / part)]
    kinds = [[path for path in images if (path.parent.name == "good") == normal] for normal in (True, False)]
    normal, defective = (
        random.Random(0).sample(paths, count) for paths, count in zip(kinds, (NORMAL, DEFECTIVE), strict=True)
    )
    return {"normal": normal, "defective": defective, "synthetic": draw_defects(normal[:KNOWN], 0)}


def embed(images: dict[str, list], embedder: Embedder, file: str) -> dict[str, list[torch.Tensor]]:
    """Embeddings of the images, float16; kept in files whose names begin so, where a folder is given."""
    found = {}
    for part, members in images.items():
        kept = Path(f"{file}-{part}.npy") if file else None
        if kept is None or not kept.exists():
            rows = np.stack([embedder.embed(read(image)).half().numpy() for image in track(members, f"Embed {file}")])
            if kept is not None:
                np.save(kept, rows)
        else:
            rows = np.load(kept)
        found[part] = list(torch.from_numpy(rows))
    return found


def measure(found: dict[str, list[torch.Tensor]], rules: list[ScoreRule], seed: int) -> list[Split]:
    """Scores of one seed, for each rule."""
    tuned = np.random.default_rng(seed).permutation(KNOWN)[:TUNED]
    images, synthetic = ([found[part][number].float() for number in tuned] for part in ("normal", "synthetic"))
    fold, defective = draw_folds(TUNED, tune.FOLDS, seed), found["defective"]
    real = cross_fit(rules, images, defective, fold, seed=seed)
    made = cross_fit(rules, images, synthetic, fold, np.arange(TUNED), seed)
    last = score(fit_bank(torch.stack(images), rules[0], seed), [*found["normal"][KNOWN:], *defective], rules)
    return [Split(*scores, row[:-DEFECTIVE], row[-DEFECTIVE:]) for *scores, row in zip(real, made, last, strict=True)]


def auroc(split: Split, rows: np.ndarray) -> float:
    """On the test images, with these defective ones."""
    scores = criterion.FoldScores(split.normal, np.zeros(len(split.normal), int), split.defective[rows][:, None])
    return float(scores.wins().mean())


def subset(scores: criterion.FoldScores, rows: np.ndarray) -> criterion.FoldScores:
    """Scores with some of the defective images."""
    return criterion.FoldScores(scores.normal, scores.fold, scores.defective[rows])


def draws(splits: dict[str, Split], seed: int, count: int):
    """Each draw of defective images: choice with them, choice without, and AUROC of each setting on the other images."""
    names = list(splits)
    made = criterion.compare([splits[name].synthetic for name in names])
    without = names[criterion.choose(made, tune.REAL_MARGIN)]
    for number in range(count):
        shuffled = np.random.default_rng([seed, number]).permutation(DEFECTIVE)
        given = [subset(splits[name].real, shuffled[:DRAWN]) for name in names]
        with_real = names[criterion.choose(criterion.compare(given), tune.REAL_MARGIN)]
        yield with_real, without, {name: auroc(splits[name], shuffled[DRAWN:]) for name in names}


@click.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--seeds", default=5, show_default=True)
@click.option("--first-seed", default=0, show_default=True)
@click.option("--draws", "count", default=10, show_default=True, help="Draws of defective images for each seed.")
@click.option("--embeddings", type=click.Path(file_okay=False, path_type=Path), help="Folder to keep embeddings in.")
def main(data: tuple[str, ...], seeds: int, first_seed: int, count: int, embeddings: Path | None) -> None:
    """Print what `tune` chooses, and what that gains or loses."""
    click.echo(heading())
    settings = list_settings(BASE)
    for name in data:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(name)
            if name in ("mono", "poly"):
                root = Path(folder)
                lay_out(root, name)
            images = draw(root)
            splits: list[dict[str, Split]] = [{} for _ in range(seeds)]
            for group in tune.group_settings(settings):
                embedder = Embedder(group.settings[0].arguments, sum(map(len, images.values())))
                file = "" if embeddings is None else str(embeddings / f"{Path(name).name}-{group.settings[0].name}")
                found = embed(images, embedder, file)
                for number, kept in enumerate(track(splits, "Score")):
                    rows = measure(found, group.rules(), first_seed + number)
                    kept.update(zip([setting.name for setting in group.settings], rows, strict=True))
        show(Path(name).name, splits, first_seed, count)


def show(data: str, splits: list[dict[str, Split]], first_seed: int, count: int) -> None:
    """Print one data set."""
    rows = [row for number, kept in enumerate(splits) for row in draws(kept, first_seed + number, count)]
    names = list(rows[0][2])
    mean = {name: np.mean([found[name] for *_, found in rows]) for name in names}
    best = max(names, key=mean.get)
    click.echo(f"\n{data}: AUROC of each setting, mean of all draws; on real and synthetic defects in cross-fit")
    for name in names:
        real, made = (
            np.mean([criterion.estimate(getattr(kept[name], part).wins()).value for kept in splits])
            for part in ("real", "synthetic")
        )
        click.echo(f"  {name:15s} {mean[name]:.4f} | {real:.4f} {made:.4f}")
    chosen = [[row[column] for row in rows] for column in (0, 1)]
    for title, choice in (("10 defective images", chosen[0]), ("what synthetic ones would choose", chosen[1])):
        got = np.mean([found[name] for name, (*_, found) in zip(choice, rows, strict=True)])
        counts = ", ".join(f"{name} {choice.count(name)}" for name in names if name in choice)
        click.echo(f"  {title}: {got:.4f}, {mean[best] - got:+.4f} below {best}; chosen: {counts}")


if __name__ == "__main__":
    main()
