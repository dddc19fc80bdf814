"""Compiled networks, kept on disk for the next start.

OpenVINO's own cache does not notice a damaged file: the scores are then wrong. Here each file begins with a checksum, and
appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import uuid
from typing import TYPE_CHECKING

import openvino as ov

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_file(folder: Path, network: Path, options: dict[str, object], core: ov.Core) -> Path:
    """Name the file that keeps a network, compiled for this machine with these options.

    Args:
        folder: Folder of the cache.
        network: The network file (OpenVINO IR), with its weights beside it.
        options: OpenVINO's properties to compile with.
        core: OpenVINO.
    """
    digest = hashlib.sha256()
    for file in (network, network.with_suffix(".bin")):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    machine = [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    digest.update(repr([ov.__version__, machine, sorted(options.items())]).encode())
    return folder / f"{digest.hexdigest()[:32]}.blob"


def compile_or_restore(
    core: ov.Core, read: Callable[[], ov.Model], options: dict[str, object], file: Path | None
) -> ov.CompiledModel:
    """Restore the compiled network from ``file``, or compile it and keep it there.

    A file that is damaged or cannot be written costs the time of compiling, and nothing else.

    Args:
        core: OpenVINO.
        read: Reads the network; called only where it has to be compiled.
        options: OpenVINO's properties to compile with.
        file: File that keeps the compiled network; its folder is made. None keeps nothing.

    Raises:
        RuntimeError: If OpenVINO cannot read or compile the network.
    """
    compiled = None if file is None else _restore(core, file, options)
    if compiled is None:
        compiled = core.compile_model(read(), "CPU", options)
        if file is not None:
            _keep(compiled, file)
    return compiled


def _restore(core: ov.Core, file: Path, options: dict[str, object]) -> ov.CompiledModel | None:
    try:
        content = memoryview(file.read_bytes())
    except OSError:
        return None
    if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
        logger.warning("%s is damaged: the network is compiled again.", file)
        return None
    try:
        return core.import_model(bytes(content[_DIGEST_BYTES:]), "CPU", options)
    except RuntimeError as error:
        logger.warning("%s cannot be used, the network is compiled again: %s", file, error)
        return None


def _keep(compiled: ov.CompiledModel, file: Path) -> None:
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        content = compiled.export_model().read()
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(hashlib.sha256(content).digest() + content)
        draft.replace(file)
    except (OSError, RuntimeError) as error:  # a read-only folder, a full disk
        logger.info("The compiled network is not kept in %s: %s", file.parent, error)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
