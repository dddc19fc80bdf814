"""The direction of imports: which folder may import which, read from the source files of a tree."""

from __future__ import annotations

import ast
import shutil
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import yaml
from helpers.training import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

# From top to bottom. A folder, or a file beside the folders, imports only from the levels below its own.
LEVELS = (
    {"bento", "cli"},
    {"demo", "tuning"},
    {"cleaning", "evaluation", "export", "operations", "watching"},
    {"model", "runtime"},
    {"coreset", "memory_bank"},
    {"origins", "scoring"},
    {"bundle"},
    {"images"},
    {
        "checks",
        "cpu",
        "depth",
        "drawings",
        "elpv",
        "folders",
        "image_checks",
        "jpeg",
        "pasting",
        "progress",
        "record",
        "registry",
    },
    {"webhook"},
    {"http_client", "locks"},
    {"errors", "moving", "side_effects", "names"},
)
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}

TORCH_FOLDERS = {"cleaning", "coreset", "evaluation", "export", "model", "tuning"}
TORCH_PACKAGES = {"torch", "torchvision", "lightning", "pytorch_lightning", "anomalib", "timm", "jsonargparse"}
LAZY_TORCH = {"cli", "demo", "registry"}  # import them inside functions and for types, as some commands train

RUN_TIME = frozenset({"module", "function"})
PACKAGE = "patchcore_plugin"
FACE = f"{PACKAGE}/__init__.py"  # its names are loaded at first use, from the modules that its type imports name


class Import(NamedTuple):
    """One import statement's target.

    Attributes:
        file: The importing file, relative to the tree.
        line: Its line.
        target: The imported file, relative to the tree, or the name of another package.
        place: ``"module"``, ``"function"`` or ``"types"``, the last for imports under TYPE_CHECKING.
    """

    file: str
    line: int
    target: str
    place: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def source_files(tree: Path) -> list[Path]:
    return sorted([*tree.glob(f"{PACKAGE}/**/*.py"), *tree.glob("bento/**/*.py")])


def folder_of(file: str) -> str:
    """``"bento"``, the folder below the package, or the stem of a file beside those folders."""
    top, *rest = Path(file).parts
    return top if top == "bento" else Path(rest[0]).stem


