"""What a check writes: a page that needs no other file, and the list of images to leave out."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader
from PIL import Image, ImageDraw

from patchcore_plugin import __version__
from patchcore_plugin.bundle import Box, Preprocessing
from patchcore_plugin.cleaning.evidence import SUSPICIOUS_SCORE
from patchcore_plugin.errors import writing
from patchcore_plugin.images import read_image
from patchcore_plugin.names import as_line
from patchcore_plugin.runtime.heatmap import overlay

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from patchcore_plugin.cleaning.check import CheckReport, Suspect

_PICTURE_HEIGHT, _PICTURE_WIDTH = 240, 480  # pixels, at most
_TITLES = {
    "unreadable": "Cannot be read",
    "unlike the mask": "Do not fit the mask of the region of interest",
    "suspicious": "Suspicious",
    "copy": "Copies of another image",
    "in the test folder": "In the test folder too",
    "odd size": "Another size than nearly all images",
    "odd depth": "Other channels or depth than nearly all images",
}
_NO_CROP = Preprocessing(resize=(1, 1), mean=(0, 0, 0), std=(1, 1, 1))


def write_list(images: Sequence[Path], file: Path) -> list[Path]:
    """Write the absolute paths of images, one a line, in UTF-8; the bytes of a name that are no UTF-8 stay as they are.

    Returns:
        Images that the list cannot name, as their path has a line break.
    """
    paths = {image: str(image.absolute()) for image in images}
    unlisted = [image for image, path in paths.items() if "\n" in path or "\r" in path]
    lines = "".join(f"{path}\n" for image, path in paths.items() if image not in unlisted)
    with writing(file):
        file.write_bytes(lines.encode("utf-8", "surrogateescape"))
    return unlisted


def write_report(report: CheckReport, folder: Path, file: Path) -> None:
    """Write the page.

    Args:
        report: What was found.
        folder: The folder that was checked; names are shown relative to it.
        file: HTML file to write.
    """
    environment = Environment(loader=PackageLoader("patchcore_plugin.cleaning", "."), autoescape=True, trim_blocks=True)

    def name(path: Path) -> str:
        return as_line(str(path.relative_to(folder) if path.is_relative_to(folder) else path))

    sections = [
        (title, [(name(f.image), f.text, name(f.like) if f.like else "") for f in report.findings if f.kind == kind])
        for kind, title in _TITLES.items()
    ]
    page = environment.get_template("report.html.j2").render(
        folder=as_line(str(folder)),
        images=len(report.images),
        ranked=len(report.ranked),
        limit=SUSPICIOUS_SCORE,
        left_out=len(report.leave_out),
        sections=[(title, lines) for title, lines in sections if lines],
        cards=[_card(suspect, report, name(suspect.image), name(suspect.like)) for suspect in report.suspects],
        region=report.region is not None,
        version=__version__,
    )
    with writing(file):
        file.write_text(page, encoding="utf-8", newline="\n")


def _card(suspect: Suspect, report: CheckReport, name: str, like: str) -> dict[str, object]:
    """Image, anomaly map and nearest likeness, each as a data URL, with their names."""
    image = read_image(suspect.image, intensity_range=report.intensity_range)
    seen = _NO_CROP
    if report.region is not None:
        seen = seen.model_copy(update={"resize": report.region.size, "region": report.region})
    heat = overlay(image, suspect.map / max(2 * report.map_limit, 1e-6), seen)
    other = read_image(suspect.like, intensity_range=report.intensity_range)
    grid = suspect.map.shape
    return {
        "name": name,
        "like": like,
        "score": f"{suspect.score:.1f}",
        "suspicious": suspect.score > SUSPICIOUS_SCORE,
        "image": _url(Image.fromarray(image)),
        "map": _url(_marked(heat, suspect.place, grid)),
        "like_image": _url(_marked(Image.fromarray(other), suspect.like_place, grid)),
    }


def _marked(picture: Image.Image, place: tuple[int, int], grid: tuple[int, ...]) -> Image.Image:
    """The picture with a box around a patch."""
    picture = _small(picture)
    box = Box(0, 0, picture.width, picture.height).cell(*place, grid).rounded()
    left, top, right, bottom = box.corners
    ImageDraw.Draw(picture).rectangle((left - 6, top - 6, right + 6, bottom + 6), outline="blue", width=2)
    return picture


def _small(picture: Image.Image) -> Image.Image:
    factor = min(_PICTURE_WIDTH / picture.width, _PICTURE_HEIGHT / picture.height)
    return picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))))


def _url(picture: Image.Image) -> str:
    content = io.BytesIO()
    _small(picture).save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
