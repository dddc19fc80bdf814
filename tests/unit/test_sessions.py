"""Recording sessions: which image is of which, which are held back, and when training says that there is only one."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from helpers.training import folder_datamodule
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from patchcore_plugin import ConformalPostProcessor
from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.sessions import choose_sessions, hold_back_sessions, session_of, warn_of_one_session
from patchcore_plugin.scoring.conformal import images_needed

ONLY_NORMAL = {"normal_dir": "good", "normal_test_dir": None, "abnormal_dir": None, "val_split_mode": "from_train",
               "test_split_mode": "none"}  # fmt: skip


def write_images(folder, names, time=None):
    """Small images of these names, with the camera's time if one is given."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        if time is not None:
            exif[ExifTags.IFD.Exif] = {ExifTags.Base.DateTimeOriginal: time}
        Image.new("L", (8, 8)).save(path, exif=exif)


def trainer_of(root, **arguments):
    datamodule = folder_datamodule(root, **{**ONLY_NORMAL, "seed": 0, **arguments})
    datamodule.setup()
    return SimpleNamespace(datamodule=datamodule, is_global_zero=True)


def sessions_of(dataset):
    return {session_of(path, "folder").rpartition("/")[2] for path in dataset.samples["image_path"]}


@pytest.mark.parametrize(
    ("path", "groups", "session"),
    [
        ("good/day1/a.png", "folder", "good/day1"),
        ("good/day1/a.png", r"/(day\d+)/", "day1"),
        ("good/s07_0001.png", r"/(s\d+)_", "s07"),
    ],
)
def test_session_of_an_image(path, groups, session):
    assert session_of(path, groups) == session


@pytest.mark.parametrize("groups", ["day", "(", "", 3, ["folder"]])
def test_wrong_groups(groups):
    with pytest.raises(UsageError, match="groups must be 'folder', or a regular expression whose first capture group"):
        ConformalPostProcessor(0.1, groups)


def test_image_without_a_session():
    for path, groups in (("good/a.png", r"/(day\d+)"), ("good/a.png", "(x?)a")):
        with pytest.raises(UsageError, match=r"finds no session in the path good/a\.png"):
            session_of(path, groups)
    with pytest.raises(UsageError, match="the validation's images have none"):
        session_of((0, 1), "folder")


@given(
    counts=st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.integers(1, 60), min_size=2, max_size=9),
    share=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    seed=st.integers(0, 3),
)
def test_sessions_to_hold_back(counts, share, seed):
    """Some, not all, each with enough images; the same for the same seed, in whatever order they are found."""
    needed = images_needed(0.1)
    if max(counts.values()) < needed:
        with pytest.raises(UsageError, match=f"at least {needed} normal images of each session"):
            choose_sessions(counts, share, 0.1, seed)
        return
    held = choose_sessions(counts, share, 0.1, seed)
    assert 0 < len(held) < len(counts)
    assert all(counts[name] >= needed for name in held)
    assert held == choose_sessions(dict(reversed(counts.items())), share, 0.1, seed)
    wanted, total = share * sum(counts.values()), sum(counts[name] for name in held)
    smallest = min(count for count in counts.values() if count >= needed)
    assert abs(total - wanted) <= max(wanted, smallest)


def test_share_and_draw():
    """Of ten equal sessions three are held back for a share of 0.3, others for another seed."""
    counts = {f"day{number}": 20 for number in range(10)}
    draws = [tuple(choose_sessions(counts, 0.3, 0.1, seed)) for seed in range(8)]
    assert {len(held) for held in draws} == {3}
    assert len(set(draws)) > 4


def test_whole_sessions_are_held_back(tmp_path, caplog):
    write_images(tmp_path, [f"good/day{day}/{number}.png" for day in range(4) for number in range(6)])
    trainer = trainer_of(tmp_path, val_split_ratio=0.5)
    data = trainer.datamodule
    assert sessions_of(data.train_data) & sessions_of(data.val_data), "anomalib draws single images"
    augmentations = data.val_augmentations = data.val_data.augmentations = torch.nn.Identity()
    with caplog.at_level("INFO"):
        hold_back_sessions(trainer, "folder", 0.2)
    learned, held = sessions_of(data.train_data), sessions_of(data.val_data)
    assert (len(learned), len(held), len(learned | held)) == (2, 2, 4)
    assert (len(data.train_data), len(data.val_data)) == (12, 12)
    assert data.val_data.augmentations is augmentations
    assert data.train_data.task == data.val_data.task == "classification"
    assert f"held back for the thresholds: {', '.join(sorted(held))} (12 normal images)" in caplog.text
    assert "in at least 2 of 3 new sessions, at most 20 % of the normal images" in caplog.text
    hold_back_sessions(trainer, "folder", 0.2)
    assert sessions_of(data.val_data) == held, "a second training with the same data holds the same sessions back"
    with pytest.raises(UsageError, match=r"at least 9 normal images of each session .* has 6"):
        hold_back_sessions(trainer, "folder", 0.1)
    with pytest.raises(UsageError, match=r"fewer than two sessions \(good\)"):
        hold_back_sessions(trainer, "/(good)/", 0.2)


