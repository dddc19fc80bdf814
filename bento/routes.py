"""The service's routes."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from bentoml import get_current_service
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from PIL import Image
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

from patchcore_plugin.bundle import BundleError
from patchcore_plugin.images import SUFFIXES

from .middleware import Door, ProblemError, problem, problem_response
from .repository import UnknownModelError
from .schemas import Answer, Answers, Drifts, Explanation, Item, Models, Problem

if TYPE_CHECKING:
    from .settings import Settings

logger = logging.getLogger("patchcore.service")

PAGE = Path(__file__).with_name("ui")
_FORM = "multipart/form-data"
_RAW = ("application/octet-stream", "image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp")
_POLICY = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
_FIELDS = 16  # of a form, files apart

_MODEL = Query(description="Name of the model; may be left out where there is only one.", max_length=200)
_HEATMAP = Query(description="Also answer the heatmap.")
_KIND = Query(
    description="overlay: the image with its anomalies in colour. map: 16-bit grey, 65535 for 1 of the normalised map, "
    "whose threshold is at 0.5, in the size that the network sees.",
)
_PROBLEMS = {
    status: {"model": Problem, "description": text, "content": {"application/problem+json": {}}}
    for status, text in {
        400: "The body holds no image, or a field has a wrong value.",
        401: "The header X-API-Key is missing or wrong.",
        404: "There is no such model.",
        413: "The body, or an image, is too large.",
        415: "The body is neither a form nor an image.",
        503: "Too many requests (Retry-After says when to try again), or a damaged model.",
        504: "It took too long.",
    }.items()
}


async def _service() -> Any:  # what is not async, FastAPI calls in a thread
    return get_current_service()


Service = Annotated[Any, Depends(_service)]
"""The instance of :class:`~.service.PatchcoreService` in this process."""


def _body(field: str, *, several: bool) -> dict[str, Any]:
    """The OpenAPI description of a body with images."""
    file = {"type": "string", "contentMediaType": "application/octet-stream", "description": "PNG, JPEG, BMP, TIFF or WebP"}
    image = {"type": "array", "items": file, "minItems": 1} if several else file
    text = {"type": "string"}
    fields = {field: image, "model": {**text, "description": _MODEL.description}}
    form = {"schema": {"type": "object", "properties": fields, "required": [field]}}
    raw = {} if several else {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _RAW}
    return {"requestBody": {"required": True, "content": {_FORM: form, **raw}}}


def make_app(settings: Settings) -> FastAPI:
    """The routes, behind their :class:`~.middleware.Door`."""
    app = FastAPI(
        title="PatchCore",
        description="Scores images of parts against normal ones: score, verdict, regions, heatmap.",
        version="1",
        openapi_url="/docs.json",
        docs_url=None,  # it would load its scripts from another host; BentoML's own page at / shows the same document
        redoc_url=None,
    )
    app.add_middleware(Door, settings=settings, metrics=lambda: get_current_service().metrics)

    @app.post("/predict", response_model=Answer, responses=_PROBLEMS, openapi_extra=_body("image", several=False))
    async def predict(
        request: Request,
        service: Service,
        model: Annotated[str | None, _MODEL] = None,
        heatmap: Annotated[bool, _HEATMAP] = False,
    ) -> Response:
        """Score one image: a form with the file ``image``, or the file's bytes as the body."""
        name, content, fields = await _one_image(request)
        wanted = _flag(fields.get("heatmap"), heatmap)
        answer = await service.answer(content, name, fields.get("model") or model, heatmap=wanted)
        request.state.log = {"model": answer.model, "score": answer.score, "verdict": answer.verdict}
        service.metrics.images.observe(1)
        return _json(answer)

    @app.post("/predict_batch", response_model=Answers, responses=_PROBLEMS, openapi_extra=_body("images", several=True))
    async def predict_batch(request: Request, service: Service, model: Annotated[str | None, _MODEL] = None) -> Response:
        """Score several images, the files ``images`` of a form. One that cannot be read does not spoil the others."""
        form = await _form(request, settings.max_images)
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise ProblemError(400, "image_missing", "The form has no file 'images' (curl: --form images=@cell.png).")
        model = _text(form, "model") or model
        chosen = service.resolve(model)

        async def one(file: UploadFile) -> Item:
            name = file.filename or "image"
            try:
                return Item(name=name, answer=await service.answer(await file.read(), name, chosen))
            except ProblemError as error:
                service.metrics.rejected.labels(code=error.code).inc()
                return Item(name=name, problem=problem(error.status, error.code, error.detail, request.state.request_id))

        results = await asyncio.gather(*map(one, files))
        request.state.log = {"model": chosen, "images": len(files)}
        service.metrics.images.observe(len(files))
        return _json(Answers(results=results))

    @app.post(
        "/heatmap",
        responses={200: {"content": {"image/png": {}}, "description": "PNG"}, **_PROBLEMS},
        response_class=Response,
        openapi_extra=_body("image", several=False),
    )
    async def heatmap(
        request: Request,
        service: Service,
        model: Annotated[str | None, _MODEL] = None,
        kind: Annotated[Literal["overlay", "map"], _KIND] = "overlay",
    ) -> Response:
        """Answer the heatmap of one image as PNG; score and verdict are in the headers X-Score and X-Verdict."""
        name, content, fields = await _one_image(request)
        kind = fields.get("kind") or kind
        if kind not in ("overlay", "map"):
            raise ProblemError(400, "field_invalid", f"kind must be 'overlay' or 'map', got {kind!r}.")
        picture, answer = await service.draw(content, name, fields.get("model") or model, kind)
        request.state.log = {"model": answer.model, "score": answer.score, "verdict": answer.verdict}
        headers = {"X-Score": repr(answer.score), "X-Verdict": answer.verdict or "", "X-Version": answer.version}
        return Response(picture, media_type="image/png", headers=headers)

    @app.post("/explain", response_model=Explanation, responses=_PROBLEMS, openapi_extra=_body("image", several=False))
    async def explain(request: Request, service: Service, model: Annotated[str | None, _MODEL] = None) -> Response:
        """Score one image, and name the nearest normal patch of each anomalous region."""
        name, content, fields = await _one_image(request)
        answer = await service.explain(content, name, fields.get("model") or model)
        request.state.log = {"model": answer.model, "score": answer.score, "verdict": answer.verdict}
        return _json(answer)

    @app.get("/models", responses={401: _PROBLEMS[401]})
    def models(service: Service) -> Models:
        """All models that requests may name."""
        return service.models()

    @app.get("/drift", responses={401: _PROBLEMS[401]})
    def drift(service: Service) -> Drifts:
        """Whether production has moved away from the images that each model was calibrated on."""
        return service.watch.describe()

    _add_page(app, settings)
    _answer_problems(app)
    return app


