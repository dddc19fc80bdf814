"""Registration of models from other packages with anomalib, through entry points, and anomalib's command line with them."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "anomalib.models"


def register() -> list[type]:
    """Make every model of the entry-point group ``anomalib.models`` usable wherever anomalib takes a model.

    anomalib itself loads no entry points. Afterwards ``list_models()`` knows the models, and ``get_model``, configs and the
    command line take them by name and by ``class_path``. An entry point that cannot be loaded, or holds no model, is left
    out with a warning that names it. A second call changes nothing.

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
        except (Exception, SystemExit) as error:  # a third party's fault must not take our models down
            _warn(entry, f"is left out: {type(error).__name__}: {error}")
            continue
        if not (isinstance(model, type) and issubclass(model, AnomalibModule)):
            _warn(entry, "is left out: it is no AnomalibModule")
            continue
        anomalib.models.ALLOWED_MODULES.update({entry.module, model.__module__})
        models.append(model)
        if getattr(anomalib.models, model.__name__, model) is not model:
            _warn(entry, f"has the name of anomalib's own {model.__name__}: choose it by its full class_path")
        elif not _make_direct_subclass(model, AnomalibModule):
            _warn(entry, "is not found by short name, for anomalib finds direct subclasses alone: use its full class_path")
        else:
            setattr(anomalib.models, model.__name__, model)
    return models


def run_anomalib(arguments: list[str]) -> Any:
    """Run anomalib's command line with the models of every plugin registered.

    Args:
        arguments: What follows ``anomalib`` on the command line.

    Returns:
        The ``AnomalibCLI`` that ran.

    Raises:
        Exception: What the run raised. Where a model's class refused its arguments, its own exception, instead of
            jsonargparse's, which prints the whole configuration.
    """
    register()
    from anomalib.cli.cli import AnomalibCLI
    from anomalib.loggers import configure_logger
    from anomalib.models.components import AnomalibModule

    class RegisteredCLI(AnomalibCLI):
        def instantiate_classes(self) -> None:
            refusals = []

            def instantiate(model: type, *args: Any, **kwargs: Any) -> AnomalibModule:
                try:
                    return model(*args, **kwargs)
                except Exception as error:
                    refusals.append(error)
                    raise

            self.parser.add_instantiator(instantiate, AnomalibModule)
            try:
                super().instantiate_classes()
            except ValueError:
                if refusals:
                    raise refusals[0] from None
                raise

    if not logging.getLogger().handlers:  # another handler would write every line twice
        configure_logger()
    return RegisteredCLI(arguments)


def _make_direct_subclass(model: type, base: type) -> bool:
    """Add ``base`` to the bases of one of its indirect subclasses.

    anomalib looks up a short name among the direct subclasses of its base class alone.

    Returns:
        Whether ``base`` is a base now; False where that would change the method resolution order.
    """
    if base in model.__bases__:
        return True
    bases, order = model.__bases__, model.__mro__
    try:
        model.__bases__ = (*bases, base)
    except TypeError:  # no consistent order
        return False
    if model.__mro__ == order:
        return True
    model.__bases__ = bases
    return False


def _warn(entry: EntryPoint, reason: str) -> None:
    warnings.warn(f"Entry point {entry.name!r} ({entry.value}) of group {GROUP!r} {reason}", stacklevel=3)
