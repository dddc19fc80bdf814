"""Checkpoints: refuse files that are none or damaged, and say where one lies when a training fails."""

from __future__ import annotations

import logging
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import CheckpointIO

from patchcore_plugin.errors import UsageError, writing

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

logger = logging.getLogger(__name__)


def check_checkpoint(path: str | Path) -> None:
    """Refuse a file that is no checkpoint, or a damaged one: torch reads the archive without a look at its checksums.

    What is not a file, such as an address, is left to Lightning.

    Raises:
        UsageError: If the file is not an archive of torch, or a part of it does not have its checksum.
    """
    if not Path(path).is_file():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            whole = any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError):
        damaged, whole = None, False
    if damaged or not whole:
        reason = f"it is damaged ({damaged})" if damaged else "it is no archive of torch, or only the beginning of one"
        msg = f"{path} cannot be read as a checkpoint: {reason}."
        raise UsageError(msg)


class CheckedIO(CheckpointIO):
    """Reads checkpoints as another plugin does, once they are known to be whole, and names one that cannot be written.

    Args:
        plugin: The other plugin, which does everything else.
    """

    def __init__(self, plugin: CheckpointIO) -> None:
        self._plugin = plugin

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Raises:
            UsageError: As of :func:`check_checkpoint`.
        """
        check_checkpoint(path)
        return self._plugin.load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint.

        Raises:
            OSError: If the file cannot be written; it is named, and no part of it is left.
        """
        with writing(Path(path)):
            self._plugin.save_checkpoint(checkpoint, path, *args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Remove a checkpoint."""
        self._plugin.remove_checkpoint(*args, **kwargs)

    def teardown(self) -> None:
        """End what the plugin has started."""
        self._plugin.teardown()


class CheckpointTeller(Callback):
    """Says where the checkpoint of a training lies when something fails, or that there is none."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say it in the log, once."""
        del pl_module, exception
        if not trainer.is_global_zero:
            return
        callback = trainer.checkpoint_callback
        kept = Path(getattr(callback, "best_model_path", "") or "none")
        if kept.is_file():
            logger.error("The trained model is kept in %s.", kept)
        elif trainer.state.fn == "fit":
            logger.error("This training has kept no model in %s, where `latest` may lead now.", trainer.default_root_dir)
