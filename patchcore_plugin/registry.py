"""Registration of models from other packages with anomalib, through entry points."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points

GROUP = "anomalib.models"


def register() -> list[type]:
    """Make every model of the entry-point group ``anomalib.models`` usable wherever anomalib takes a model.

    That is ``list_models()``, ``get_model`` by name and by ``class_path``, and short names in configs and on the command
    line. anomalib itself loads no entry points. An entry point that cannot be loaded, or is no model, is left out with a
    warning that names it. Calling this again is harmless.

    Returns:
        The registered model classes.

    Raises:
        ImportError: If anomalib is not installed.
    """
    import anomalib.models
    from anomalib.models.components import AnomalibModule

    models = []
    for entry in entry_points(group=GROUP):
        try:
            model = entry.load()
        except Exception as error:  # a third party's fault must not take our models down
            _warn(entry.name, entry.value, f"{type(error).__name__}: {error}")
            continue
        if not (isinstance(model, type) and issubclass(model, AnomalibModule)):
            _warn(entry.name, entry.value, "it is no AnomalibModule")
            continue
        if AnomalibModule not in model.__bases__:
            # anomalib finds models among the direct subclasses alone; the resolution order stays as it was
            model.__bases__ += (AnomalibModule,)
        if not hasattr(anomalib.models, model.__name__):
            setattr(anomalib.models, model.__name__, model)
        elif getattr(anomalib.models, model.__name__) is not model:
            _warn(entry.name, entry.value, f"anomalib has another model named {model.__name__}; use the full class_path")
        anomalib.models.ALLOWED_MODULES.update({entry.module, model.__module__})
        models.append(model)
    return models


def _warn(name: str, value: str, reason: str) -> None:
    warnings.warn(f"Entry point {name!r} ({value}) of group {GROUP!r} is left out: {reason}", stacklevel=3)
