"""PatchCore for anomalib, served from BentoML on a plain CPU with OpenVINO and FAISS."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchcore_plugin.model.lightning_model import FaissPatchcore
    from patchcore_plugin.model.post_processing import ConformalPostProcessor
    from patchcore_plugin.registry import register
    from patchcore_plugin.runtime import PatchcoreRuntime

__all__ = ["ConformalPostProcessor", "FaissPatchcore", "PatchcoreRuntime", "register"]
__version__ = "0.1.0"

# The wheel carries bento/ and configs/ inside the package. In a checkout they stand beside it, and are found there, also
# where the working directory shadows an installed package.
_CHECKOUT = Path(__file__).parents[1]
if (_CHECKOUT / "bento" / "service.py").is_file():
    __path__.append(str(_CHECKOUT))

# Loaded at first use: the runtime must start without the training packages, and importing this package costs nothing.
_HOMES = {
    "ConformalPostProcessor": "patchcore_plugin.model.post_processing",
    "FaissPatchcore": "patchcore_plugin.model.lightning_model",
    "PatchcoreRuntime": "patchcore_plugin.runtime",
    "register": "patchcore_plugin.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
