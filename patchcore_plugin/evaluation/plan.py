"""What an evaluation runs: a YAML file, checked, as a list of jobs."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from patchcore_plugin import __version__
from patchcore_plugin.errors import PatchcoreError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# Part of every job's key: results of another meaning, or of another version of what computes them, are not reused.
_FORMAT = {"format": 1, "patchcore-plugin": __version__, **{name: version(name) for name in ("anomalib", "torch")}}

Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[^/\n]*$")]


class PlanError(PatchcoreError, ValueError):
    """The YAML of an evaluation cannot be read, or asks for something that is not there."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataSet(_Section):
    """Where images come from: exactly one of ``class_path``, ``folder`` and ``elpv``.

    Attributes:
        class_path: Any anomalib datamodule.
        init_args: Its arguments, as in anomalib's configs; with ``folder`` and ``elpv``, those of ``anomalib.data.Folder``.
        folder: Folder in MVTec AD's layout: train/good, test/good, test/DEFECT, and ground_truth/DEFECT where there are
            masks.
        elpv: Solar cells of the package elpv-dataset; the seed draws the split.
        optional: Skip this data set, and say so, where its folder is missing.
    """

    class_path: str | None = None
    init_args: dict[str, Any] = {}
    folder: Path | None = None
    elpv: Literal["mono", "poly"] | None = None
    optional: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> DataSet:
        if sum(source is not None for source in (self.class_path, self.folder, self.elpv)) != 1:
            msg = "give exactly one of class_path, folder and elpv"
            raise ValueError(msg)
        return self

    @property
    def missing(self) -> str | None:
        """Why this data set cannot be used; None where its folder is there, or unknown to us."""
        place = self.folder if self.folder is not None else self.init_args.get("root")
        if place is None or Path(place).is_dir():
            return None
        return f"there is no folder {place}"


class Model(_Section):
    """A model: ``class_path`` and ``init_args`` as in anomalib's configs, or the model section of a ``config`` file.

    Attributes:
        class_path: Any anomalib model, or one of an installed plugin.
        init_args: Its arguments; they win over those of ``config``. ``backbone: efficientnet_lite0`` (or 1, 2)
            gives the embedded weights to any model with a timm feature extractor, not ours alone.
        config: anomalib config whose model section to take; a path relative to the evaluation's file.
        trainer: Arguments of the trainer (``max_epochs``), for models that learn by gradient.
    """

    class_path: str | None = None
    init_args: dict[str, Any] = {}
    config: Path | None = None
    trainer: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.class_path is None) == (self.config is None):
            msg = "give exactly one of class_path and config"
            raise ValueError(msg)
        return self