def _add_page(app: FastAPI, settings: Settings) -> None:
    """The page for people, and its samples."""

    @app.get("/samples", include_in_schema=False)
    def samples() -> list[str]:
        return sorted(_samples(settings))

    @app.get("/samples/{name}", include_in_schema=False)
    def sample(name: str) -> FileResponse:
        path = _samples(settings).get(name)  # only names that were listed lead to a file
        if path is None:
            raise ProblemError(404, "sample_unknown", f"There is no sample {name!r}.")
        return FileResponse(path)

    @app.get("/ui", include_in_schema=False)
    def page() -> RedirectResponse:
        return RedirectResponse("ui/")

    app.mount("/ui", _Page(directory=PAGE, html=True), name="ui")


class _Page(StaticFiles):
    """The page's files, which may load nothing from elsewhere."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Cache-Control"] = "no-cache"  # or an upgrade would leave old scripts with a new page
        return response


def _answer_problems(app: FastAPI) -> None:
    """Answer every error with a problem."""

    @app.exception_handler(ProblemError)
    async def known(request: Request, error: ProblemError) -> JSONResponse:
        return problem_response(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        return problem_response(request.scope, ProblemError(400, "field_invalid", f"{wrong}."))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed", 400: "form_invalid"}.get(error.status_code, "http_error")
        return problem_response(request.scope, ProblemError(error.status_code, code, str(error.detail), error.headers))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return problem_response(request.scope, ProblemError(400, "disconnected", "The body ended before its stated length."))

    @app.exception_handler(UnknownModelError)
    async def unknown(request: Request, error: UnknownModelError) -> JSONResponse:
        return problem_response(request.scope, ProblemError(404, "model_unknown", str(error)))

    @app.exception_handler(BundleError)
    async def damaged(request: Request, error: BundleError) -> JSONResponse:
        logger.error("A bundle cannot be served: %s", error)
        text = "The model cannot be loaded; the log says why."  # paths are nobody's business
        return problem_response(request.scope, ProblemError(503, "model_unavailable", text))


def _json(answer: BaseModel) -> Response:
    """An answer, whose own type has checked it already."""
    return Response(answer.model_dump_json(), media_type="application/json")


async def _one_image(request: Request) -> tuple[str, bytes, dict[str, str]]:
    """File name and bytes of a request's image, and the form's other fields."""
    kind = _content_type(request)
    if kind in _RAW or kind.startswith("image/"):
        content = await request.body()
        if not content:
            raise ProblemError(400, "image_missing", "The body is empty; it should be an image file's bytes.")
        return "the body", content, {}
    form = await _form(request, 1)
    file = form.get("image")
    if not isinstance(file, UploadFile):
        said = "is missing" if file is None else "holds text"
        detail = f"The form's field 'image' {said}; send a file (curl: --form image=@cell.png)."
        raise ProblemError(400, "image_missing", detail)
    fields = {name: text for name in ("model", "heatmap", "kind") if (text := _text(form, name)) is not None}
    return file.filename or "image", await file.read(), fields


def _content_type(request: Request) -> str:
    """A body's type without its parameters, in lower case."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


