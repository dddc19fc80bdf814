"""The position of a patch as part of its embedding, in models of version 0.1."""

import numpy as np
import torch
from anomalib.data.utils.tiler import Tiler

from patchcore_plugin.model.torch_model import FaissPatchcoreModel


def model_with(position_weight: float) -> FaissPatchcoreModel:
    model = FaissPatchcoreModel(layers=["blocks.2", "blocks.4"], backbone="efficientnet_lite0")
    model.position_weight = position_weight
    return model.eval()


def test_positions_join_the_features():
    plain, placed = model_with(0), model_with(12)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    embedding = placed.embed(images)
    assert torch.equal(embedding[..., :152], plain.embed(images))
    for image in range(2):
        for row in range(8):
            for column in range(12):
                expected = [12 * (row + 0.5) / 8, 12 * (column + 0.5) / 12]
                np.testing.assert_allclose(embedding[image, row, column, 152:], expected, rtol=1e-6)


def test_positions_are_of_the_whole_image_with_tiles():
    placed = model_with(12)
    placed.tiler = Tiler(tile_size=(32, 32), stride=(32, 32))
    embedding = placed.embed(torch.rand(1, 3, 64, 96))
    assert embedding.shape == (1, 8, 12, 154)
    np.testing.assert_allclose(embedding[0, :, 0, 152], 12 * (np.arange(8) + 0.5) / 8, rtol=1e-6)


def test_a_normal_patch_in_the_wrong_position_is_anomalous():
    """The left half's texture on the right: features alone find nothing."""
    generator = torch.Generator().manual_seed(1)
    image = torch.zeros(1, 3, 64, 64)
    image[..., :32] = torch.rand(1, 3, 64, 32, generator=generator)
    swapped = image.flip(3)
    scores = {}
    for weight in (0, 100):
        model = model_with(weight)
        model.memory_bank = torch.cat([model.embed(image), model.embed(image.flip(2))]).reshape(-1, 152 + 2 * bool(weight))
        normal, wrong = (float(model(picture).pred_score) for picture in (image, swapped))
        scores[weight] = wrong - normal
    assert scores[100] > scores[0] + 10
