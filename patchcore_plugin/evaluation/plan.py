"""Reads the YAML file of an evaluation, checks it, and lists its jobs."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from patchcore_plugin import __version__
from patchcore_plugin.errors import PatchcoreError
from patchcore_plugin.registry import register

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

# Part of every job's key: a result that another version computed, or whose files mean something else, is not reused.
_KEY_VERSIONS = {"format": 1, "patchcore-plugin": __version__, **{name: version(name) for name in ("anomalib", "torch")}}

MEAN = "mean of all"
"""Name that stands for the data set in rows that average all data sets."""

_VARIABLE = re.compile(r"\$\{oc\.env:(\w+)")

Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[^/\n]*$")]


class PlanError(PatchcoreError, ValueError):
    """The YAML file of an evaluation cannot be read, or names something that does not exist."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataSet(_Section):
    """A source of images: exactly one of ``class_path``, ``folder`` and ``elpv``.

    Attributes:
        class_path: Class of any anomalib datamodule.
        init_args: Arguments of that class, as in anomalib's configs; with ``folder`` and ``elpv``, arguments of
            ``anomalib.data.Folder``.
        folder: Folder in MVTec AD's layout: train/good, test/good, test/DEFECT, and ground_truth/DEFECT if there are
            masks.
        elpv: Crystal type of the solar cells in the package elpv-dataset; the seed draws the split.
        planted: Share of the training images that are defective, as in a folder that nobody has looked through, with
            ``folder`` and ``elpv``: the seed draws them among the defective test images, and they are not tested.
        optional: Whether to skip this data set, and report that, if its folder is missing.
    """

    _variables: list[str] = PrivateAttr([])  # environment variables that the file takes the values from

    class_path: str | None = None
    init_args: dict[str, Any] = {}
    folder: Path | None = None
    elpv: Literal["mono", "poly"] | None = None
    planted: Annotated[float, Field(ge=0, lt=0.5)] = 0
    optional: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> DataSet:
        if sum(source is not None for source in (self.class_path, self.folder, self.elpv)) != 1:
            msg = "give exactly one of class_path, folder and elpv"
            raise ValueError(msg)
        if self.planted and self.class_path is not None:
            msg = "planted goes with folder and elpv alone"
            raise ValueError(msg)
        return self

    @property
    def missing(self) -> str | None:
        """Reason why this data set cannot be used; None if its folder exists, or only the datamodule knows the folder."""
        root = self.folder if self.folder is not None else self.init_args.get("root")
        if root is None or Path(root).is_dir():
            return None
        said = f" (the file takes its path from the variable {' and '.join(self._variables)})" if self._variables else ""
        return f"there is no folder {root}{said}"


class Published(_Section):
    """Figures that somebody published of a model. The report shows them beside the measured ones; no job depends on them.

    Attributes:
        source: Where the figures are from, as the report says it.
        figures: Shares from 0 to 1, by the name of the data set (or :data:`MEAN`) and the name of the metric.
    """

    source: Annotated[str, Field(min_length=1)]
    figures: dict[str, dict[str, Any]] = Field(min_length=1)

    @field_validator("figures")
    @classmethod
    def _shares(cls, figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
        from patchcore_plugin.evaluation.metrics import METRICS  # here, because it imports anomalib, which takes seconds

        shares = [name for name, metric in METRICS.items() if not metric.is_cost]
        for dataset, metric, value in ((dataset, *item) for dataset, own in figures.items() for item in own.items()):
            if metric not in shares:
                msg = f"{dataset}: {metric!r} is none of the metrics {', '.join(shares)}"
                raise ValueError(msg)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                msg = f"{dataset}: {metric} is a share from 0 to 1 (0.991 for 99.1 %), got {value!r}"
                raise ValueError(msg)
        return figures


class Model(_Section):
    """A model: ``class_path`` and ``init_args`` as in anomalib's configs, or the model section of a ``config`` file.

    Attributes:
        class_path: Class of any anomalib model, or of a model from an installed plugin.
        init_args: Arguments of that class; they replace those of ``config``. ``backbone: efficientnet_lite0`` (or 1, 2)
            loads the packaged weights into every model that has a timm feature extractor.
        config: anomalib config with a model section; the path is relative to the evaluation's file.
        trainer: Arguments of the trainer (``max_epochs``), for models trained by gradient descent.
        published: Published figures, to compare the measured ones with.
    """

    class_path: str | None = None
    init_args: dict[str, Any] = {}
    config: Path | None = None
    trainer: dict[str, Any] = {}
    published: Published | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.class_path is None) == (self.config is None):
            msg = "give exactly one of class_path and config"
            raise ValueError(msg)
        return self