class Evaluation(_Section):
    """The whole file.

    Attributes:
        datasets: Data sets by the names that the report calls them.
        models: Models by name.
        seeds: A job per data set, model and seed. A seed sets torch's and numpy's random numbers, hence the order of
            the training images, and anomalib's ``seed`` of a datamodule (its random splits) and ``random_state`` of a
            model where these have such an argument and the file does not set it.
        backbones: Arguments by name (``backbone``, ``layers``) that every model is run with, unless it has a
            ``backbone`` of its own.
        baseline: Model that the others are compared with.
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
            msg = f"baseline {self.baseline!r} is none of the models: {', '.join(self.models)}"
            raise ValueError(msg)
        if len(set(self.seeds)) != len(self.seeds):
            msg = f"seeds names one twice: {self.seeds}"
            raise ValueError(msg)
        return self


class Job(_Section):
    """One fit and one pass over the test images.

    Attributes:
        dataset: Name of the data set.
        model: Name of the model, with the backbone's where there are several.
        baseline: Name of the model that this one is compared with.
        seed: Seed of the job.
        data: ``class_path`` and ``init_args`` of the datamodule; without ``root`` for ELPV.
        elpv: Kind of ELPV's cells to lay out first.
        network: ``class_path`` and ``init_args`` of the model.
        trainer: Arguments of the trainer.
    """

    dataset: str
    model: str
    baseline: str | None
    seed: int
    data: dict[str, Any]
    elpv: str | None
    network: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def label(self) -> str:
        """Name for people, and what ``--only`` is matched with: data set/model/seed."""
        return f"{self.dataset}/{self.model}/{self.seed}"

    @property
    def key(self) -> str:
        """Name of the result's folder: it changes with anything that the result depends on, but the images' content."""
        content = {**self.model_dump(exclude={"dataset", "model", "baseline"}), **_FORMAT}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        readable = re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")[:60]
        return f"{readable}-{digest}"


def read_plan(file: Path) -> Evaluation:
    """Read and check the YAML of an evaluation; ``${oc.env:NAME,default}`` in it is replaced.

    Raises:
        PlanError: If the file cannot be read, or a key or value in it is wrong; the message names each.
    """
    content = _read_yaml(file)
    try:
        return Evaluation.model_validate(content)
    except ValidationError as error:
        problems = [
            f"  {'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg'].removeprefix('Value error, ')}"
            + ("" if isinstance(problem["input"], dict) else f", got {problem['input']!r}")
            for problem in error.errors()
        ]
        raise PlanError("\n".join([f"{file} is no evaluation:", *problems])) from error


def list_jobs(plan: Evaluation, folder: Path) -> tuple[list[Job], dict[str, str]]:
    """Make the jobs of a plan, each checked as anomalib would when it starts.

    Args:
        plan: The evaluation.
        folder: Where the plan's file lies; ``config`` is relative to it.

    Returns:
        The jobs, all models of a data set and seed one after the other; and why an optional data set is skipped, by name.

    Raises:
        PlanError: If a data set is missing and not optional, or none is left, a class unknown, or an argument wrong.
    """
    skipped = {}
    datasets = {}
    for name, dataset in plan.datasets.items():
        if dataset.missing and dataset.optional:
            skipped[name] = dataset.missing
            continue
        if dataset.missing and dataset.folder is not None:  # a datamodule's root may be where it downloads to
            msg = f"datasets.{name}: {dataset.missing}. Say where it is, or set optional: true to go on without it."
            raise PlanError(msg)
        datasets[name] = _datamodule(name, dataset)
    if not datasets:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        msg = f"Every data set is optional, and missing: {reasons}."
        raise PlanError(msg)
    jobs = []
    variants = _variants(plan, folder)
    for name, data in datasets.items():
        for seed in plan.seeds:
            for model, (baseline, network, trainer) in variants.items():
                jobs.append(
                    Job(
                        dataset=name,
                        model=model,
                        baseline=baseline,
                        seed=seed,
                        data=_with_default(data, "seed", seed),
                        elpv=plan.datasets[name].elpv,
                        network=_with_default(network, "random_state", seed),
                        trainer=trainer,
                    )
                )
    return jobs, skipped


def _variants(plan: Evaluation, folder: Path) -> dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]]:
    """Baseline, class with arguments, and trainer's arguments, of every model with every backbone."""
    found = {}
    for name, model in plan.models.items():
        component = _model(name, model, folder)
        for suffix, arguments in _backbones(plan, component).items():
            complete = {**component, "init_args": {**arguments, **component["init_args"]}}
            _check("model", complete, f"models.{name}")
            # A visualizer would write a figure for every image.
            found[name, suffix] = _with_default(complete, "visualizer", False), model.trainer
    variants = {}
    for (name, suffix), (component, trainer) in found.items():
        bases = [backbone for model, backbone in found if model == plan.baseline]
        baseline = plan.baseline + (suffix if suffix in bases else bases[0]) if plan.baseline else None
        variants[name + suffix] = baseline, component, trainer
    return variants


