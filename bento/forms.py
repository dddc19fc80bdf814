"""What a request sends: image files, and the fields of a form."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from .pipeline import ImageFile
from .problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi import Request

FORM = "multipart/form-data"
IMAGE_TYPES = ("application/octet-stream", "image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp")
"""Content types of a body that is an image file itself."""

_MAX_FIELDS = 16  # of a form, its files apart
_MAX_CONTENT_TYPE = 512  # characters
_CHARSETS = {"utf-8", "utf8", "us-ascii", "ascii"}
_FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


async def read_image_file(request: Request, *names: str) -> tuple[ImageFile, dict[str, str]]:
    """Read the image file of a request, and the text fields of its form.

    Args:
        request: The request.
        names: The text fields that the form may have.

    Raises:
        ProblemError: If the request has no image file, or the form is not valid.
    """
    content_type = _content_type(request)
    if content_type in IMAGE_TYPES or content_type.startswith("image/"):
        content = await request.body()
        if not content:
            raise ProblemError("image_missing", "The body is empty; it should be an image file's bytes.")
        return ImageFile("the body", content, request.state.request_id), {}
    advice = f"send an image (image/png, ...), or a form ({FORM}) with the file 'image'"
    form = await _read_form(request, 1, advice, names)
    file = form.get("image")
    if not isinstance(file, UploadFile):
        reason = "is missing" if file is None else "holds text"
        detail = f"The form's field 'image' {reason}; send a file (curl: --form image=@cell.png)."
        raise ProblemError("image_missing", detail)
    fields = {name: text for name in names if (text := _text_of(request, form, name)) is not None}
    return await _image_file(request, file), fields


async def read_image_files(request: Request, max_files: int) -> tuple[list[ImageFile], str | None]:
    """Read the image files of a form, and its field ``model``.

    Raises:
        ProblemError: If the form has no file, or is not valid.
    """
    advice = f"send a form ({FORM}) with the files 'images'; /predict takes an image alone"
    form = await _read_form(request, max_files, advice, ("model",))
    files = [await _image_file(request, value) for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if not files:
        raise ProblemError("image_missing", "The form has no file 'images' (curl: --form images=@cell.png).")
    if any(not isinstance(value, UploadFile) for value in form.getlist("images")):
        raise ProblemError("field_invalid", "A field 'images' of the form holds text; it should be a file.")
    return files, _text_of(request, form, "model")


async def read_feedback(request: Request) -> tuple[dict[str, str], bytes | None]:
    """Read the fields ``record``, ``word`` and ``note`` of a form, and the bytes of its image file if it has one.

    Raises:
        ProblemError: If the form is not valid.
    """
    names = ("record", "word", "note")
    form = await _read_form(request, 1, f"send a form ({FORM}) with the fields 'record' and 'word'", names)
    file = form.get("image")
    if file is not None and not isinstance(file, UploadFile):
        raise ProblemError("field_invalid", "The form's field 'image' holds text; it should be a file.")
    fields = {name: _text_of(request, form, name) or "" for name in names}
    return fields, None if file is None else await file.read()


def check_kind(kind: str) -> Literal["overlay", "map"]:
    """Check the kind of a heatmap.

    Raises:
        ProblemError: If there is no such kind.
    """
    if kind not in ("overlay", "map"):
        raise ProblemError("field_invalid", f"kind must be 'overlay' or 'map', got {str(kind)[:40]!r}.")
    return kind


def read_flag(text: str) -> bool:
    """The value of the field ``heatmap``.

    Raises:
        ProblemError: If the text is not a truth value.
    """
    if text.lower() not in _FLAGS:
        raise ProblemError("field_invalid", f"heatmap must be true or false, got {text[:40]!r}.")
    return _FLAGS[text.lower()]


async def _image_file(request: Request, file: UploadFile) -> ImageFile:
    return ImageFile(file.filename or "image", await file.read(), request.state.request_id)


def _content_type(request: Request) -> str:
    """The body's type without its parameters, in lower case."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _check_form_type(request: Request, advice: str) -> None:
    """Check that the body is a form whose text is UTF-8: other character sets may take long to decode."""
    given = request.headers.get("content-type", "")
    if _content_type(request) != FORM:
        kind = _content_type(request)[:80] or "not given"
        detail = f"The body's type is {kind}; {advice}."
        raise ProblemError("unsupported_media_type", detail)
    if len(given) > _MAX_CONTENT_TYPE or len(request.headers.getlist("content-type")) > 1:
        detail = f"The header Content-Type is given twice, or has more than {_MAX_CONTENT_TYPE} characters; {advice}."
        raise ProblemError("unsupported_media_type", detail)
    charset = parse_options_header(given)[1].get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in _CHARSETS:
        detail = f"The form's character set is {charset[:40]!r}; only UTF-8 is read."
        raise ProblemError("unsupported_media_type", detail)


async def _read_form(request: Request, max_files: int, advice: str, names: Sequence[str]) -> FormData:
    """Read a form with files and these text fields, each once."""
    _check_form_type(request, advice)
    try:
        form = await request.form(max_files=max_files, max_fields=_MAX_FIELDS)
    except HTTPException as error:
        several = " /predict_batch takes several images." if max_files == 1 and "files" in str(error.detail) else ""
        raise ProblemError("form_invalid", f"The form cannot be read: {error.detail}{several}") from error
    files = ("image", "images")
    for name, value in form.multi_items():
        if name not in names and name not in files and not isinstance(value, UploadFile):
            detail = f"There is no field {name[:40]!r} here: beside its files, the form takes {', '.join(names)}."
            raise ProblemError("field_invalid", detail)
    for name in names:
        if len(form.getlist(name)) > 1:
            raise ProblemError("field_invalid", f"The form has its field {name!r} twice.")
    return form


def _text_of(request: Request, form: FormData, name: str) -> str | None:
    value = form.get(name)
    if isinstance(value, UploadFile):
        raise ProblemError("field_invalid", f"The form's field {name!r} is a file; it should be text.")
    if value and request.headers.get("user-agent", "").startswith("BentoML HTTP Client/"):
        return _text_of_json(name, value)
    return value or None


def _text_of_json(name: str, text: str) -> str | None:
    """The value of a field as BentoML's clients send it: JSON, which is ``null`` for an argument that was left out."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, bool):
        return text
    if value is not None and not isinstance(value, str):
        raise ProblemError("field_invalid", f"The form's field {name!r} should be text, got {text[:40]!r}.")
    return value or None
