"""The config that a comparison starts from, and the one that it writes."""

from __future__ import annotations

import math
import os
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from patchcore_plugin import __version__
from patchcore_plugin.depth import IntensityRange, check_intensity_range
from patchcore_plugin.errors import UsageError, writing
from patchcore_plugin.model.exclusion import read_list
from patchcore_plugin.moving import replace
from patchcore_plugin.names import as_line
from patchcore_plugin.tuning.images import MIN_DEFECTIVE
from patchcore_plugin.tuning.tune import FOLDS, REAL_MARGIN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patchcore_plugin.tuning.tune import TuneReport

_MODEL, _CLASS_PATH = "FaissPatchcore", "patchcore_plugin.FaissPatchcore"
_COMPARED = (
    "backbone",
    "layers",
    "pre_trained",
    "backbone_weights",
    "precision",
    "num_neighbors",
    "image_size",
    "normalization",
    "score_smoothing",
    "intensity_range",
    "exclude",
    "region_of_interest",
    "tile_size",
    "tile_stride",
)  # arguments of the model that the comparison uses
_OTHER_PARTS = ("pre_processor", "post_processor", "evaluator", "visualizer")  # of a model, no arguments of an embedding
_OF_OTHER_IMAGES = ("normal_test_dir", "mask_dir")


class BaseConfig(NamedTuple):
    """A config of anomalib.

    Attributes:
        content: All of it, as written.
        arguments: The arguments of its model that scores depend on, with values for ``${...}``.
    """

    content: dict[str, Any]
    arguments: dict[str, Any]


def read_config(file: Path | None, *, defects: bool = True) -> BaseConfig:
    """Read a config for ``anomalib train`` with this package's model and a folder of images.

    Args:
        file: The config; None takes ``folder.yaml``, or ``normal_only.yaml`` where there are no defective images.
        defects: Whether there are some.

    Raises:
        UsageError: If it cannot be read, or has another model or data set.
    """
    if file is None:
        with as_file(files("patchcore_plugin.configs") / ("folder.yaml" if defects else "normal_only.yaml")) as own:
            return read_config(own)
    arguments, (content, resolved) = read_arguments(file), _load(file)
    _section(file, resolved, "data", "Folder", "anomalib.data.Folder")
    return BaseConfig(content, arguments)


def read_arguments(file: Path) -> dict[str, Any]:
    """Read the arguments of a config's model that scores depend on, with values for ``${...}``.

    Args:
        file: The config, with this package's model.

    Raises:
        UsageError: If it cannot be read, or has another model, or one with a pre-processor of its own.
    """
    arguments = _section(file, _load(file)[1], "model", _MODEL, _CLASS_PATH)
    if isinstance(arguments.get("pre_processor"), dict):
        msg = f"{file} gives the model a pre_processor, which sets image_size and normalization: leave it out."
        raise UsageError(msg)
    return {name: value for name, value in arguments.items() if name not in _OTHER_PARTS}


def _load(file: Path) -> tuple[Any, Any]:
    """What is in a YAML file, as written and with values for ``${...}``."""
    try:
        loaded = OmegaConf.load(file)
        content, resolved = (OmegaConf.to_container(loaded, resolve=resolve) for resolve in (False, True))
        return content, resolved
    except FileNotFoundError as error:
        msg = f"There is no file {file}."
        raise UsageError(msg) from error
    except Exception as error:  # from the YAML parser, from omegaconf, or from decoding
        msg = f"{file} cannot be read as YAML: {error}"
        raise UsageError(msg) from error


def _section(file: Path, content: Any, name: str, needed: str, example: str) -> dict[str, Any]:
    """Arguments of a section's class, which must have this name."""
    section = content.get(name) if isinstance(content, dict) else None
    found = section.get("class_path") if isinstance(section, dict) else None
    arguments = (section.get("init_args") or {}) if isinstance(section, dict) else {}
    if not isinstance(found, str) or found.rpartition(".")[2] != needed or not isinstance(arguments, dict):
        msg = (
            f"{file} must have a section {name!r} with class_path: {example}, and its arguments below init_args; got "
            f"class_path {found!r}."
        )
        raise UsageError(msg)
    return arguments