def _backbones(plan: Evaluation, component: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each backbone adds to a model's name, and to its arguments."""
    if not plan.backbones or "backbone" in component["init_args"]:
        return {"": {}}
    if len(plan.backbones) == 1:
        return {"": next(iter(plan.backbones.values()))}
    return {f", {name}": arguments for name, arguments in plan.backbones.items()}


def _model(name: str, model: Model, folder: Path) -> dict[str, Any]:
    if model.config is None:
        return {"class_path": model.class_path, "init_args": model.init_args}
    section = _read_yaml(folder / model.config).get("model")
    if not isinstance(section, dict) or "class_path" not in section:
        msg = f"models.{name}.config: {folder / model.config} has no model section with a class_path."
        raise PlanError(msg)
    return {"class_path": section["class_path"], "init_args": {**(section.get("init_args") or {}), **model.init_args}}


def _datamodule(name: str, dataset: DataSet) -> dict[str, Any]:
    """Class and arguments of a datamodule; for ELPV without its root, which the job knows."""
    if dataset.class_path is not None:
        component = {"class_path": dataset.class_path, "init_args": dataset.init_args}
        _check("data", component, f"datasets.{name}")
        return component
    # Thresholds are chosen on the test images, as the model's own configs do; no metric but the threshold depends on it.
    arguments = {"name": "evaluated", "val_split_mode": "same_as_test", "num_workers": 0}
    arguments |= {"train_batch_size": 16, "eval_batch_size": 16}
    layout = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/defective"}
    if dataset.folder is not None:
        layout = {"root": str(dataset.folder), **_mvtec_layout(f"datasets.{name}", dataset.folder)}
    component = {"class_path": "anomalib.data.Folder", "init_args": {**arguments, **layout, **dataset.init_args}}
    _check("data", component, f"datasets.{name}")
    return component


def _mvtec_layout(where: str, root: Path) -> dict[str, Any]:
    for needed in ("train/good", "test/good"):
        if not (root / needed).is_dir():
            msg = f"{where}.folder: there is no folder {root / needed}. For another layout give class_path and init_args."
            raise PlanError(msg)
    defects = sorted(path.name for path in (root / "test").iterdir() if path.is_dir() and path.name != "good")
    if not defects:
        msg = f"{where}.folder: {root / 'test'} has no folder of defective images beside good."
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
    """The component with an argument of ours, where its class has such a one and the file does not set it."""
    if argument not in inspect.signature(component_class(component)).parameters or argument in component["init_args"]:
        return component
    return {**component, "init_args": {**component["init_args"], argument: value}}


def component_class(component: dict[str, Any]) -> type:
    """The class that a checked component names."""
    module, name = component["class_path"].rsplit(".", 1)
    return getattr(import_module(module), name)


@cache
def component_parser(kind: Literal["data", "model"]) -> ArgumentParser:
    """Parser of a datamodule's or model's ``class_path`` and ``init_args``, as anomalib's own command line reads them."""
    from anomalib.data import AnomalibDataModule
    from anomalib.models import AnomalibModule
    from jsonargparse import ArgumentParser

    from patchcore_plugin.registry import register

    register()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{kind}", type=AnomalibDataModule if kind == "data" else AnomalibModule, required=True)
    return parser


def _check(kind: Literal["data", "model"], component: dict[str, Any], where: str) -> None:
    """Check a component without building it, and complete a short class name.

    Raises:
        PlanError: If there is no such class, or it takes no such argument or value.
    """
    try:
        parsed = component_parser(kind).parse_object({kind: component})
    except Exception as error:  # what importing a user's class may raise
        raise PlanError(f"{where}: {error}") from error
    component["class_path"] = parsed[kind].class_path


def _read_yaml(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except FileNotFoundError as error:
        msg = f"There is no file {file}."
        raise PlanError(msg) from error
    except Exception as error:  # of YAML, of omegaconf, of decoding
        raise PlanError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        msg = f"{file} is no evaluation: it must be a mapping with datasets and models."
        raise PlanError(msg)
    return content
