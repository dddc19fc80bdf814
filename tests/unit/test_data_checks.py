"""Files that a training would stop at, named before it begins."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from helpers.training import folder_datamodule, make_engine, make_model
from PIL import Image


@pytest.fixture
def part(tmp_path):
    for folder in ("train/good", "test/good", "test/defective", "masks"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    return tmp_path


def refusal(root, **arguments) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        make_engine(root / "results").fit(make_model(), datamodule=folder_datamodule(root, **arguments))
    return str(error.value)


@pytest.mark.parametrize("folder", ["train/good", "test/defective", "masks"])
def test_damaged_file(part, folder):
    path = part / folder / "1.png"
    path.write_bytes(path.read_bytes()[:-600])
    assert f"{path} cannot be read as an image" in refusal(part, mask_dir="masks")


def test_truncated_jpeg(part):
    path = part / "test/good" / "2.jpg"
    Image.effect_noise((64, 64), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-600])
    assert f"{path} cannot be read as an image" in refusal(part)


def test_missing_mask(part):
    (part / "masks" / "1.png").unlink()
    message = refusal(part, mask_dir="masks")
    assert "masks in mask_dir" in message
    assert "leave mask_dir out" in message


def test_missing_folder_of_defective_images(part):
    shutil.rmtree(part / "test/defective")
    message = refusal(part)
    assert f"There is no folder {part / 'test/defective'}, which abnormal_dir names" in message
    assert "take configs/normal_only.yaml" in message


def test_masks_of_other_names(part):
    (part / "masks" / "1.png").rename(part / "masks" / "7.png")
    assert "one mask of the same name" in refusal(part, mask_dir="masks")


def test_error_of_another_kind(part):
    """It is neither the masks' fault nor a link's."""
    if os.name != "nt":
        (part / "masks" / "unused").symlink_to("nowhere")
    message = refusal(part, mask_dir="masks", val_split_mode="from_train", val_split_ratio=3.0)
    assert "split ratios must be between 0 and 1" in message
    assert "mask" not in message
    assert "link" not in message


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_link_to_nothing(part):
    (part / "train/good/9.png").symlink_to("nowhere.png")
    assert "9.png is a link to a file that is not there" in refusal(part)


def test_letters_outside_ascii(part):
    root = part / "Gehäuse"
    shutil.copytree(part / "train", root / "train")
    shutil.copytree(part / "test", root / "test")
    message = refusal(root)
    assert "Gehäuse" in message
    assert "rename the folder" in message


def test_mask_of_another_size(part):
    Image.new("L", (32, 64)).save(part / "masks" / "1.png")
    message = refusal(part, mask_dir="masks")
    assert "masks/1.png has 32 x 64 pixels" in message
    assert "64 x 64" in message


def test_no_validation_set(part):
    assert "set val_split_mode to from_test" in refusal(part, val_split_mode="none")
