"""The methods of the service for BentoML's clients, and for services that depend on this one.

Over HTTP, the methods' routes are those of :mod:`.routes`; BentoML's clients read from ``/schema.json`` how to call them. A
service with ``bentoml.depends(PatchcoreService)`` talks to this one through a Unix socket; then BentoML calls the methods.
"""

from __future__ import annotations

import io
import typing
from http import HTTPStatus
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar

import anyio.to_thread
import bentoml
import numpy as np
from bentoml.exceptions import BentoMLException
from PIL import Image
from pydantic import BaseModel, create_model
from pydantic_core import core_schema
from starlette.datastructures import UploadFile
from starlette.responses import Response

from .encoding import to_png
from .forms import check_kind
from .middleware import new_request_id
from .pipeline import ImageFile
from .problems import ProblemError, problem_of, problem_response
from .schemas import BatchAnswer, Explanation, ImageAnswer, ModelList

if typing.TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .pipeline import Pipeline

Result = TypeVar("Result")

NAME = "patchcore"
"""Name of the service."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # of Pillow's, those that a PNG file keeps as they are


class ImageStream(io.BytesIO, typing.BinaryIO):
    """An image file in memory, as BentoML's clients send it.

    Args:
        content: The file's bytes.
        name: Its name.
    """

    def __init__(self, content: bytes, name: str = "image") -> None:
        super().__init__(content)
        self._name = name

    @property
    def name(self) -> str:
        """Name of the file."""
        return self._name

    @classmethod
    def of(cls, image: Any) -> ImageStream:
        """The image file of what a caller has.

        Args:
            image: Path of a file; its bytes, or a stream of them; a picture of Pillow, or an image (H, W) or (H, W, 3), u8,
                or (H, W), u16: these become a PNG file. From another process, a pair of a file's name and bytes.

        Raises:
            ValueError: If it is something else, or the path leads to no file that can be read.
        """
        match image:
            case ImageStream():
                return image
            case str() | PurePath():
                content, name = _read_file(image)
            case bytes() | bytearray() | memoryview():
                content, name = bytes(image), "image"
            case [str() as name, bytes() as content]:
                pass
            case Image.Image():
                content, name = _png_of(image)
            case np.ndarray():
                content, name = _png_of(_picture_of(image))
            case UploadFile():
                content, name = image.file.read(), image.filename or "image"
            case _:
                content, name = _read_stream(image)
        return cls(content, name)


def _read_file(path: str | PurePath) -> tuple[bytes, str]:
    if "://" in str(path):
        msg = f"the image is the URL {str(path)[:80]!r}; send a path, bytes, a picture or an array: URLs are not fetched."
        raise ValueError(msg)
    try:
        return Path(path).read_bytes(), Path(path).name
    except OSError as error:
        msg = f"the image {path} cannot be read: {error.strerror}."
        raise ValueError(msg) from error


def _read_stream(stream: Any) -> tuple[bytes, str]:
    content = stream.read() if callable(getattr(stream, "read", None)) else None
    if not isinstance(content, bytes):
        msg = f"an image is a path, bytes, a picture of Pillow or an array, got {type(stream).__name__}."
        raise ValueError(msg)  # noqa: TRY004  # pydantic takes it for a wrong value
    return content, PurePath(str(getattr(stream, "name", "image"))).name


def _png_of(picture: Image.Image) -> tuple[bytes, str]:
    if picture.mode not in _PNG_MODES:
        msg = f"a picture of mode {picture.mode} cannot be sent; convert it to RGB, or send the file itself."
        raise ValueError(msg)
    name = PurePath(str(getattr(picture, "filename", None) or "image")).stem
    return to_png(picture), f"{name}.png"


def _picture_of(image: np.ndarray) -> Image.Image:
    is_color = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    is_gray = image.ndim == 2 and image.dtype in (np.uint8, np.uint16)
    if not image.size or not (is_color or is_gray):
        msg = (
            f"an array {image.shape}, {image.dtype}, cannot be sent; it should be (H, W) or (H, W, 3), uint8, or (H, W), "
            "uint16. Other images can be sent as files."
        )
        raise ValueError(msg)
    return Image.fromarray(image)


class ImageInput(PurePath):
    """Type of the methods' images: what :meth:`ImageStream.of` takes. BentoML sends an input of a path's type as a file."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """How pydantic reads an image, and how it goes to another process: as its name and bytes."""
        return core_schema.no_info_plain_validator_function(
            ImageStream.of,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda stream: (stream.name, stream.getvalue())),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        """What BentoML's clients know as a file."""
        return {"type": "file", "format": "image"}


