"""The serving runtime: a bundle scored by OpenVINO and FAISS, without torch."""

from patchcore_plugin.runtime.prediction import Outcome, Prediction
from patchcore_plugin.runtime.runtime import PatchcoreRuntime

__all__ = ["Outcome", "PatchcoreRuntime", "Prediction"]
