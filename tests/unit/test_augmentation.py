"""Changed copies of images: what they show, which patch of the original each of their patches is, and wrong names."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from helpers.training import make_model
from torchvision.transforms.v2 import functional as TF

from patchcore_plugin.model.augmentation import AUGMENTATIONS, Change, PixelScale, changes_of
from patchcore_plugin.model.collector import _Grid, _image_numbers
from patchcore_plugin.model.pre_processing import build_pre_processor

PIXELS = PixelScale(torch.zeros(1), torch.ones(1))


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """A picture (1, 3, 96, 160) without any symmetry, float32, in [0, 1]: stripes that fade to the right and the bottom."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 160), indexing="ij")
    return torch.stack([rows, columns, (rows * columns * 20).sin() / 2 + 0.5])[None]


def test_flips_and_quarter_turns(picture):
    shown = [change.apply(picture, PIXELS) for change in changes_of(["mirror", "flip", "half_turn", "quarter_turns"])]
    expected = [
        TF.hflip(picture), TF.vflip(picture), TF.rotate(picture, 180),
        TF.rotate(picture, 90, expand=True), TF.rotate(picture, 270, expand=True),
    ]  # fmt: skip
    for one, other in zip(shown, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("change", AUGMENTATIONS["small_turns"])
def test_small_turns(picture, change):
    """As torchvision turns, away from the border; there the image is reflected, and nothing is black."""
    turned = change.apply(picture, PIXELS)
    expected = TF.rotate(picture, change.degrees, TF.InterpolationMode.BILINEAR)
    torch.testing.assert_close(turned[..., 16:-16, 16:-16], expected[..., 16:-16, 16:-16], atol=1e-3, rtol=0)
    assert turned[:, 1, :, -8:].min() > 0.9
    assert Change(degrees=90).apply(picture[..., :96], PIXELS) == pytest.approx(
        Change(quarters=1).apply(picture[..., :96], PIXELS), abs=1e-4
    )
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(change.apply(picture, PIXELS), turned)
    assert change.apply(picture.bfloat16(), PIXELS).dtype == torch.bfloat16


def test_brightness_is_that_of_pixels(picture):
    transform = build_pre_processor((96, 160)).transform
    for change in AUGMENTATIONS["brightness"]:
        expected = transform((picture * change.brightness).clamp(0, 1))
        torch.testing.assert_close(change.apply(transform(picture), PixelScale.of(transform)), expected)
        torch.testing.assert_close(change.apply(picture, PixelScale.of(None)), (picture * change.brightness).clamp(0, 1))


@pytest.mark.parametrize("change", changes_of(list(AUGMENTATIONS)))
@pytest.mark.parametrize("grid", [(12, 20), (20, 12), (7, 7), (1, 5)])
def test_origins_are_where_the_pixels_came_from(change, grid):
    """Each pixel of a picture, 8 x 8 for a patch, has its row and its column as its values."""
    rows, columns = torch.meshgrid(torch.arange(8.0 * grid[0]), torch.arange(8.0 * grid[1]), indexing="ij")
    change = replace(change, brightness=1)
    moved = torch.cat([change.apply(values[None, None], PIXELS) for values in (rows, columns)], 1)
    middles = torch.nn.functional.avg_pool2d(moved, 8)[0]
    found = change.origins(*grid)
    assert found.dtype == torch.int64
    assert 0 <= found.min() <= found.max() < grid[0] * grid[1]
    places = torch.stack([found // grid[1], found % grid[1]]) * 8 + 3.5
    assert (places - middles.flatten(1)).abs().max() < (8 if change.degrees else 1e-3)
    if not change.degrees:
        assert sorted(found.tolist()) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mirror", "rotate"], "augmentations has 'rotate', which is none of mirror, flip, half_turn, quarter_turns, "),
        (["flip", "mirror", "flip"], "augmentations has 'flip' twice"),
        ("mirror", r"must be a list of names among mirror, .*e\.g\. \[mirror, flip\], got 'mirror'"),
        (3, "must be a list of names among .* got 3"),
        (True, "must be a list of names among .* got True"),
        ({"mirror": 1}, "must be a list of names among .* got {'mirror': 1}"),
        ([["mirror"]], r"augmentations has \['mirror'\], which is none of"),
        ([None], "augmentations has None, which is none of"),
        ([float("nan")], "augmentations has nan, which is none of"),
        (["mirror"] * 10**6, "augmentations has 'mirror' twice"),
        (["x" * 10**6], "augmentations has 'xxxxx.{0,50}, which is none of"),
    ],
)
def test_wrong_names(names, message):
    with pytest.raises(ValueError, match=message):
        make_model(augmentations=names)


def test_names_become_hyper_parameters():
    from omegaconf import ListConfig

    assert make_model().hparams["augmentations"] == make_model(augmentations=[]).hparams["augmentations"] == []
    for names in (["mirror", "flip"], ("mirror", "flip"), ListConfig(["mirror", "flip"])):
        assert type(make_model(augmentations=names).hparams["augmentations"]) is list
        assert make_model(augmentations=names).hparams["augmentations"] == ["mirror", "flip"]


def test_embeddings_of_copies(cells):
    """Each is like that of the patch that it is said to be, and less like another one."""
    model = make_model()
    image = model.pre_processor.transform(read_image(next((cells / "train/good").iterdir()), as_tensor=True)[None])
    scale = PixelScale.of(model.pre_processor.transform)
    plain = model.model.embed(image).reshape(-1, 152)
    for change in changes_of(list(AUGMENTATIONS)):
        copy = model.model.embed(change.apply(image, scale)).reshape(-1, 152)
        distances = (copy - plain[change.origins(32, 32)]).norm(dim=1).median()
        rng = np.random.default_rng(0)
        others = (copy - plain[torch.from_numpy(rng.permutation(1024))]).norm(dim=1).median()
        assert distances < 0.95 * others, change


def test_copies_are_no_other_images():
    """Of outlier rejection, that is: else a defect's mirror images would be its likes."""
    mirror, turn = changes_of(["mirror"])[0], changes_of(["quarter_turns"])[0]
    images = [_Grid("a", 2, 3), _Grid("b", 2, 3)]
    copies = [grid._replace(change=change, back=back) for change, back in ((mirror, 2), (turn, 4)) for grid in images]
    numbers = torch.arange(36)
    expected = (torch.arange(36) // 6) % 2
    assert torch.equal(_image_numbers([*images, *copies], numbers.device)(numbers), expected)
    nameless = [grid._replace(path="") for grid in (*images, *copies)]
    assert torch.equal(_image_numbers(nameless, numbers.device)(numbers), expected)
