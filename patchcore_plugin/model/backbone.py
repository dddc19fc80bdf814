"""Backbones: frozen feature extractors by timm's names."""

from __future__ import annotations

import logging
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.weights import (
    PACKAGED,
    load_file_weights,
    load_packaged_weights,
    timm_name,
    unreachable,
    weights_follow,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """Frozen feature extractor.

    Args:
        name: A timm model name that supports ``features_only``, or one of :data:`patchcore_plugin.model.weights.PACKAGED`.
        layers: Feature layers, shallow to deep, by timm's module names (``"layer2"``, ``"blocks.2"``).
        pre_trained: Load ImageNet weights. ``False`` leaves the backbone random, with a warning.
        weights: Local ``.pth`` or ``.safetensors`` file to load instead, tensors only. Wins over ``pre_trained``.

    Raises:
        UsageError: If timm has no such model, or the model no such layer.
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
        indices = _layer_indices(name, layers)
        # Packaged weights and local files are loaded by name below; only timm's own weights come from timm.
        from_hub = pre_trained and weights is None and name not in PACKAGED and not weights_follow()
        self.net = _create(timm_name(name), indices, pretrained=from_hub)
        if not weights_follow():
            if weights is not None:
                load_file_weights(self.net, Path(weights))
            elif pre_trained and name in PACKAGED:
                load_packaged_weights(self.net, name)
            elif not pre_trained:
                logger.warning("Backbone %s has random weights (pre_trained=False): scores will mean little.", name)
        # timm returns features in the network's order; ``layers`` may be in another.
        self._order = [sorted(indices).index(index) for index in indices]
        self._channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self.to(memory_format=torch.channels_last)  # by which a CPU convolves faster
        self.eval().requires_grad_(requires_grad=False)

    @property
    def channels(self) -> int:
        """Values of all layers together."""
        return sum(self.net.feature_info.channels())

    @property
    def is_convolutional(self) -> bool:
        """Whether all parameters belong to convolutions and batch normalizations, as those of a ResNet."""
        kinds = (nn.Conv2d, nn.BatchNorm2d)
        return all(
            isinstance(part, kinds) for part in self.net.modules() if any(True for _ in part.parameters(recurse=False))
        )

    def fix_image_size(self, height: int, width: int) -> None:
        """Resample position embeddings once, in place, for images of this size alone.

        OpenVINO interpolates them otherwise than torch: at 448 x 448 pixels, features of DINOv2 differ by 0.6 %.
        """
        net = getattr(self.net, "model", None)  # the transformer, where timm wraps one
        if getattr(net, "pos_embed", None) is not None and getattr(net, "dynamic_img_size", False):
            net.set_input_size(img_size=(height, width))

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: the backbone is frozen, its batch statistics too."""
        del mode
        return super().train(mode=False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract features of normalized images (B, 3, H, W): one (B, C, h, w) per layer.

        Raises:
            UsageError: If the backbone cannot take images of this size.
        """
        try:
            features = self.net(images.contiguous(memory_format=torch.channels_last))
        except AssertionError as error:  # timm's transformers
            raise UsageError(_unfit(self.net, *images.shape[-2:], error)) from error
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return [features[position] for position in self._order]


def deepest_layer(name: str) -> str:
    """Name of a backbone's deepest feature layer.

    Raises:
        UsageError: If timm has no such model, or the model gives no features.
    """
    return _feature_layers(name)[-1]


def pretrained_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which images were normalized when a backbone's weights were trained.

    Args:
        name: Name of the backbone.

    Returns:
        Mean and standard deviation of each channel (RGB), of values in [0, 1].

    Raises:
        UsageError: If timm does not know them.
    """
    known = known_statistics(name)
    if known is None:
        if ":" not in name and not timm.is_model(timm_name(name)):
            raise UsageError(_unknown(name))
        msg = (
            f"timm does not know how images for the backbone {name!r} are to be normalized: give a pre_processor whose "
            "Normalize has the right mean and std."
        )
        raise UsageError(msg)
    return known


def known_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """What :func:`pretrained_statistics` returns; None where timm does not know them."""
    known = timm.get_pretrained_cfg(timm_name(name))
    return None if known is None else (tuple(known.mean), tuple(known.std))


def _layer_indices(name: str, layers: Sequence[str]) -> list[int]:
    """Positions of ``layers`` among the backbone's feature layers."""
    if isinstance(layers, str) or not layers or not all(isinstance(layer, str) for layer in layers):
        msg = f"layers must be a non-empty list of layer names, got {layers!r}."
        raise UsageError(msg)
    available = _feature_layers(name)
    missing = [layer for layer in layers if layer not in available]
    if missing:
        deepest = len(available) - 1
        middle = dict.fromkeys(available[place] for place in (deepest // 2, (3 * deepest + 2) // 4))
        msg = (
            f"Backbone {name!r} has no layer {', '.join(map(repr, missing))}. Its feature layers: {', '.join(available)}. "
            f"Begin with layers from the middle: layers: [{', '.join(middle)}]."
        )
        raise UsageError(msg)
    if len(set(layers)) != len(layers):
        msg = f"layers names a layer twice: {list(layers)}."
        raise UsageError(msg)
    return [available.index(layer) for layer in layers]


def _feature_layers(name: str) -> list[str]:
    """Names of all feature layers of a backbone, shallow to deep."""
    return [info["module"] for info in _create(timm_name(name), None, pretrained=False).feature_info.info]


def _unfit(net: nn.Module, height: int, width: int, error: AssertionError) -> str:
    """What to say where a transformer refuses images of a height and width."""
    patches = next((part for part in net.modules() if hasattr(part, "strict_img_size")), None)  # timm's PatchEmbed
    if patches is None:
        return f"{error} Give a size that fits: image_size: [height, width]."
    if patches.strict_img_size:
        sizes = [list(patches.img_size)]
        takes = f"images of {sizes[0][0]} x {sizes[0][1]} pixels alone"
    else:
        sides = list(zip((height, width), patches.patch_size, strict=True))
        sizes = [
            [max(side // patch, 1) * patch for side, patch in sides],
            [-(-side // patch) * patch for side, patch in sides],
        ]
        takes = f"images of whole patches of {patches.patch_size[0]} x {patches.patch_size[1]} pixels"
    return (
        f"The backbone takes {takes}, and got {height} x {width}: give image_size: {' or '.join(map(str, sizes))}. With a "
        "center crop, its size counts instead; with tiles, that of a tile."
    )


def _unknown(name: str) -> str:
    """What to say of a name that timm does not have."""
    known = [*PACKAGED, *timm.list_models()]
    family = timm.list_models(f"*{re.split('[._]', name)[0]}*")
    similar = list(dict.fromkeys([*get_close_matches(name, known, 4), *family]))[:8]
    hint = f" Similar names: {', '.join(similar)}." if similar else ""
    return f"timm has no model {name!r}.{hint}"


def _create(architecture: str, indices: list[int] | None, *, pretrained: bool) -> nn.Module:
    """Create timm's feature extractor with some of its layers, or with all."""
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
            raise unreachable(architecture, error) from error
        if not timm.is_model(architecture):
            raise UsageError(_unknown(architecture)) from error
        msg = f"timm cannot build {architecture!r} as a feature extractor (features_only): {error}"
        raise UsageError(msg) from error
