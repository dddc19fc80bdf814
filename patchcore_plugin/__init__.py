"""PatchCore for anomalib, served from BentoML on a plain CPU with OpenVINO and FAISS."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchcore_plugin.model.lightning_model import FaissPatchcore
    from patchcore_plugin.model.post_processing import ConformalPostProcessor
    from patchcore_plugin.model.spade import Spade
    from patchcore_plugin.registry import register
    from patchcore_plugin.runtime import PatchcoreRuntime

__all__ = ["ConformalPostProcessor", "FaissPatchcore", "PatchcoreRuntime", "Spade", "register"]
__version__ = "0.1.0"

# A wheel has bento/ and configs/ inside the package. A checkout has them beside it, and they must be found there even where
# the working directory shadows an installed package.
_CHECKOUT = Path(__file__).parents[1]
if (_CHECKOUT / "bento" / "service.py").is_file():
    __path__.append(str(_CHECKOUT))

# Module of each public name, imported at the name's first use: the runtime starts without the training packages.
_LAZY_NAMES = {
    "ConformalPostProcessor": "patchcore_plugin.model.post_processing",
    "FaissPatchcore": "patchcore_plugin.model.lightning_model",
    "PatchcoreRuntime": "patchcore_plugin.runtime",
    "Spade": "patchcore_plugin.model.spade",
    "register": "patchcore_plugin.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_NAMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_LAZY_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
