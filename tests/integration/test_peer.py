"""Same numbers as the peer: anomalib's Patchcore, given the same features and the same bank, on real images."""

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.models.image.patchcore.torch_model import PatchcoreModel

from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.scoring import ScoreRule


@pytest.fixture(scope="module")
def compared(trained, test_images):
    ours = trained.model.model
    peer = PatchcoreModel(layers=["layer2"], backbone="resnet18", pre_trained=False, num_neighbors=9).eval()
    peer.memory_bank = ours.memory_bank
    images = torch.stack([read_image(path, as_tensor=True) for path in test_images[::5]])
    with torch.no_grad():
        embedding = ours.embed(trained.model.pre_processor.transform(images))
        flat = embedding.reshape(-1, 152)
        distances, locations = peer.nearest_neighbors(flat, n_neighbors=1)
        per_image = distances.reshape(len(images), -1), locations.reshape(len(images), -1)
        scores = peer.compute_anomaly_score(*per_image, flat)
        maps = peer.anomaly_map_generator(distances.reshape(-1, 1, 32, 32), (256, 256))
    return ours, embedding, per_image[0].reshape(-1, 32, 32).numpy(), scores.numpy(), maps[:, 0].numpy()


def test_patch_distances(compared):
    ours, embedding, distances, _, _ = compared
    bank = MemoryBank(ours.memory_bank.numpy())
    np.testing.assert_allclose(bank.score(embedding.numpy(), ScoreRule(9)).patch, distances, rtol=1e-4)


def test_image_scores(compared):
    ours, embedding, _, scores, _ = compared
    np.testing.assert_allclose(ours.score(embedding, (256, 256)).pred_score, scores, rtol=1e-4)


def test_maps(compared):
    ours, embedding, _, _, maps = compared
    with torch.no_grad():
        result = ours.score(embedding, (256, 256), upsampling="nearest")
    np.testing.assert_allclose(result.anomaly_map[:, 0], maps, rtol=1e-4)


def test_single_neighbor(compared):
    """num_neighbors=1 turns the re-weighting off, in both."""
    ours, embedding, distances, _, _ = compared
    bank = MemoryBank(ours.memory_bank.numpy())
    np.testing.assert_allclose(bank.score(embedding.numpy(), ScoreRule(1)).image, distances.max((1, 2)), rtol=1e-4)


def test_embedding(trained, test_images):
    """Pooling, upsampling and concatenation of the same features."""
    ours = trained.model.model
    peer = PatchcoreModel(layers=["layer2"], backbone="resnet18", pre_trained=False).eval()
    peer.layers = list(ours.layers)
    image = trained.model.pre_processor.transform(read_image(test_images[0], as_tensor=True)[None])
    with torch.no_grad():
        features = dict(zip(ours.layers, ours.feature_extractor(image), strict=True))
        expected = peer.generate_embedding({name: peer.feature_pooler(value) for name, value in features.items()})
        torch.testing.assert_close(ours.embed(image), expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