class Evaluation(_Section):
    """The whole YAML file.

    Attributes:
        datasets: Data sets by their names in the report.
        models: Models by their names in the report.
        seeds: Seeds; each data set, model and seed is one job. A seed sets the random numbers of torch and numpy, and so
            the order of the training images. It is also the ``seed`` of a datamodule (random splits) and the
            ``random_state`` of a model, if these have such an argument and the file does not set it.
        backbones: Arguments ``backbone`` and ``layers`` by a name of your choice. Every model runs with each of them,
            except models that set their own ``backbone``.
        baseline: Name of the model that the other models are compared with.
        output: Folder for results and report.
    """

    datasets: dict[Name, DataSet] = Field(min_length=1)
    models: dict[Name, Model] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    backbones: dict[Name, dict[str, Any]] = {}
    baseline: str | None = None
    output: Path = Path("results/evaluation")

    @model_validator(mode="after")
    def _consistent(self) -> Evaluation:
        if self.baseline is not None and self.baseline not in self.models:
            msg = f"baseline {self.baseline!r} is not one of the models: {', '.join(self.models)}"
            raise ValueError(msg)
        for name, model in self.models.items():
            unknown = {} if model.published is None else set(model.published.figures) - {*self.datasets, MEAN}
            if unknown:
                msg = f"models.{name}.published: {sorted(unknown)[0]!r} is none of the data sets, nor {MEAN!r}"
                raise ValueError(msg)
        if len(set(self.seeds)) != len(self.seeds):
            msg = f"a seed is listed twice: {self.seeds}"
            raise ValueError(msg)
        return self


class Job(_Section):
    """One training and one pass over the test images.

    Attributes:
        dataset: Name of the data set.
        model: Name of the model; it includes the name of the backbone if the evaluation has several.
        baseline: Name of the model that this one is compared with.
        seed: Seed of all random numbers.
        data: ``class_path`` and ``init_args`` of the datamodule; without ``root`` for ELPV.
        elpv: Crystal type of the ELPV cells to copy into a folder first.
        planted: Share of the training images that are defective.
        network: ``class_path`` and ``init_args`` of the model.
        trainer: Arguments of the trainer.
        published: Published figures of the model.
    """

    dataset: str
    model: str
    baseline: str | None
    seed: int
    data: dict[str, Any]
    elpv: str | None
    planted: float = 0
    network: dict[str, Any]
    trainer: dict[str, Any]
    published: Published | None = None

    @property
    def label(self) -> str:
        """Name in messages, and the text that ``--only`` patterns match: ``DATA SET/MODEL/SEED``."""
        return f"{self.dataset}/{self.model}/{self.seed}"

    @property
    def key(self) -> str:
        """Name of the result's folder; it changes with everything that the result depends on, except the images' content."""
        # results of before are those of data sets without planted images
        unused = {"dataset", "model", "baseline", "published", *([] if self.planted else ["planted"])}
        content = {**self.model_dump(exclude=unused), **_KEY_VERSIONS}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        readable = re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")[:60]
        return f"{readable}-{digest}"


def read_plan(file: Path) -> Evaluation:
    """Read and check the YAML file of an evaluation; ``${oc.env:NAME,default}`` stands for an environment variable.

    Raises:
        PlanError: If the file cannot be read, or a key or value is wrong; the message lists every wrong one.
    """
    content = _read_yaml(file)
    try:
        plan = Evaluation.model_validate(content)
    except ValidationError as error:
        problems = [
            f"  {'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg'].removeprefix('Value error, ')}"
            + ("" if isinstance(problem["input"], dict) else f", got {problem['input']!r}")
            for problem in error.errors()
        ]
        raise PlanError("\n".join([f"{file} is not a valid evaluation:", *problems])) from error
    written = OmegaConf.to_container(OmegaConf.load(file), resolve=False)["datasets"]
    for name, dataset in plan.datasets.items():
        dataset._variables = sorted(set(_VARIABLE.findall(json.dumps(written[name]))))
    return plan


