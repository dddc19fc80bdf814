"""The check of a folder of normal images."""

import io
import os
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.training import ROOT
from PIL import Image, ImageEnhance

from patchcore_plugin.cleaning import CheckReport, Finding, check_images, write_list, write_report
from patchcore_plugin.cleaning.embedding import DEFAULT_ARGUMENTS, Held
from patchcore_plugin.cleaning.evidence import SUSPICIOUS_SCORE, deviations, find_evidence
from patchcore_plugin.cleaning.files import find_copies, find_odd, read_facts
from patchcore_plugin.cli import main
from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.embedder import Embedder
from patchcore_plugin.model.exclusion import read_list


def draw(seed, size=(64, 48)):
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def embeddings():
    """Of 30 images, with 8 x 8 patches of 16 values, whose border is noisier than the rest."""
    values = np.random.default_rng(0).normal(size=(30, 8, 8, 16)).astype(np.float32)
    values[:, 0] *= 20
    return torch.from_numpy(values)


def test_defects_are_found_though_one_is_like_another(embeddings):
    """And though the border of every image is farther from the others than the defects are."""
    defect = 12 * torch.ones(16)
    embeddings[3, 4, 5:7] += defect
    embeddings[17, 2, 2] += defect
    embeddings[17, 2, 3] -= defect
    steps = []
    found = find_evidence(lambda: iter(embeddings), 30, progress=lambda *step: steps.append(step))
    assert set(np.argsort(-found.scores)[:2]) == {3, 17}
    assert set(np.flatnonzero(found.scores > SUSPICIOUS_SCORE)) >= {3, 17}
    assert found.patch[3] == found.maps[3].argmax() == 4 * 8 + 5
    assert ("compare", 30, 30) in steps


@pytest.mark.parametrize("compared", [1000, 7])
def test_likeness_is_the_nearest_patch_of_another_image(embeddings, monkeypatch, compared):
    """Though at first sight a patch is compared with few others."""
    monkeypatch.setattr("patchcore_plugin.cleaning.evidence.REFERENCE_LIMIT", 90)
    monkeypatch.setattr("patchcore_plugin.cleaning.evidence.COMPARED_IMAGES", compared)
    monkeypatch.setattr("patchcore_plugin.cleaning.evidence._QUERY_ROWS", 100)
    found = find_evidence(lambda: iter(embeddings), 30)
    rows = embeddings.reshape(30, 64, 16).double().numpy()
    among = set(found.like_image.tolist())
    assert len(among) <= compared
    for number, (patch, like_image, like_patch) in enumerate(
        zip(found.patch, found.like_image, found.like_patch, strict=True)
    ):
        assert like_image != number
        distances = np.linalg.norm(rows[list(among - {number})] - rows[number, patch], axis=2)
        like = np.linalg.norm(rows[like_image, like_patch] - rows[number, patch])
        assert np.isclose(like, distances.min())


def test_scores_by_a_slow_reference(embeddings):
    """All patches are screened, so that a score is what its definition says, in float64."""
    few = embeddings[:9, :3, :3]
    found = find_evidence(lambda: iter(few), 9)
    rows = few.reshape(9, 9, 16).double().numpy()
    second, rough = np.zeros((9, 9)), np.zeros((9, 9))
    for number, patch in np.ndindex(9, 9):
        nearest = np.linalg.norm(rows - rows[number, patch], axis=2).min(1)
        nearest = np.sort(np.delete(nearest, number))
        second[number, patch], rough[number, patch] = nearest[1], nearest[:2].mean()
    usual = np.median(rough, axis=0)
    usual = np.maximum(usual, 0.25 * np.median(usual))
    scores = np.sort(second / np.sqrt(usual), axis=1)[:, -3:].mean(1)
    above = scores - np.median(scores)
    assert np.allclose(found.scores, above * 0.6745 / np.median(np.abs(above)), atol=1e-3)


def test_large_sets_are_compared_with_few_patches(embeddings, monkeypatch):
    monkeypatch.setattr("patchcore_plugin.cleaning.evidence.REFERENCE_LIMIT", 90)
    embeddings[3, 4, 5] += 50
    assert find_evidence(lambda: iter(embeddings), 30).scores.argmax() == 3