async def _form(request: Request, files: int) -> FormData:
    kind = _content_type(request)
    if kind != _FORM:
        detail = f"The body's type is {kind or 'not given'}; send a form ({_FORM}), or an image (image/png, ...)."
        raise ProblemError(415, "unsupported_media_type", detail)
    try:
        return await request.form(max_files=files, max_fields=_FIELDS)
    except HTTPException as error:  # of the form's parser
        raise ProblemError(400, "form_invalid", f"The form cannot be read: {error.detail}") from error


def _text(form: FormData, name: str) -> str | None:
    value = form.get(name)
    if isinstance(value, UploadFile):
        raise ProblemError(400, "field_invalid", f"The form's field {name!r} is a file; it should be text.")
    return value or None


def _flag(text: str | None, default: bool) -> bool:
    if text is None:
        return default
    values = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if text.lower() not in values:
        raise ProblemError(400, "field_invalid", f"heatmap must be true or false, got {text[:40]!r}.")
    return values[text.lower()]


def _samples(settings: Settings) -> dict[str, Path]:
    folder = settings.samples
    if folder is None or not folder.is_dir():
        return {}
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    return {path.name: path for path in files[:24] if path.name.isprintable()}


def as_png(picture: Image.Image) -> bytes:
    """A picture's PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)  # a tenth of the default's time, and a little larger
    return stream.getvalue()


def as_base64(content: bytes) -> str:
    """For JSON."""
    return base64.b64encode(content).decode()


def as_grey(values: np.ndarray) -> Image.Image:
    """Values in [0, 1] as 16-bit grey."""
    return Image.fromarray((np.clip(values, 0, 1) * 65535).round().astype(np.uint16))
