"""The operator's page, and its sample images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from patchcore_plugin.images import SUFFIXES

from .problems import ProblemError

MAX_SAMPLES = 24

_FOLDER = Path(__file__).with_name("ui")
_POLICY = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

router = APIRouter(include_in_schema=False)


class PageFiles(StaticFiles):
    """The page's files. A browser loads nothing from other hosts for them, and asks for new versions."""

    def __init__(self) -> None:
        super().__init__(directory=_FOLDER, html=True)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """The response with a file."""
        response = super().file_response(*args, **kwargs)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Cache-Control"] = "no-cache"  # or an upgrade would leave old scripts with a new page
        return response


@router.get("/")
@router.get("/ui")
def page() -> RedirectResponse:
    """Lead to the page."""
    return RedirectResponse("ui/")


@router.get("/samples")
def samples(request: Request) -> list[str]:
    """Names of the sample images."""
    return sorted(find_samples(request.app.state.settings.samples))


@router.get("/samples/{name}")
def sample(request: Request, name: str) -> FileResponse:
    """A sample image."""
    path = find_samples(request.app.state.settings.samples).get(name)  # no path is made from the name
    if path is None:
        raise ProblemError("sample_unknown", f"There is no sample {name!r}.")
    return FileResponse(path)


def find_samples(folder: Path | None) -> dict[str, Path]:
    """The first images of a folder by file name; none where there is no folder."""
    if folder is None or not folder.is_dir():
        return {}
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    return {path.name: path for path in files[:MAX_SAMPLES] if path.name.isprintable()}
