"""What an OpenVINO graph says about itself, for programs that read graphs by model_api."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MODEL_INFO = {
    "model_type": "AnomalyDetection",
    "task": "segmentation",
    "labels": "Normal Anomaly",
    # The graph normalizes scores and maps itself.
    "image_threshold": "0.5",
    "pixel_threshold": "0.5",
    "normalization_scale": "1.0",
    "reverse_input_channels": "True",  # images come as OpenCV reads them, BGR, u8
    "scale_values": "255.0 255.0 255.0",
    "resize_type": "standard",
}
"""Values of the section ``model_info``, which model_api reads. Source: the parameters of its class ``AnomalyDetection``."""


def add_model_info(path: Path) -> None:
    """Add the section ``model_info`` to a graph of anomalib's export, and the layout of its input.

    Args:
        path: The graph's file (``.xml``), with its weights beside it.
    """
    import openvino as ov

    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # Windows replaces no file that is mapped
    graph = core.read_model(path)
    for name, value in MODEL_INFO.items():
        graph.set_rt_info(value, ["model_info", name])
    graph.inputs[0].get_node().layout = ov.Layout("NCHW")
    ov.save_model(graph, path, compress_to_fp16=False)
    del graph
    gc.collect()