def module_of(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    return ".".join([*([] if parts[0] == PACKAGE else [PACKAGE]), *parts]).removesuffix(".__init__")


def read_imports(tree: Path) -> list[Import]:
    """All imports of the tree's source files; a name that the package itself hands on counts as one from its module."""
    files = {module_of(name): name for name in (str(path.relative_to(tree).as_posix()) for path in source_files(tree))}
    statements = {name: list(statements_of(ast.parse((tree / name).read_text()))) for name in files.values()}
    public = {alias.name: node.module for node, place in statements[FACE] if place == "types" for alias in node.names}
    return [
        Import(name, node.lineno, files.get(module, module.partition(".")[0]), place)
        for name, nodes in statements.items()
        for node, place in nodes
        for module in modules_of(node, name, files, public)
    ]


def statements_of(node: ast.AST, place: str = "module") -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Import statements below a node, each with its place."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, place
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.body:
            yield from statements_of(child, "types")
        for child in node.orelse:
            yield from statements_of(child, place)
    else:
        inner = "function" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else place
        for child in ast.iter_child_nodes(node):
            yield from statements_of(child, inner)


def modules_of(node: ast.Import | ast.ImportFrom, file: str, files: dict[str, str], public: dict[str, str]) -> list[str]:
    """The modules that a statement imports, those of another folder with the packages that they lie in."""
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    else:
        package = module_of(file) if file.endswith("__init__.py") else module_of(file).rpartition(".")[0]
        source = resolve_name("." * node.level + (node.module or ""), package)
        found = [submodule if (submodule := f"{source}.{alias.name}") in files else source for alias in node.names]
        if source == PACKAGE:
            found = [public.get(alias.name, module) for alias, module in zip(node.names, found, strict=True)]
    outside = [module.rpartition(".")[0] for module in found if module in files]
    own = module_of(file)
    return sorted({*found, *(package for package in outside if not f"{own}.".startswith(f"{package}."))})


def upward_imports(tree: Path) -> list[str]:
    """Imports between folders that do not go to a lower level."""
    found = []
    for item in read_imports(tree):
        if item.file == FACE or item.target == FACE or not item.target.endswith(".py"):
            continue
        source, target = folder_of(item.file), folder_of(item.target)
        if source != target and LEVEL[source] >= LEVEL[target]:
            found.append(f"{item}, but {source} is not above {target}")
    return found


def circles(tree: Path, places: frozenset[str] = RUN_TIME) -> list[str]:
    """The first circle of files found that import each other, by imports in these places."""
    graph: dict[str, set[str]] = {}
    for item in read_imports(tree):
        if item.place in places and item.target != item.file:
            graph.setdefault(item.file, set()).add(item.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def torch_imports(tree: Path) -> list[str]:
    """Imports of torch, of what needs it, or of our folders that do, outside of those folders."""
    found = []
    for item in read_imports(tree):
        source = folder_of(item.file)
        own = item.target.endswith(".py")
        torch = folder_of(item.target) in TORCH_FOLDERS if own else item.target in TORCH_PACKAGES
        lazy = item.place != "module" and source in LAZY_TORCH
        if torch and source not in TORCH_FOLDERS and not lazy and item.file != FACE:
            found.append(f"{item}, but {source} works without torch")
    return found


def bento_differences(tree: Path) -> set[str]:
    """Folders that the bento lacks, or should not have."""
    include = yaml.safe_load((tree / "bento" / "bentofile.yaml").read_text())["include"]
    listed = {line.removesuffix("/*.py") for line in include if line.endswith("/*.py")}
    folders = {path.relative_to(tree).parent.as_posix() for path in source_files(tree)} - {"bento/examples"}
    return listed ^ {folder for folder in folders if Path(folder).name not in TORCH_FOLDERS}


def test_every_folder_has_a_level():
    assert {folder_of(path.relative_to(ROOT).as_posix()) for path in source_files(ROOT)} - {"__init__"} == set(LEVEL)


def test_imports_go_down():
    assert upward_imports(ROOT) == []


@pytest.mark.parametrize("places", [RUN_TIME, RUN_TIME | {"types"}])
def test_no_circle(places):
    assert circles(ROOT, places) == []


def test_torch_is_in_its_folders_alone():
    assert torch_imports(ROOT) == []
    importing = {folder_of(item.file) for item in read_imports(ROOT) if item.target in TORCH_PACKAGES}
    assert importing >= TORCH_FOLDERS


def test_bento_has_the_folders_without_torch():
    assert bento_differences(ROOT) == set()


@pytest.fixture
def tree(tmp_path):
    """A copy of the source, to break."""
    for folder in (PACKAGE, "bento"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(
    ("rule", "file", "line", "named"),
    [
        (upward_imports, "scoring/scores.py", "from patchcore_plugin import PatchcoreRuntime", "runtime/__init__.py"),
        (upward_imports, "images.py", "def f():\n    from patchcore_plugin.bundle import folder", "bundle/folder.py"),
        (upward_imports, "runtime/network.py", "import patchcore_plugin.operations.update", "operations/update.py"),
        (upward_imports, "memory_bank/bank.py", "from ..runtime import Prediction", "runtime/__init__.py"),
        (circles, "bundle/manifest.py", "from . import folder", "bundle/folder.py"),
        (circles, "scoring/scores.py", "def f():\n    from patchcore_plugin import PatchcoreRuntime", "runtime/__init__.py"),
        (torch_imports, "memory_bank/bank.py", "import torch.nn as nn", "torch"),
        (torch_imports, "runtime/runtime.py", "def f():\n    from anomalib.data import Folder", "anomalib"),
        (torch_imports, "../bento/service.py", "def f():\n    from patchcore_plugin import export", "export/__init__.py"),
        (torch_imports, "cli/main.py", "from patchcore_plugin import FaissPatchcore", "model/lightning_model.py"),
    ],
)
def test_a_wrong_import_is_found(tree, rule, file, line, named):
    path = (tree / PACKAGE / file).resolve()
    path.write_text(f"{path.read_text()}\n{line}\n")
    message = "\n".join(rule(tree))
    assert path.relative_to(tree).as_posix() in message
    assert named in message


def test_type_imports_make_no_circle_at_run_time(tree):
    path = tree / PACKAGE / "bundle" / "manifest.py"
    path.write_text(f"{path.read_text()}\nif TYPE_CHECKING:\n    from patchcore_plugin.bundle import folder\n")
    assert circles(tree, RUN_TIME) == []
    assert "bundle/folder.py" in circles(tree, RUN_TIME | {"types"})[0]


@pytest.mark.parametrize(
    ("before", "after", "folder"),
    [
        ("  - patchcore_plugin/runtime/*.py\n", "", "patchcore_plugin/runtime"),
        ("include:\n", "include:\n  - patchcore_plugin/model/*.py\n", "patchcore_plugin/model"),
    ],
)
def test_a_wrong_bento_is_found(tree, before, after, folder):
    file = tree / "bento" / "bentofile.yaml"
    file.write_text(file.read_text().replace(before, after))
    assert bento_differences(tree) == {folder}