@pytest.mark.parametrize(("budget", "computed"), [(None, [0]), (2 * 8 * 8 * 16 * 4, [0, 2, 2, 2]), (0, [0, 0, 0, 0])])
def test_embeddings_are_held_as_memory_allows(embeddings, budget, computed):
    starts = []

    def stream(start):
        starts.append(start)
        yield from embeddings[start:]

    held = Held(stream, budget)
    for _ in range(4):
        assert torch.equal(torch.stack(list(held())), embeddings)
    assert [start for start in starts if start < 30] == computed


def test_an_image_embedded_again_is_the_same_to_the_bit(tmp_path):
    """Whatever images come with it: of the last few alone, another engine would differ in the last digits."""
    paths = [tmp_path / f"{number}.png" for number in range(66)]
    for number, path in enumerate(paths):
        draw(number).save(path)
    embedder = Embedder({**DEFAULT_ARGUMENTS, "image_size": (32, 32)}, len(paths))
    first, again = (list(embedder.stream(paths, start=start)) for start in (0, 63))
    for one, other in zip(first[63:], again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_images_without_a_difference():
    assert not deviations(np.ones((5, 4, 4), np.float32)).any()
    assert find_evidence(lambda: iter(torch.zeros(2, 3, 3, 4)), 2).scores.tolist() == [0, 0]


def test_one_image_cannot_be_compared():
    with pytest.raises(ValueError, match="at least 2"):
        find_evidence(lambda: iter(torch.zeros(1, 3, 3, 4)), 1)


@pytest.fixture
def pictures(tmp_path):
    """A folder with twelve pictures, a copy of the first of every kind, and what is no copy."""
    for seed in range(12):
        draw(seed).save(tmp_path / f"a{seed:02}.png")
    first = draw(0)
    shutil.copy(tmp_path / "a00.png", tmp_path / "b_file.png")
    first.save(tmp_path / "b_pixels.bmp")
    first.convert("RGB").save(tmp_path / "b_jpeg.jpg", quality=85)
    ImageEnhance.Brightness(first).enhance(0.8).save(tmp_path / "b_dark.png")
    first.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c_mirrored.png")
    return tmp_path


def test_copies(pictures):
    facts = [read_facts(path) for path in sorted(pictures.iterdir())]
    names = [image.path.stem for image in facts]
    found = {names[number]: (names[like], words) for number, (like, words) in find_copies(facts).items()}
    assert found == {
        "b_file": ("a00", "the same file"),
        "b_pixels": ("a00", "the same pixels"),
        "b_jpeg": ("a00", "nearly the same picture"),
        "b_dark": ("a00", "nearly the same picture"),
    }
    assert set(find_copies(facts[:12], facts[12:])) == {0}
    assert find_copies([]) == find_copies(facts[:1]) == find_copies(facts[:1], []) == {}


def test_parts_that_look_alike_are_no_copies(tmp_path):
    """A fixed picture with a little noise of its own."""
    for seed in range(12):
        pixels = np.asarray(draw(0), np.float32) + np.random.default_rng(seed).normal(0, 9, (48, 64))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{seed}.png")
    assert find_copies([read_facts(path) for path in sorted(tmp_path.iterdir())]) == {}


def test_odd_values():
    assert find_odd([1] * 9 + [2]) == ({9}, 1)
    assert find_odd([1] * 8 + [2] * 2) == (set(), None)
    assert find_odd([]) == (set(), None)


def test_facts_of_deep_and_damaged_files(tmp_path):
    Image.fromarray(np.arange(300, 900, dtype=np.uint16).reshape(20, 30)).save(tmp_path / "deep.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "deep.png").read_bytes()[:-30])
    deep, damaged = read_facts(tmp_path / "deep.png"), read_facts(tmp_path / "damaged.png")
    assert (deep.kind, deep.values, deep.size) == ("gray, 16 bits", (300, 899), (20, 30))
    assert damaged.error
    assert read_facts(tmp_path / "absent.png").error


def test_list_is_read_as_it_was_written(tmp_path):
    names = ["a b.png", "ü.png", " c.png", "d\u2028.png", *(["e\udce9.png"] if os.name != "nt" else [])]
    file = tmp_path / "list.txt"
    assert write_list([tmp_path / name for name in [*names, "f\ng.png"]], file) == [tmp_path / "f\ng.png"]
    assert list(read_list(file).values()) == [str(tmp_path / name) for name in names]


def test_list_of_relative_paths(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbfgood/a.png\r\n\r\n")
    assert read_list(file) == {os.path.normcase(os.path.realpath(tmp_path / "good/a.png")): "good/a.png"}


def test_list_that_is_none(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.txt cannot be read"):
        read_list(tmp_path / "absent.txt")
    draw(0).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="null bytes"):
        read_list(tmp_path / "a.png")


def test_page_escapes_names_and_needs_no_other_file(tmp_path):
    image = tmp_path / "<script>alert(1)</script>\x1b.png"
    report = CheckReport([image], [Finding(image, "unreadable", "<b>no</b>")], [], [], [], 0, None)
    write_report(report, tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>no" not in page
    assert "&lt;script&gt;" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)


def check(*arguments):
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


@pytest.fixture
def cells(elpv, tmp_path):
    """Twelve normal cells."""
    folder = tmp_path / "good"
    folder.mkdir()
    for path in sorted((elpv / "train/good").iterdir())[:36:3]:
        shutil.copy(path, folder)
    return folder


def test_command(cells, tmp_path):
    first, second, third = sorted(cells.iterdir())[5:8]
    (cells / "broken.png").write_bytes(b"no image")
    shutil.copy(first, cells / "z<&>.png")
    scratched = np.array(Image.open(second))
    scratched[60:110, 60:110] = np.random.default_rng(0).integers(0, 256, (50, 50))
    Image.fromarray(scratched).save(second)
    Image.open(first).convert("RGB").resize((200, 200)).rotate(180).save(cells / "z_odd.png")
    test = tmp_path / "test"
    test.mkdir()
    Image.open(third).save(test / "other_name.bmp")
    result = check(cells, "--test", test, "-o", tmp_path / "out")
    assert result.exit_code == 3, result.output
    assert re.search(r"13 were compared", result.output), result.output
    listed = (tmp_path / "out/leave_out.txt").read_text(encoding="utf-8").splitlines()
    assert {str(cells / "broken.png"), str(cells / "z<&>.png"), str(second), str(third)} <= set(listed)
    assert str(first) not in listed
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert page.index(f'<h3 class="name">1. {second.name}') < page.index('<h3 class="name">2.')
    assert page.count("nearest likeness: ") == 13
    assert "200 x 200 pixels, not 300 x 300" in page
    assert "color, 8 bits, not gray, 8 bits" in page
    assert "z&lt;&amp;&gt;.png" in page


STAMPED = "[{rectangle: [0, 0, 0.25, 0.25], ignore: true}]"


@pytest.fixture
def stamped(cells):
    """The cells, one of them with a mark in a corner and one with a scratch elsewhere; their paths."""
    mark, scratch = sorted(cells.iterdir())[3:5]
    for path, part in ((mark, slice(10, 60)), (scratch, slice(150, 200))):
        pixels = np.array(Image.open(path))
        pixels[part, part] = np.random.default_rng(0).integers(0, 256, (50, 50))
        Image.fromarray(pixels).save(path)
    return mark, scratch


def test_region_of_interest(cells, stamped, tmp_path):
    """By shapes, by a mask image and by a config, to the same end: what lies outside accuses nobody."""
    Image.fromarray(np.where(np.indices((300, 300)).max(0) < 75, 0, 255).astype(np.uint8)).save(tmp_path / "mask.png")
    config = {"model": {"class_path": "patchcore_plugin.FaissPatchcore", "init_args": {**DEFAULT_ARGUMENTS}}}
    config["model"]["init_args"] |= {"region_of_interest": str(tmp_path / "mask.png"), "tile_size": 256, "ensemble": None}
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    listed = []
    for arguments in (
        [],
        ["--region-of-interest", STAMPED],
        ["--region-of-interest", tmp_path / "mask.png"],
        ["--config", tmp_path / "part.yaml"],
    ):
        result = check(cells, *arguments, "-o", tmp_path / "out")
        assert result.exit_code == 3, result.output
        listed.append((tmp_path / "out/leave_out.txt").read_text(encoding="utf-8").splitlines())
        page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
        assert ("outside the region of interest" in page) == bool(arguments)
    mark, scratch = map(str, stamped)
    assert mark in listed[0]
    assert scratch in listed[0]
    for found in listed[1:]:
        assert mark not in found
        assert scratch in found
    assert listed[1] == listed[2] == listed[3]


def test_marks_outside_the_region_change_no_score(cells, stamped):
    arguments = {**DEFAULT_ARGUMENTS, "region_of_interest": yaml.safe_load(STAMPED)}
    images = sorted(cells.iterdir())
    first = check_images(images, arguments=arguments)
    pixels = np.array(Image.open(stamped[0]))
    pixels[:60, :60] = 255 - pixels[:60, :60]
    Image.fromarray(pixels).save(stamped[0])
    again = check_images(images, arguments=arguments)
    assert (first.ranked, first.scores) == (again.ranked, again.scores)
    inspected = first.region.at((32, 32))
    for suspect in first.suspects:
        assert inspected[suspect.place]
        assert inspected[suspect.like_place]
        assert not suspect.map[~inspected].any()
        assert suspect.map[inspected].any()


def test_image_that_does_not_fit_the_mask(cells, tmp_path):
    """A training would refuse it: it is listed, and not compared."""
    Image.new("L", (300, 300), 255).save(tmp_path / "mask.png")
    Image.open(next(iter(cells.iterdir()))).resize((300, 200)).save(cells / "z_flat.png")
    result = check(cells, "--region-of-interest", tmp_path / "mask.png", "-o", tmp_path / "out")
    assert "unlike the mask: 1" in result.output
    assert "12 were compared" in result.output
    assert str(cells / "z_flat.png") in (tmp_path / "out/leave_out.txt").read_text(encoding="utf-8")
    assert "300 x 200 pixels, the mask has 300 x 300" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ("absent.png", "absent.png"),
        ("[{rectangle: [0, 0, 2, 1]}]", "from 0 to 1"),
        ("[{rectangle: [0, 0", "cannot be read as YAML"),
        ("[{rectangle: [0, 0, 1, 1], ignore: true}]", "leaves nothing to inspect"),
        ("[{rectangle: [0, 0, 0.01, 0.01]}]", "the center of no patch"),
    ],
)
def test_wrong_regions(cells, tmp_path, region, message):
    result = check(cells, "--region-of-interest", region, "-o", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert message in result.output


def test_nothing_is_found(cells, tmp_path):
    for path in sorted(cells.iterdir())[4:]:
        path.unlink()
    result = check(cells, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Too few images" in result.output
    assert (tmp_path / "out/leave_out.txt").read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "no folder absent"),
        ([ROOT / "configs", "--test", "absent"], "no folder absent"),
        ([ROOT / "configs", "--backbone", "resnet_x"], "resnet_x"),
        ([ROOT / "configs", "--layers", "blocks.77"], "blocks.77"),
        ([ROOT / "configs", "--image-size", "100000", "5"], "image_size"),
        ([ROOT / "tests/unit"], "holds no image"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    result = check(*arguments, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert message in result.output


def test_deep_images(tmp_path):
    """Of twelve bits; one of eight bits is odd, and not compared."""
    for seed in range(11):
        Image.fromarray(np.asarray(draw(seed), np.uint16) * 16).save(tmp_path / f"{seed}.png")
    draw(20).save(tmp_path / "z.png")
    result = check(tmp_path, "-o", tmp_path / "out", "--image-size", "64", "64")
    assert result.exit_code == 3
    assert "11 were compared" in result.output
    assert "gray, 8 bits, not gray, 16 bits" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_copies_of_one_empty_deep_image(tmp_path):
    for number in range(12):
        Image.fromarray(np.full((30, 40), 700, np.uint16)).save(tmp_path / f"{number}.png")
    result = check(tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert "copy: 11" in result.output


def test_jpeg_in_memory_is_near(tmp_path):
    """A picture saved anew at a low quality and half the size is near, whatever its brightness."""
    content = io.BytesIO()
    big = draw(5, (320, 240))
    big.save(tmp_path / "a.png")
    ImageEnhance.Brightness(big).enhance(0.7).resize((160, 120)).save(content, "JPEG", quality=50)
    (tmp_path / "b.jpg").write_bytes(content.getvalue())
    for seed in range(10, 20):
        draw(seed, (320, 240)).save(tmp_path / f"c{seed}.png")
    assert set(find_copies([read_facts(path) for path in sorted(tmp_path.iterdir())])) == {1}