class WithoutExamples(BaseModel):
    """Base class of the methods' answers. `bentoml build` knows no examples in a schema."""

    @staticmethod
    def of(answer: type[BaseModel]) -> type[BaseModel]:
        """The class of an answer, without examples."""
        return create_model(answer.__name__, __base__=(WithoutExamples, answer))

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """The schema."""
        schema = super().model_json_schema(*args, **options)
        for part in (schema, *schema.get("$defs", {}).values()):
            part.pop("examples", None)
        return schema


class PatchcoreMethods:
    """The methods. An error is one of :mod:`bentoml.exceptions`, whose text is the problem that HTTP would answer.

    Attributes:
        pipeline: The pipeline that answers.
    """

    pipeline: Pipeline

    @bentoml.api(output_spec=WithoutExamples.of(ImageAnswer))
    async def predict(
        self, image: ImageInput, model: str | None = None, heatmap: bool = False, ctx: bentoml.Context = None
    ) -> ImageAnswer:
        """Score one image.

        Args:
            image: What :meth:`ImageStream.of` takes.
            model: Name of the model; may be left out where there is only one.
            heatmap: Answer the heatmap too.
            ctx: BentoML's context of the call; None where a service calls this one in its own process.
        """
        return await _answer(ctx, lambda id_: self.pipeline.predict(_file(image, id_), model, heatmap=heatmap))

    @bentoml.api(output_spec=WithoutExamples.of(BatchAnswer))
    async def predict_batch(
        self, images: list[ImageInput], model: str | None = None, ctx: bentoml.Context = None
    ) -> BatchAnswer:
        """Score several images, as :meth:`predict` does. One that cannot be read does not spoil the others."""

        async def work(id_: str) -> BatchAnswer:
            files = [_file(image, id_) for image in images]
            return await self.pipeline.predict_batch(files, self.pipeline.accept_batch(files, model), id_)

        return await _answer(ctx, work)

    @bentoml.api
    async def heatmap(
        self,
        image: ImageInput,
        model: str | None = None,
        kind: Literal["overlay", "map"] = "overlay",
        ctx: bentoml.Context = None,
    ) -> Image.Image:
        """Draw the heatmap of one image: the image with its anomalies in color, or the map, 16-bit gray."""
        drawn = await _answer(ctx, lambda id_: self.pipeline.draw(_file(image, id_), model, check_kind(kind)))
        if isinstance(drawn, Response):
            return drawn
        png, _ = drawn
        return Image.open(io.BytesIO(png)) if ctx is None else Response(png, media_type="image/png")

    @bentoml.api(output_spec=WithoutExamples.of(Explanation))
    async def explain(self, image: ImageInput, model: str | None = None, ctx: bentoml.Context = None) -> Explanation:
        """Score one image, and name the nearest normal patch of each anomalous region."""
        return await _answer(ctx, lambda id_: self.pipeline.explain(_file(image, id_), model))

    @bentoml.api(output_spec=WithoutExamples.of(ModelList))
    async def models(self) -> ModelList:
        """All models that calls may name."""
        return await anyio.to_thread.run_sync(self.pipeline.models)


ROUTES = {name: member.route for name, member in vars(PatchcoreMethods).items() if hasattr(member, "route")}
"""Path of each method."""


def describe_methods() -> dict[str, Any]:
    """The document ``/schema.json``, from which BentoML's clients learn the methods."""
    methods = [getattr(PatchcoreMethods, name) for name in ROUTES]
    # BentoML's own schema of an answer forgets which fields may be null, and its clients fail at a null list.
    methods = [{**method.schema(), "output": method.output_spec.model_json_schema()} for method in methods]
    return {"name": NAME, "type": "service", "description": PatchcoreMethods.__doc__, "routes": methods}


def _file(image: Any, request_id: str) -> ImageFile:
    try:
        stream = ImageStream.of(image)
    except ValueError as error:
        raise ProblemError("image_missing", str(error)) from error
    return ImageFile(stream.name, stream.getvalue(), request_id)


async def _answer(ctx: bentoml.Context | None, work: Callable[[str], Awaitable[Result]]) -> Result | Response:
    """Await work, which is given the id of the request. An error is answered to a call of another process, or raised."""
    if ctx is not None:
        try:
            return await work(ctx.request.state.request_id)
        except Exception as error:
            response = problem_response(ctx.request.scope, error)
            ctx.response.status_code = response.status_code  # BentoML puts it in place of the response's own
            return response
    request_id = new_request_id()
    try:
        return await work(request_id)
    except Exception as error:
        problem = problem_of(error)
        if problem.code == "internal":
            raise
        status = HTTPStatus(problem.status)
        kind = BentoMLException.error_mapping.get(status, BentoMLException)
        raise kind(problem.describe(request_id).model_dump_json(), error_code=status) from error