def test_what_cannot_be_divided(tmp_path):
    """Loaders instead of a data module, and a session on both sides of another split; other sessions are welcome."""
    with pytest.raises(UsageError, match="needs a data module of anomalib"):
        hold_back_sessions(SimpleNamespace(datamodule=None), "folder", 0.2)
    write_images(tmp_path, [f"{folder}/{number}.png" for folder in ("good", "test") for number in range(6)])
    unchecked = trainer_of(tmp_path, val_split_mode="none")
    with pytest.raises(UsageError, match="with a validation set"):
        hold_back_sessions(unchecked, "folder", 0.2)
    write_images(tmp_path, ["bad/x.png"])
    tested = {"val_split_mode": "same_as_test", "test_split_mode": "from_dir", "normal_test_dir": "test"}
    trainer = trainer_of(tmp_path, **tested, abnormal_dir="bad")
    hold_back_sessions(trainer, "folder", 0.2)  # good/ and test/ are two sessions
    with pytest.raises(UsageError, match="Session png has images in training and in validation"):
        hold_back_sessions(trainer, "(png)", 0.2)


@pytest.mark.parametrize(
    ("names", "times", "said"),
    [
        (["good/a.png", "good/b.png"], [None, None], "or copied together. If they are of one"),
        (["good/a.png", "good/b.png"], ["2024:05:01 08:00:00", "2024:05:01 12:00:00"], "seem to be of one recording"),
        (["good/a.png", "good/b.png"], ["2024:05:01 08:00:00", "2024:05:03 12:00:00"], None),
        (["good/a.png", "good/b.png"], ["yesterday", "2024:05:03 12:00:00"], "or copied together"),
        (["good/a/a.png", "good/b/b.png"], [None, None], None),
    ],
)  # fmt: skip
def test_one_session(tmp_path, caplog, names, times, said):
    """One folder and the camera's times within half a day; the files' times, which a copy may have made, say less."""
    for name, time in zip(names, times, strict=True):
        write_images(tmp_path, [name], time)
    trainer = trainer_of(tmp_path)
    warn_of_one_session(trainer)
    assert said in caplog.text if said else not caplog.text
    caplog.clear()
    os.utime(tmp_path / names[0], (1e9, 1e9))
    warn_of_one_session(trainer)
    assert bool(caplog.text) == (said is not None and "copied" not in said)
    warn_of_one_session(SimpleNamespace(datamodule=None))


def test_calibration_by_image_name():
    """However processes share and repeat the images, sessions are those of the names."""
    rng, trainer = np.random.default_rng(0), SimpleNamespace(world_size=1, global_rank=0)
    names = [f"day{number % 3}/{number}.png" for number in range(18)]
    values = torch.from_numpy(rng.random((18, 2), dtype=np.float32))

    def calibrate(order, groups="folder"):
        post = ConformalPostProcessor(0.2, groups)
        for chosen in np.array_split(order, 4):
            post.on_validation_batch_end(trainer, None, ImageBatch(
                image=torch.zeros(len(chosen), 3, 8, 8), pred_score=values[chosen, 0],
                anomaly_map=values[chosen, 1].reshape(-1, 1, 1, 1), image_path=[names[number] for number in chosen],
            ))  # fmt: skip
        post.on_validation_epoch_end(trainer, None)
        return post

    one, other = calibrate(np.arange(18)), calibrate([*rng.permutation(18), 3, 5])
    assert torch.equal(one.calibration, other.calibration)
    record = one.record()
    assert dict(zip(record.scores, record.sessions.scores, strict=True)) == {
        float(values[number, 0]): number % 3 for number in range(18)
    }
    assert dict(zip(record.peaks, record.sessions.peaks, strict=True)) == {
        float(values[number, 1]): number % 3 for number in range(18)
    }
    assert float(one.image_threshold) == max(float(values[number::3, 0].max()) for number in range(3))
    plain = calibrate(np.arange(18), None)
    assert plain.calibration.shape == (18, 3)
    assert plain.record().sessions is None
    plain.load_state_dict(one.state_dict())
    assert torch.equal(plain.calibration, one.calibration)
    with pytest.raises(UsageError, match=r"session day0/0 has 1\. "):
        calibrate(np.arange(18), r"(.*)\.png")