def list_jobs(plan: Evaluation, folder: Path) -> tuple[list[Job], dict[str, str]]:
    """List the jobs of a plan, and check each as anomalib would when it starts.

    Args:
        plan: The evaluation.
        folder: Folder of the plan's file; paths in ``config`` are relative to it.

    Returns:
        The jobs, ordered by data set, seed and model; and the reason why each optional data set is skipped, by name.

    Raises:
        PlanError: If a required data set is missing, no data set is left, a class is unknown, or an argument is wrong.
    """
    datasets, skipped = _available(plan)
    variants = _variants(plan, folder)
    jobs = [
        Job(
            dataset=name,
            model=variant.title,
            baseline=_baseline(variant, variants, plan.baseline),
            seed=seed,
            data=_with_default(data, "seed", seed),
            elpv=plan.datasets[name].elpv,
            planted=plan.datasets[name].planted,
            network=_with_default(variant.network, "random_state", seed),
            trainer=variant.trainer,
            published=_published(plan.models[variant.model].published, whole=not skipped),
        )
        for name, data in datasets.items()
        for seed in plan.seeds
        for variant in variants
    ]
    return jobs, skipped


def _published(published: Published | None, *, whole: bool) -> Published | None:
    """Published figures; without those of the mean if a data set is missing."""
    figures = {} if published is None else {name: own for name, own in published.figures.items() if whole or name != MEAN}
    return published.model_copy(update={"figures": figures}) if figures else None


def _available(plan: Evaluation) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Class and arguments of every data set that is there, and the reason for every skipped one, both by name."""
    datasets, skipped = {}, {}
    for name, dataset in plan.datasets.items():
        if dataset.missing and dataset.optional:
            skipped[name] = dataset.missing
            continue
        if dataset.missing and dataset.folder is not None:  # a datamodule may download to a root that does not exist yet
            msg = f"datasets.{name}: {dataset.missing}. Correct the path, or set optional: true to go on without it."
            raise PlanError(msg)
        datasets[name] = _datamodule(name, dataset)
    if not datasets:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        msg = f"Every data set is optional, and missing: {reasons}."
        raise PlanError(msg)
    return datasets, skipped


@dataclass(frozen=True)
class _Variant:
    """A model of the plan with one backbone.

    Attributes:
        model: Name of the model.
        backbone: Name of the backbone; None if the plan has at most one, or the model sets its own.
        network: Class and arguments, backbone included.
        trainer: Arguments of the trainer.
    """

    model: str
    backbone: str | None
    network: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def title(self) -> str:
        """Name in the report."""
        return self.model if self.backbone is None else f"{self.model}, {self.backbone}"


def _variants(plan: Evaluation, folder: Path) -> list[_Variant]:
    """Every model with every backbone."""
    variants = []
    for name, model in plan.models.items():
        component = _model(name, model, folder)
        has_backbone = "backbone" in component["init_args"]
        backbones = {None: {}} if has_backbone or not plan.backbones else plan.backbones
        for backbone, arguments in backbones.items():
            network = {**component, "init_args": {**arguments, **component["init_args"]}}
            network = _checked("model", network, f"models.{name}")
            network = _with_default(network, "visualizer", False)  # a visualizer would write a figure for every image
            variants.append(_Variant(name, backbone if len(plan.backbones) > 1 else None, network, model.trainer))
    return variants


def _baseline(variant: _Variant, variants: list[_Variant], name: str | None) -> str | None:
    """Title of the baseline with the variant's backbone, or else with the baseline's first backbone."""
    candidates = [other for other in variants if other.model == name]
    same = [other for other in candidates if other.backbone == variant.backbone]
    return (same or candidates)[0].title if candidates else None


def _model(name: str, model: Model, folder: Path) -> dict[str, Any]:
    """Class and arguments of a model, from the plan or from the config that the plan names."""
    if model.config is None:
        return {"class_path": model.class_path, "init_args": model.init_args}
    section = _read_yaml(folder / model.config).get("model")
    if not isinstance(section, dict) or "class_path" not in section:
        msg = f"models.{name}.config: {folder / model.config} has no model section with a class_path."
        raise PlanError(msg)
    return {"class_path": section["class_path"], "init_args": {**(section.get("init_args") or {}), **model.init_args}}


def _datamodule(name: str, dataset: DataSet) -> dict[str, Any]:
    """Class and arguments of a datamodule; without ``root`` for ELPV, whose folder the job chooses."""
    if dataset.class_path is not None:
        component = {"class_path": dataset.class_path, "init_args": dataset.init_args}
        return _checked("data", component, f"datasets.{name}")
    # Thresholds are set on the test images, as in configs/; no metric of the tables depends on a threshold.
    arguments = {"name": "evaluated", "val_split_mode": "same_as_test", "num_workers": 0}
    arguments |= {"train_batch_size": 16, "eval_batch_size": 16}
    layout = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/defective"}
    if dataset.folder is not None:
        layout = {"root": str(dataset.folder), **_mvtec_layout(f"datasets.{name}", dataset.folder)}
    component = {"class_path": "anomalib.data.Folder", "init_args": {**arguments, **layout, **dataset.init_args}}
    return _checked("data", component, f"datasets.{name}")


def _mvtec_layout(where: str, root: Path) -> dict[str, Any]:
    """Arguments of ``anomalib.data.Folder`` for a folder in MVTec AD's layout; ``where`` begins the messages."""
    for needed in ("train/good", "test/good"):
        if not (root / needed).is_dir():
            msg = f"{where}.folder: there is no folder {root / needed}. For another layout give class_path and init_args."
            raise PlanError(msg)
    folders = (path for path in (root / "test").iterdir() if path.is_dir() and not path.name.startswith("."))
    defects = sorted(path.name for path in folders if path.name != "good")
    if not defects:
        msg = f"{where}.folder: {root / 'test'} has no folder of defective images next to good."
        raise PlanError(msg)
    for folder in ("train/good", "test/good", *(f"test/{defect}" for defect in defects)):
        for path in (root / folder).rglob("*"):
            if path.is_symlink() and path.is_dir():
                msg = f"{where}.folder: {path} is a linked folder, whose images anomalib would leave out. Copy them instead."
                raise PlanError(msg)
    layout: dict[str, Any] = {
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": [f"test/{defect}" for defect in defects],
    }
    if (root / "ground_truth").is_dir():
        missing = [defect for defect in defects if not (root / "ground_truth" / defect).is_dir()]
        if missing:
            msg = f"{where}.folder: {root / 'ground_truth'} has no masks of {', '.join(missing)}."
            raise PlanError(msg)
        layout["mask_dir"] = [f"ground_truth/{defect}" for defect in defects]
    return layout


