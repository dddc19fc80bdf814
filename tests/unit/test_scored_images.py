"""Images that come again are not scored again, and every answer is that of the present model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcore_plugin.model import scored_images
from patchcore_plugin.model.scored_images import ScoredImages
from patchcore_plugin.model.torch_model import FaissPatchcoreModel
from patchcore_plugin.scoring.scores import Scores


@pytest.fixture(scope="module")
def model():
    model = FaissPatchcoreModel(["blocks.2"], "efficientnet_lite0", pre_trained=False)
    model.memory_bank = torch.rand(5, 40)
    return model


class Scorer:
    """Scores images by their mean, and counts them."""

    def __init__(self):
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        patch = images.mean(1)[:, ::2, ::2]
        return Scores(patch.amax((1, 2)), patch)


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), max_size=6))
def test_any_order(model, batches):
    """Each image is scored once, whatever batches it comes in."""
    every = torch.rand(7, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    known, scorer = ScoredImages(), Scorer()
    known.begin(model)
    for batch in batches:
        found, expected = known.score(every[batch], scorer), Scorer()(every[batch])
        torch.testing.assert_close(found.image, expected.image)
        torch.testing.assert_close(found.patch, expected.patch)
    assert scorer.images >= len({number for batch in batches for number in batch})
    again = scorer.images
    for batch in batches:
        known.score(every[batch], scorer)
    assert scorer.images == again


def test_another_model_scores_anew(model):
    images, known, scorer = torch.rand(2, 3, 4, 6), ScoredImages(), Scorer()
    known.score(images, scorer)
    known.score(images, scorer)  # no model is known yet
    assert scorer.images == 4
    known.begin(model)
    known.score(images, scorer)
    known.begin(model)
    known.score(images, scorer)
    assert scorer.images == 6
    model.memory_bank[0, 0] += 1
    known.begin(model)
    known.score(images, scorer)
    assert scorer.images == 8


def test_bounded_memory(model, monkeypatch):
    images, known, scorer = torch.rand(3, 3, 4, 6), ScoredImages(), Scorer()
    monkeypatch.setattr(scored_images, "_KEPT_BYTES_LIMIT", 2 * 2 * 3 * 4)  # two images of 2 x 3 patches
    known.begin(model)
    for _ in range(2):
        torch.testing.assert_close(known.score(images, scorer).image, Scorer()(images).image)
    assert scorer.images == 4