def intensity_range(arguments: Mapping[str, Any]) -> IntensityRange | None:
    """The intensity range of model arguments; None where they have none, or take that of the images."""
    values = arguments.get("intensity_range")
    return None if values in (None, "auto") else check_intensity_range(values)


def without_excluded(base: BaseConfig, images: Sequence[Path]) -> list[Path]:
    """Images but those that the config's ``exclude`` lists."""
    file = base.arguments.get("exclude")
    listed = {} if file is None else read_list(Path(str(file)))
    return [image for image in images if os.path.normcase(os.path.realpath(image)) not in listed]


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written, before the work.

    Raises:
        UsageError: If it is there already and may not be replaced, or is no YAML file, or its folder does not exist.
    """
    if output.is_dir():
        msg = f"{output} is a folder: name a file, such as {output / 'tuned.yaml'}."
        raise UsageError(msg)
    if output.suffix.lower() not in (".yaml", ".yml"):  # --overwrite must not replace an image
        msg = f"{output} must end in .yaml or .yml, as it is a config: name it {output.name}.yaml, for example."
        raise UsageError(msg)
    if output.exists() and not overwrite:
        msg = f"{output} is there already: choose another --output, or give --overwrite to replace it."
        raise UsageError(msg)
    if not output.parent.is_dir():
        msg = f"There is no folder {output.parent} to write {output.name} into."
        raise UsageError(msg)


def check_folder(folder: Path) -> None:
    """Refuse a folder that anomalib would not train on.

    Raises:
        UsageError: If its path has letters outside ASCII.
    """
    path = str(folder.resolve())
    if not (path.isascii() and path.isprintable()):
        msg = f"anomalib takes paths in ASCII alone, and {as_line(path)} has other letters: move or rename the folder."
        raise UsageError(msg)


def check_defects(base: BaseConfig, normal: Path, defective: Path | None) -> None:
    """Refuse a config whose defective images belong to another folder, where the user gives none.

    Raises:
        UsageError: If the config names some.
    """
    data = base.content["data"].get("init_args") or {}
    if defective is None and data.get("abnormal_dir") is not None and not _is_same(data, normal):
        msg = (
            f"The config has abnormal_dir: {as_line(str(data['abnormal_dir']))}, for another folder than "
            f"{as_line(str(normal))}: give --defects, or a config without it, such as configs/normal_only.yaml."
        )
        raise UsageError(msg)


def fill_in(base: BaseConfig, report: TuneReport, normal: Path, defective: Path | None, count: int) -> dict[str, Any]:
    """The base config with the chosen setting and the user's folders.

    Args:
        base: The config.
        report: What was compared.
        normal: Folder of normal images.
        defective: Folder of defective images, if there is one.
        count: Number of normal images in the folder.

    Returns:
        A config for ``anomalib train``.
    """
    content = {**base.content, "model": dict(base.content["model"]), "data": dict(base.content["data"])}
    model = dict(content["model"].get("init_args") or {}) | report.settings[report.chosen].changed
    data = dict(content["data"].get("init_args") or {})
    content["model"]["init_args"], content["data"]["init_args"] = model, data
    if report.deep and model.get("intensity_range") is None:
        model["intensity_range"] = "auto"
    if not _is_same(data, normal):  # what belongs to the images of another folder is left out
        root = normal.resolve().parent
        data = {name: value for name, value in data.items() if name not in _OF_OTHER_IMAGES}
        data |= {"name": root.name or "part", "root": str(root), "normal_dir": normal.resolve().name}
        content["data"]["init_args"] = data
    if defective is not None:
        path, root = defective.resolve(), Path(str(data.get("root") or ".")).resolve()
        data["abnormal_dir"] = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    _lower_demands(model, data, count)
    return content


def _is_same(data: dict[str, Any], folder: Path) -> bool:
    """Whether a data section has this folder of normal images."""
    own = data.get("normal_dir")
    return isinstance(own, str) and os.path.realpath(Path(str(data.get("root") or "."), own)) == os.path.realpath(folder)


def _lower_demands(model: dict[str, Any], data: dict[str, Any], count: int) -> None:
    """Raise a false-alarm rate that needs more images than are held back to the lowest rate that they allow.

    A review rate that is not above it is raised to five times that rate.
    """
    post_processor = model.get("post_processor")
    arguments = post_processor.get("init_args") if isinstance(post_processor, dict) else None
    if not isinstance(arguments, dict) or arguments.get("groups"):
        return
    rate, ratio = arguments.get("false_positive_rate"), data.get("val_split_ratio", 0.5)
    if not isinstance(rate, float) or not isinstance(ratio, float) or not 0 < ratio < 1:
        return
    held_back = int(count * ratio)
    lowest = math.ceil(1000 / (held_back + 1)) / 1000
    if rate < lowest < 1:
        raised = {**arguments, "false_positive_rate": lowest}
        review_rate = arguments.get("review_rate")
        if isinstance(review_rate, float) and review_rate <= lowest:
            raised["review_rate"] = min(5 * lowest, (1 + lowest) / 2)
        model["post_processor"] = {**post_processor, "init_args": raised}


def false_alarm_rate(content: Mapping[str, Any]) -> Any:
    """The false-alarm rate that a config asks for, as written; None where it asks for none."""
    post_processor = (content["model"].get("init_args") or {}).get("post_processor")
    arguments = post_processor.get("init_args") if isinstance(post_processor, dict) else None
    return arguments.get("false_positive_rate") if isinstance(arguments, dict) else None


def describe(report: TuneReport) -> list[str]:
    """What was compared, and how, in lines of text; table and choice included."""
    chosen, own = report.settings[report.chosen], report.settings[0]
    defects = f"{report.defective} {'synthetic defects' if report.synthetic else 'defective images'}"
    lines = [
        f"Criterion: AUROC of {defects} against {report.normal} normal images that the memory bank has not learned",
        f"(cross-fit in {FOLDS} folds), with its standard error, and the difference from {own.name!r}, the config as it is.",
        "",
        f"{'setting':16s}{'AUROC':>18s}{'difference':>19s}  what it is",
    ]
    for setting, comparison in zip(report.settings, report.comparisons, strict=True):
        auroc, difference = comparison.auroc, comparison.difference
        shown = "" if setting is own else f"{difference.value:+.4f} ± {difference.error:.4f}"
        mark = "  <- chosen" if setting is chosen else ""
        lines.append(f"{setting.name:16s}{auroc.value:9.4f} ± {auroc.error:.4f}{shown:>19s}  {setting.meaning}{mark}")
    if report.synthetic:
        reason = "the config as it is, as synthetic defects choose nothing"
    else:
        reason = f"{'no other' if chosen is own else 'it'} is better than {own.name!r} by more than {REAL_MARGIN:g} x the "
        reason += "standard error of the difference"
    lines += ["", f"Chosen: {chosen.name}; {reason}."]
    idle = [name for name in own.arguments if name not in _COMPARED]
    if idle:
        lines.append(f"Not varied, and without part in the comparison; they stay as the config has them: {', '.join(idle)}.")
    if report.synthetic:
        lines += [
            "The defects are SYNTHETIC, spots of noise and pasted windows, which is weak evidence: on solar cells they",
            "agreed with real defects on normalization, missed what smoothing gains, and favored larger images, which lose",
            f"there. Prefer a handful of real ones: compare again with --defects as soon as there are {MIN_DEFECTIVE}.",
        ]
    else:
        lines.append("These images took part in the choice, so a test on them looks a little better than new images will.")
    return lines


def write_config(content: dict[str, Any], report: TuneReport, output: Path) -> None:
    """Write a config with the comparison as comments; the file is there once it is whole."""
    head = [
        f"Written by patchcore tune, patchcore-plugin {__version__}.",
        "",
        f"  patchcore train --config {as_line(output.name)}",
        "",
        *describe(report),
    ]
    comments = "".join(f"# {line}".rstrip() + "\n" for line in head).replace("±", "+/-")
    part = output.with_name(f"{output.name}.part")
    with writing(part):
        # anomalib reads a config in the system's encoding, which on Windows is rarely UTF-8; ASCII is the same in all
        text = f"{comments}\n{yaml.safe_dump(content, sort_keys=False)}"
        part.write_bytes(text.encode("ascii", "backslashreplace"))
    replace(part, output)