def _with_default(component: dict[str, Any], argument: str, value: Any) -> dict[str, Any]:
    """The component with one more argument, if its class has that argument and the file does not set it."""
    if argument not in inspect.signature(component_class(component)).parameters or argument in component["init_args"]:
        return component
    return {**component, "init_args": {**component["init_args"], argument: value}}


def component_class(component: dict[str, Any]) -> type:
    """Import the class of a checked component."""
    module, name = component["class_path"].rsplit(".", 1)
    return getattr(import_module(module), name)


@cache
def component_parser(kind: Literal["data", "model"]) -> ArgumentParser:
    """Make the parser for ``class_path`` and ``init_args`` of a datamodule or model, as anomalib's command line has it."""
    # Here, because anomalib takes seconds to import: a mistake in the YAML file is reported before.
    from anomalib.data import AnomalibDataModule
    from anomalib.models import AnomalibModule
    from jsonargparse import ArgumentParser

    register()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{kind}", type=AnomalibDataModule if kind == "data" else AnomalibModule, required=True)
    return parser


def _checked(kind: Literal["data", "model"], component: dict[str, Any], where: str) -> dict[str, Any]:
    """Check a component without building it; returns it with the full path of its class.

    Raises:
        PlanError: If the class does not exist, or does not accept an argument or value.
    """
    try:
        parsed = parse_component(kind, component)
    except Exception as error:  # importing a user's class may raise anything
        raise PlanError(f"{where}: {error}") from error
    return {**component, "class_path": parsed[kind].class_path}


def parse_component(kind: Literal["data", "model"], component: dict[str, Any]) -> Namespace:
    """Parse a component as anomalib's command line would."""
    return component_parser(kind).parse_object({kind: deepcopy(component)})  # it would change classes among the arguments


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except FileNotFoundError as error:
        msg = f"There is no file {file}."
        raise PlanError(msg) from error
    except Exception as error:  # from the YAML parser, from omegaconf, or from decoding
        raise PlanError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        msg = f"{file} is not a valid evaluation: it must be a mapping with datasets and models."
        raise PlanError(msg)
    return content
