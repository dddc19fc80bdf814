"""configs/reproduce_mvtec_ad.yaml on a made-up miniature of MVTec AD, with small networks of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from PIL import Image

from helpers.training import ROOT

CONFIG = ROOT / "configs" / "reproduce_mvtec_ad.yaml"
SIDE = 64
_SMALL = {
    "wide_resnet50_2.tv_in1k": "resnet10t",
    "wide_resnet50_2.tv2_in1k": "resnet10t",
    "wide_resnet50_2": "resnet10t",
    "wide_resnet101_2.tv_in1k": "resnet14t",
    "resnext101_32x8d.tv_in1k": "resnet10t",
    "densenet201.tv_in1k": "densenet121",
    550: 100,  # PaDiM's features: the small network has 448
    256: 72, 224: SIDE, 366: 110, 320: 96,  # pixels
}  # fmt: skip


def write_miniature(root: Path, categories: list[str], train: int = 24, test: int = 4) -> None:
    """Write categories in MVTec AD's layout: striped textures, and two kinds of defects with masks."""
    rng = np.random.default_rng(0)
    for number, category in enumerate(categories):
        for folder, count in {"train/good": train, "test/good": test, "test/spot": test, "test/cut": test}.items():
            kind = Path(folder).name
            (root / category / folder).mkdir(parents=True)
            if kind != "good":
                (root / category / "ground_truth" / kind).mkdir(parents=True)
            for image in range(count):
                stripes = 40 * np.sin(np.arange(SIDE) / (1.5 + number) + rng.uniform(0, 6))
                pixels = 120 + stripes[:, None] + rng.normal(scale=8, size=(SIDE, SIDE))
                mask = np.zeros((SIDE, SIDE), bool)
                top, left = rng.integers(12, 40, 2)
                if kind != "good":
                    mask[top : top + (10 if kind == "spot" else 2), left : left + 12] = True
                    Image.fromarray(mask).save(root / category / "ground_truth" / kind / f"{image:03}_mask.png")
                pixels = np.where(mask, 250, pixels).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).convert("RGB").save(root / category / folder / f"{image:03}.png")


def write_small_config(file: Path, categories: list[str], models: list[str]) -> None:
    """Write the config with small networks and images, and some categories and models; the rest is as it stands."""
    plan = _smaller(OmegaConf.to_container(OmegaConf.load(CONFIG)))  # unresolved: the path comes from MVTEC_AD
    plan["datasets"] = {name: plan["datasets"][name] for name in categories}
    plan["models"] = {name: plan["models"][name] for name in models}
    plan["baseline"] = models[0]
    for model in plan["models"].values():
        model["init_args"]["pre_trained"] = False
    file.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")


def _smaller(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _smaller(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_smaller(own) for own in value]
    return _SMALL.get(value, value) if isinstance(value, str | int) else value
