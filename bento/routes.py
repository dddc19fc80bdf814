"""The service's routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from .forms import FORM, IMAGE_TYPES, check_kind, read_flag, read_image_file, read_image_files
from .methods import describe_methods
from .pipeline import Pipeline
from .problems import PROBLEMS, ProblemError
from .schemas import BatchAnswer, DriftReport, Explanation, ImageAnswer, ModelList, Problem
from .settings import Settings

if TYPE_CHECKING:
    from fastapi.dependencies.models import Dependant
    from pydantic import BaseModel

_MODEL = Query(description="Name of the model; may be left out where there is only one.", max_length=200)
_HEATMAP = Query(description="Answer the heatmap too.")
_KIND = Query(
    description="overlay: the image with its anomalies in color. map: 16-bit gray, 65535 for 1 of the map for display, "
    "whose pixel threshold, sensitivity included, is at 0.5, in the size that the network sees.",
)


async def _pipeline(request: Request) -> Pipeline:  # FastAPI calls a function that is not async in a thread
    return request.app.state.pipeline


async def _settings(request: Request) -> Settings:
    return request.app.state.settings


PipelineDependency = Annotated[Pipeline, Depends(_pipeline)]
SettingsDependency = Annotated[Settings, Depends(_settings)]


async def check_parameters(request: Request) -> None:
    """Refuse a request whose URL has parameters that its route does not take.

    Raises:
        ProblemError: If there is one.
    """
    known = _names_of(request.scope["route"].dependant)
    for name in request.query_params:
        if name not in known:
            taken = f"takes {', '.join(known)}" if known else "takes none"
            raise ProblemError("field_invalid", f"There is no parameter {name[:40]!r} here: the URL {taken}.")


def _names_of(dependant: Dependant) -> list[str]:
    """Names of the parameters of the URL, those of what it depends on included."""
    names = [parameter.alias for parameter in dependant.query_params]
    return names + [name for other in dependant.dependencies for name in _names_of(other)]


def responses_of(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of the problems that a route answers with."""
    meanings: dict[int, list[str]] = {}
    for code in codes:
        status, meaning = PROBLEMS[code]
        meanings.setdefault(status, []).append(f"{code}: {meaning}")
    return {
        status: {"model": Problem, "description": " ".join(texts), "content": {"application/problem+json": {}}}
        for status, texts in meanings.items()
    }


def _body(field: str, *, several: bool = False, **more: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI description of a body with images, and the text fields ``model`` and ``more`` of its form."""
    file = {"type": "string", "contentMediaType": "application/octet-stream", "description": "PNG, JPEG, BMP, TIFF or WebP"}
    image = {"type": "array", "items": file, "minItems": 1} if several else file
    fields = {field: image, "model": {"type": "string", "description": _MODEL.description}, **more}
    form = {"schema": {"type": "object", "properties": fields, "required": [field]}}
    raw = {} if several else {kind: {"schema": {"type": "string", "format": "binary"}} for kind in IMAGE_TYPES}
    return {"requestBody": {"required": True, "content": {FORM: form, **raw}}}


_SCORING = responses_of(
    *("image_missing", "image_unreadable", "form_invalid", "field_invalid", "disconnected", "unauthorized", "model_unknown"),
    *("body_too_large", "image_too_large", "unsupported_media_type"),
    *("busy", "model_unavailable", "runner_unavailable", "timeout"),
)
_BATCH = {**_SCORING, **responses_of("body_too_large", "image_too_large", "batch_too_large")}

router = APIRouter(dependencies=[Depends(check_parameters)])


@router.post(
    "/predict",
    response_model=ImageAnswer,
    responses=_SCORING,
    openapi_extra=_body("image", heatmap={"type": "boolean", "description": _HEATMAP.description}),
)
async def predict(
    request: Request,
    pipeline: PipelineDependency,
    model: Annotated[str | None, _MODEL] = None,
    heatmap: Annotated[bool, _HEATMAP] = False,
) -> Response:
    """Score one image: a form with the file ``image``, or the file's bytes as the body."""
    file, fields = await read_image_file(request, "model", "heatmap")
    wanted = read_flag(fields["heatmap"]) if "heatmap" in fields else heatmap
    answer = await pipeline.predict(file, fields.get("model") or model, heatmap=wanted)
    pipeline.metrics.images.observe(1)
    _log(request, answer)
    return _json(answer)


@router.post("/predict_batch", response_model=BatchAnswer, responses=_BATCH, openapi_extra=_body("images", several=True))
async def predict_batch(
    request: Request, pipeline: PipelineDependency, settings: SettingsDependency, model: Annotated[str | None, _MODEL] = None
) -> Response:
    """Score several images, the files ``images`` of a form. One that cannot be read does not spoil the others."""
    files, named = await read_image_files(request, settings.max_images)
    chosen = pipeline.accept_batch(files, named or model)
    answer = await pipeline.predict_batch(files, chosen, request.state.request_id)
    request.state.log.update(model=chosen, images=len(files))
    return _json(answer)


@router.post(
    "/heatmap",
    responses={200: {"content": {"image/png": {}}, "description": "PNG"}, **_SCORING},
    response_class=Response,
    openapi_extra=_body("image", kind={"type": "string", "enum": ["overlay", "map"], "description": _KIND.description}),
)
async def heatmap(
    request: Request,
    pipeline: PipelineDependency,
    model: Annotated[str | None, _MODEL] = None,
    kind: Annotated[Literal["overlay", "map"], _KIND] = "overlay",
) -> Response:
    """Answer the heatmap of one image as PNG; the headers X-Score, X-Verdict and X-Record have what /predict answers."""
    file, fields = await read_image_file(request, "model", "kind")
    kind = check_kind(fields.get("kind") or kind)
    picture, answer = await pipeline.draw(file, fields.get("model") or model, kind)
    _log(request, answer)
    headers = {"X-Score": repr(answer.score), "X-Verdict": answer.verdict or "", "X-Version": answer.version}
    if answer.record is not None:
        headers["X-Record"] = answer.record
    return Response(picture, media_type="image/png", headers=headers)


@router.post("/explain", response_model=Explanation, responses=_SCORING, openapi_extra=_body("image"))
async def explain(request: Request, pipeline: PipelineDependency, model: Annotated[str | None, _MODEL] = None) -> Response:
    """Score one image, and name the nearest normal patch of each anomalous region."""
    file, fields = await read_image_file(request, "model")
    explanation = await pipeline.explain(file, fields.get("model") or model)
    _log(request, explanation)
    return _json(explanation)


@router.post("/models", include_in_schema=False)  # as BentoML's clients ask
@router.get("/models", responses=responses_of("unauthorized"))
def models(pipeline: PipelineDependency) -> ModelList:
    """All models that requests may name."""
    return pipeline.models()


@router.get("/drift", responses=responses_of("unauthorized"))
def drift(pipeline: PipelineDependency) -> DriftReport:
    """Whether production has moved away from the images that each model was calibrated on."""
    return pipeline.drift.report()


@router.get("/schema.json", include_in_schema=False)
def schema() -> dict[str, Any]:
    """The methods, as BentoML's clients read them."""
    return describe_methods()


@router.get("/metrics", include_in_schema=False)
def metrics(pipeline: PipelineDependency) -> Response:
    """The metrics in Prometheus' text format."""
    return Response(pipeline.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _log(request: Request, answer: ImageAnswer) -> None:
    request.state.log.update(model=answer.model, score=answer.score, verdict=answer.verdict)


def _json(answer: BaseModel) -> Response:
    """The response for an answer, which FastAPI need not validate again."""
    return Response(answer.model_dump_json(), media_type="application/json")
