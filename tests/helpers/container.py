"""The steps of a Dockerfile, run in a folder where no container engine is at hand.

The folder stands for the image's root: ``/app`` and ``/home`` are folders in it. The base image is the Python that runs the
tests, and its user the one of the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from string import Template

DOCKERFILE = "env/docker/Dockerfile"


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile, each with its arguments; comments left out, and continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in lines) if name]


class ContainerImage:
    """What the steps of a Dockerfile have made.

    Args:
        context: Folder of the build, with BentoML's Dockerfile in it.
        root: Folder for the image.
        install: Run the steps RUN; without them, the packages are those of the Python that runs the tests.

    Attributes:
        environment: The environment of a process in it.
        entrypoint: Its command.
        health_check: The command that tells whether it is well.
    """

    def __init__(self, context: Path, root: Path, *, install: bool) -> None:
        self.root = root
        base = {name: value for name, value in os.environ.items() if not name.startswith(("PATCHCORE_", "PYTHON"))}
        self.environment = {**base, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": ""}
        folder = root
        for name, rest in instructions((context / DOCKERFILE).read_text()):
            text = Template(rest).safe_substitute(self.environment)
            if name in ("ENV", "ARG"):
                variable, _, value = text.partition("=")
                self.environment[variable] = self._inside(value.strip('"'))
            elif name == "WORKDIR":
                folder = Path(self._inside(text))
                folder.mkdir(parents=True, exist_ok=True)
            elif name == "COPY":
                source, target = text.split()
                self._copy(context / source, folder / target)
            elif name == "RUN" and install and not re.search(r"\b(groupadd|chown)\b", text):
                subprocess.run(self._inside(text), shell=True, cwd=folder, env=self.environment, check=True, timeout=900)
            elif name == "ENTRYPOINT":
                (file,) = json.loads(self._inside(text))
                self.entrypoint = ("bash", file)
            elif name == "HEALTHCHECK":
                self.health_check = json.loads(text.partition("CMD ")[2])

    def _inside(self, text: str) -> str:
        """A text whose absolute paths lie in the folder."""
        return re.sub(r"(?<![\w./])/(app|home)\b", rf"{self.root}/\1", text)

    def _copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
            script = target / "env" / "docker" / "entrypoint.sh"  # which names /app too
            script.write_text(self._inside(script.read_text()))
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
