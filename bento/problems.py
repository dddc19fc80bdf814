"""Problems: how the service says that it has no answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from patchcore_plugin.bundle import BundleError

from .logs import logger
from .repository import UnknownModelError
from .schemas import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request
    from starlette.types import Scope

PROBLEMS = {
    "image_missing": (400, "The request holds no image file."),
    "image_unreadable": (
        400,
        "The file cannot be decoded as an image, has several pages, or is not as deep as those that the model reads.",
    ),
    "form_invalid": (400, "The form cannot be read, or has too many files or fields."),
    "field_invalid": (400, "A field, or a parameter of the URL, is unknown or has a wrong value."),
    "disconnected": (400, "The body ended before its stated length."),
    "request_invalid": (400, "The bytes are no HTTP request."),
    "unauthorized": (401, "The key is missing or wrong: X-API-Key: KEY, or Authorization: Bearer KEY."),
    "origin_foreign": (403, "The page of another site sent the request."),
    "model_unknown": (404, "No model has this name, or the request names none of several."),
    "sample_unknown": (404, "No sample image has this name."),
    "record_off": (404, "The service keeps no record of its answers."),
    "answer_unknown": (404, "The record has no answer of this id: it is too old, or was lost."),
    "record_image_missing": (404, "The record does not have the image of this answer."),
    "not_found": (404, "No route has this path."),
    "method_not_allowed": (405, "The route does not take this method."),
    "record_image_differs": (409, "The image is not the one that was answered."),
    "too_slow": (408, "The request did not arrive in time."),
    "body_too_large": (413, "The body is larger than the limit."),
    "image_too_large": (413, "The image has more pixels than the limit."),
    "batch_too_large": (413, "The images of a request have more pixels together than the limit."),
    "unsupported_media_type": (415, "The body is neither a form in UTF-8 nor an image."),
    "host_unknown": (421, "The header Host has a name that the setting PATCHCORE_HOSTS lacks."),
    "head_too_large": (431, "The head of the request is larger than the limit."),
    "internal": (500, "The service failed; the log says why."),
    "busy": (503, "Too many requests at once; Retry-After says when to try again."),
    "model_unavailable": (503, "The model cannot be loaded; the log says why."),
    "runner_unavailable": (503, "The process that scores is being started again; Retry-After says when to try again."),
    "record_unavailable": (503, "The record cannot be read or written; the log says why."),
    "timeout": (504, "The answer took longer than the limit."),
}
"""Status and meaning of every problem code."""

_ADVICE = {
    404: "No route has this path; GET /docs.json lists the routes.",
    405: "The route does not take this method; the header Allow says which it takes, and GET /docs.json what they do.",
}
_CODES_OF_STATUS = {400: "form_invalid", 404: "not_found", 405: "method_not_allowed"}


class ProblemError(Exception):
    """A request, or one image of several, that gets a problem for an answer.

    Args:
        code: One of :data:`PROBLEMS`.
        detail: A sentence that says what is wrong with this request.
        headers: Headers of the response.
    """

    def __init__(self, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = PROBLEMS[code][0]
        self.code, self.detail, self.headers = code, detail, headers

    def describe(self, request_id: str) -> Problem:
        """The problem as JSON shows it."""
        return Problem(status=self.status, code=self.code, detail=self.detail, request_id=request_id)


def problem_of(error: Exception) -> ProblemError:
    """The problem that answers an exception."""
    if isinstance(error, ProblemError):
        return error
    code, detail = "internal", "The service failed; the log says why."
    if isinstance(error, UnknownModelError):
        code, detail = "model_unknown", str(error)
    elif isinstance(error, RequestValidationError):
        wrong = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        code, detail = "field_invalid", f"{wrong}."
    elif isinstance(error, ClientDisconnect):
        code, detail = "disconnected", "The body ended before its stated length."
    elif isinstance(error, HTTPException) and error.status_code in _CODES_OF_STATUS:
        code = _CODES_OF_STATUS[error.status_code]
        detail = _ADVICE.get(error.status_code, str(error.detail))
    elif isinstance(error, BundleError):  # its message has a path, which is for the log alone
        code, detail = "model_unavailable", "The model cannot be loaded; the log says why."
    return ProblemError(code, detail, getattr(error, "headers", None))


def problem_response(scope: Scope, error: Exception) -> JSONResponse:
    """The response to a request that failed. Logs and counts the failure."""
    problem, request_id = problem_of(error), scope["state"]["request_id"]
    if problem.code == "internal":
        logger.error("Request %s failed", request_id, exc_info=error)
    elif problem.code == "model_unavailable":
        logger.error("Request %s failed: %s", request_id, error)
    elif problem.code in ("host_unknown", "origin_foreign"):
        logger.warning("Request %s was refused: %s", request_id, problem.detail)
    scope["state"]["code"] = problem.code
    scope["app"].state.pipeline.metrics.problems.labels(code=problem.code).inc()
    content = problem.describe(request_id).model_dump()
    return JSONResponse(content, problem.status, problem.headers, media_type="application/problem+json")


async def _answer(request: Request, error: Exception) -> JSONResponse:
    return problem_response(request.scope, error)


EXCEPTION_HANDLERS = dict.fromkeys(
    (ProblemError, UnknownModelError, RequestValidationError, ClientDisconnect, HTTPException, BundleError), _answer
)
"""Handlers for FastAPI of the exceptions that a request may cause."""
