"""Arguments of FaissPatchcore that are wrong are refused before anything is built, with a way out."""

import pytest
from helpers.training import make_model

from patchcore_plugin import FaissPatchcore


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coreset_sampling_ratio": 0}, r"coreset_sampling_ratio must be a number in \(0, 1\], got 0\. 0\.1 keeps every"),
        ({"coreset_sampling_ratio": 1.01}, r"coreset_sampling_ratio must be a number in \(0, 1\], got 1\.01"),
        ({"coreset_sampling_ratio": -1}, r"coreset_sampling_ratio must be a number in \(0, 1\], got -1"),
        ({"coreset_sampling_ratio": "a tenth"}, r"coreset_sampling_ratio must be a number in \(0, 1\], got 'a tenth'"),
        ({"coreset_sampling_ratio": None}, r"coreset_sampling_ratio must be a number in \(0, 1\], got None"),
        ({"coreset_radius": -1}, "coreset_radius must be None or a finite number of at least 0, got -1.*start from the"),
        ({"coreset_radius": "wide"}, "coreset_radius must be None or a finite number"),
        ({"coreset_projection": 1}, r"coreset_projection must be None or a number in \(0, 1\), got 1\. .*pick exactly"),
        ({"coreset_projection": 0.5, "coreset_radius": 3}, "leave coreset_projection out"),
        ({"random_state": -1}, "random_state must be None or a whole number"),
        ({"memory_budget": 0}, r"memory_budget must be None or a finite number above 0, got 0\. 4 lets .* take 4 GiB"),
        ({"memory_budget": float("nan")}, "memory_budget must be None or a finite number above 0, got nan"),
        ({"memory_budget": "much"}, "memory_budget must be None or a finite number above 0, got 'much'"),
        ({"outlier_rejection": 0}, r"outlier_rejection must be None or a finite number above 0, got 0\. It is a number of"),
        ({"outlier_rejection": True}, "outlier_rejection must be None or a finite number above 0, got True"),
        ({"outlier_rejection": float("inf")}, "outlier_rejection must be None or a finite number above 0, got inf"),
        ({"embedding_dtype": "int8"}, "embedding_dtype must be one of 'float32', 'float16', 'bfloat16' or None, got 'int8'"),
        ({"num_neighbors": 0}, "num_neighbors must be a whole number in .1, 1000., got 0"),
        ({"num_neighbors": -2}, "num_neighbors must be a whole number in .1, 1000., got -2"),
        ({"num_neighbors": 1.5}, "num_neighbors must be a whole number in .1, 1000., got 1.5"),
        ({"num_neighbors": True}, "num_neighbors must be a whole number in .1, 1000., got True"),
        (
            {"score_smoothing": -1},
            "score_smoothing must be a number in .0, 1000., got -1. 1 smooths over",
        ),
        ({"score_smoothing": float("nan")}, "score_smoothing must be a number in .0, 1000., got nan"),
        ({"score_smoothing": "1"}, "score_smoothing must be a number in .0, 1000., got '1'"),
        ({"precision": "int8"}, "precision must be 'float32' or 'float16', got 'int8'"),
        ({"precision": "half"}, "precision must be 'float32' or 'float16', got 'half'"),
        ({"precision": "bfloat16"}, "precision must be 'float32' or 'float16', got 'bfloat16'"),
        ({"precision": 16}, "precision must be 'float32' or 'float16', got 16"),
        ({"image_size": 256}, r"image_size must be a height and a width in pixels, e\.g\. \[256, 256\], got 256"),
        ({"image_size": [0, 256]}, "image_size must be"),
        ({"image_size": [256, 1_000_000]}, r"image_size may have sides of up to 16,384 pixels, .* got \[256, 1000000\]"),
        ({"image_size": [10**30, 5]}, "image_size may have sides of up to 16,384 pixels"),
        ({"image_size": [16_384, 16_384]}, "up to 90,000,000 pixels in all"),
        ({"image_size": (256, 256), "pre_processor": False}, "leave them out, or pre_processor"),
        ({"normalization": "own"}, "normalization must be None or one of 'imagenet', 'backbone', got 'own'"),
        ({"normalization": "backbone", "backbone": "dinov2"}, r"timm has no model 'dinov2'\. Similar names: .*dinov2"),
        ({"normalization": "backbone", "backbone": "hf_hub:some/model"}, "does not know how images for .* are to be normal"),
    ],
)
def test_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


@pytest.mark.parametrize("name", ["image_size", "center_crop_size"])
@pytest.mark.parametrize("size", [(1_000_000, 1_000_000), (0, -3), 256])
def test_wrong_size_of_the_papers_pre_processor(name, size):
    with pytest.raises(ValueError, match=f"{name} m"):
        FaissPatchcore.configure_pre_processor(**{name: size})
