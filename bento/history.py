"""The routes of the record: answers of the past, their images, and what operators say of them."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import time
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import Response, StreamingResponse

from patchcore_plugin.names import to_cell
from patchcore_plugin.record import (
    Filter,
    OtherImageError,
    RecordError,
    UnknownAnswerError,
    read_history,
    read_image,
    read_totals,
    say,
)
from patchcore_plugin.record.ids import ID, seconds_of
from patchcore_plugin.record.images import CONTENT_TYPES
from patchcore_plugin.scoring.thresholds import Verdict

from .forms import FORM, read_feedback
from .logs import logger
from .problems import ProblemError
from .record import AnswerRecord
from .routes import check_parameters, responses_of
from .schemas import FeedbackAnswer, History, HourTotals, ImageAnswer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

Result = TypeVar("Result")

MAX_NOTE = 500
"""Largest length of an operator's note, in characters."""

_VERDICTS = get_args(Verdict)
_CSV_COLUMNS = (
    *("time", "record", "request_id", "name", "sha256", "model", "version", "score", "normalized_score", "p_value"),
    *("verdict", "threshold", "ratio", "regions", "milliseconds", "image", "word", "note", "word_time"),
)
_CSV_PAGE = 500  # answers that are read at a time: a long export holds no version of the database
_SECONDS_UNTIL_WRITTEN = 3.0  # from an answer until another process must find it in the record
_DEFAULT_PERIOD = timedelta(days=7)
_ID_PATTERN = f"^{ID.pattern}$"

_NOT_READ = ("unauthorized", "record_off", "record_unavailable", "timeout")
_ID = Path(description="Id of the answer.", pattern=_ID_PATTERN)

router = APIRouter(dependencies=[Depends(check_parameters)])


async def _record(request: Request) -> AnswerRecord:
    record = request.app.state.pipeline.record
    if record is None:
        raise ProblemError(
            "record_off", "The service keeps no record of its answers; the setting PATCHCORE_RECORD turns it on."
        )
    return record


async def _filter(
    model: Annotated[str | None, Query(description="Only answers of this model.", max_length=200)] = None,
    verdict: Annotated[
        str | None,
        Query(
            description=f"Only answers with this verdict: {', '.join(_VERDICTS)}; none: without a verdict.",
            pattern=f"^({'|'.join((*_VERDICTS, 'none'))})$",
        ),
    ] = None,
    since: Annotated[
        datetime | None, Query(description="Only answers at this time or later, ISO 8601, by default UTC.")
    ] = None,
    until: Annotated[datetime | None, Query(description="Only answers before this time, ISO 8601, by default UTC.")] = None,
    feedback: Annotated[
        Literal["good", "bad", "any", "none"] | None,
        Query(description="Only answers whose part an operator has called good, or bad; any: one of both; none: neither."),
    ] = None,
) -> Filter:
    return Filter(model, verdict, since, until, feedback)


RecordDependency = Annotated[AnswerRecord, Depends(_record)]
FilterDependency = Annotated[Filter, Depends(_filter)]


@router.get("/history", response_model=History, responses=responses_of(*_NOT_READ, "field_invalid"))
async def history(
    request: Request,
    record: RecordDependency,
    wanted: FilterDependency,
    limit: Annotated[int, Query(description="Largest number of answers.", ge=1, le=1000)] = 50,
    before: Annotated[
        str | None, Query(description="Only answers before that with this id: next of the page before.", pattern=_ID_PATTERN)
    ] = None,
) -> Response:
    """Recorded answers, the newest first. An answer is there a second after it was given."""
    entries = await _read(request, record, read_history, wanted, limit + 1, before)
    following = entries[limit - 1]["record"] if len(entries) > limit else None
    page = {"answers": [_recorded(entry) for entry in entries[:limit]], "next": following}
    return Response(json.dumps(page), media_type="application/json")


@router.get(
    "/history.csv",
    responses={200: {"content": {"text/csv": {}}, "description": "CSV"}, **responses_of(*_NOT_READ, "field_invalid")},
    response_class=StreamingResponse,
)
async def history_csv(request: Request, record: RecordDependency, wanted: FilterDependency) -> StreamingResponse:
    """Recorded answers as CSV in UTF-8, the newest first.

    A text that a spreadsheet would take for a formula, such as =1+1.png, has a ' before it, and so has a text that begins
    with ': to read a text, take one ' off its beginning.
    """
    read = partial(_read, request, record, read_history, wanted, _CSV_PAGE)
    first = await read(None)  # a problem must come before the answer's head
    headers = {"Content-Disposition": 'attachment; filename="history.csv"'}
    return StreamingResponse(_csv_pages(first, read), media_type="text/csv; charset=utf-8", headers=headers)


@router.get("/history/totals", response_model=HourTotals, responses=responses_of(*_NOT_READ, "field_invalid"))
async def history_totals(request: Request, record: RecordDependency, wanted: FilterDependency) -> Response:
    """Number of recorded answers by hour, model and verdict: of the last seven days, unless since says otherwise.

    The hours that since and until lie in are counted whole.
    """
    since = wanted.since or datetime.now(timezone.utc) - _DEFAULT_PERIOD
    wanted = Filter(wanted.model, wanted.verdict, since, wanted.until, wanted.feedback)
    totals = HourTotals(totals=await _read(request, record, read_totals, wanted))
    return Response(totals.model_dump_json(), media_type="application/json")


@router.get(
    "/history/{record_id}/image",
    responses={
        200: {"content": {kind: {} for kind in CONTENT_TYPES.values()}, "description": "The image file as it was sent."},
        **responses_of(*_NOT_READ, "field_invalid", "answer_unknown", "record_image_missing"),
    },
    response_class=Response,
)
async def history_image(request: Request, record: RecordDependency, record_id: Annotated[str, _ID]) -> Response:
    """The stored image of an answer."""
    found = await _once_written(record_id, partial(_read, request, record, read_image, record_id))
    if found is None:
        raise ProblemError("record_image_missing", f"The record does not have the image of the answer {record_id!r}.")
    content, kind = found
    ending = next(ending for ending, known in CONTENT_TYPES.items() if known == kind)
    headers = {
        "Content-Disposition": f'attachment; filename="{record_id}.{ending}"',
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(content, media_type=kind, headers=headers)


_FEEDBACK_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            FORM: {
                "schema": {
                    "type": "object",
                    "properties": {
                        "record": {"type": "string", "description": _ID.description, "pattern": _ID_PATTERN},
                        "word": {
                            "type": "string",
                            "enum": ["good", "bad"],
                            "description": "Whether the part is good or bad.",
                        },
                        "note": {"type": "string", "maxLength": MAX_NOTE, "description": "What the operator remarks."},
                        "image": {
                            "type": "string",
                            "contentMediaType": "application/octet-stream",
                            "description": "The image file that was answered, for a record that does not have it.",
                        },
                    },
                    "required": ["record", "word"],
                }
            }
        },
    }
}


@router.post(
    "/feedback",
    response_model=FeedbackAnswer,
    responses=responses_of(
        *(*_NOT_READ, "form_invalid", "field_invalid", "disconnected", "answer_unknown", "record_image_differs"),
        *("body_too_large", "unsupported_media_type", "busy"),
    ),
    openapi_extra=_FEEDBACK_FORM,
)
async def feedback(request: Request, record: RecordDependency) -> Response:
    """Record an operator's word: whether the part of an answer is good or bad. A later word replaces an earlier one."""
    fields, image = await read_feedback(request)
    record_id, word, note = fields["record"], fields["word"], fields["note"]
    if not ID.fullmatch(record_id):
        detail = f"record must be the id that an answer has in its field record, got {record_id[:40]!r}."
        raise ProblemError("field_invalid", detail)
    if word not in ("good", "bad"):
        raise ProblemError("field_invalid", f"word must be 'good' or 'bad', got {word[:40]!r}.")
    if len(note) > MAX_NOTE:
        raise ProblemError("field_invalid", f"note may have {MAX_NOTE} characters at most, got {len(note):,}.")
    work = partial(say, record.folder, record_id, word, note, image, record.limit)
    said = await _once_written(record_id, partial(_in_thread, record, work))
    request.state.log.update(record=record_id, word=word)
    return Response(FeedbackAnswer(**said).model_dump_json(), media_type="application/json")


def _recorded(entry: dict[str, Any]) -> dict[str, Any]:
    """An answer of the record as JSON. One that an older version has written may lack fields: they are null then."""
    known = dict.fromkeys(ImageAnswer.model_fields) | entry["answer"] | {"record": entry["record"]}
    return {**entry, "answer": {name: known[name] for name in ImageAnswer.model_fields}}


async def _csv_pages(page: list[dict[str, Any]], read: Callable[[str], Any]) -> AsyncIterator[str]:
    """The text of a CSV file, page by page."""
    stream = io.StringIO()
    table = csv.writer(stream)
    table.writerow(_CSV_COLUMNS)
    while True:
        table.writerows(map(_csv_row, page))
        yield stream.getvalue()
        stream.seek(0)
        stream.truncate()
        if len(page) < _CSV_PAGE:
            return
        page = await read(page[-1]["record"])


def _csv_row(entry: dict[str, Any]) -> list[Any]:
    answer, said = entry["answer"], entry["feedback"] or {}
    values = {
        **answer,
        **entry,
        "regions": None if answer.get("regions") is None else len(answer["regions"]),
        "milliseconds": round(sum((answer.get("milliseconds") or {}).values()), 2),
        "word": said.get("word"),
        "note": said.get("note"),
        "word_time": said.get("time"),
    }
    cells = [values.get(column) for column in _CSV_COLUMNS]
    return [to_cell(cell) if isinstance(cell, str) else cell for cell in cells]


async def _read(request: Request, record: AnswerRecord, work: Callable[..., Result], *arguments: Any) -> Result:
    """Read the record in a thread, for as long as a request may take."""
    seconds = request.app.state.settings.timeout
    return await _in_thread(record, partial(work, record.folder, *arguments, seconds=seconds))


async def _in_thread(record: AnswerRecord, work: Callable[[], Result]) -> Result:
    """Work with the record in a thread.

    Raises:
        ProblemError: If the record cannot be read or written, in time, or lacks what is asked for.
    """
    try:
        return await anyio.to_thread.run_sync(work, limiter=record.readers)
    except UnknownAnswerError as error:
        raise ProblemError("answer_unknown", str(error)) from error
    except OtherImageError as error:
        raise ProblemError("record_image_differs", str(error)) from error
    except TimeoutError as error:
        raise ProblemError("timeout", str(error)) from error
    except (RecordError, OSError, sqlite3.Error) as error:
        logger.error("The record %s cannot be read or written: %s", record.folder, error)
        detail = "The record cannot be read or written; the log says why."
        raise ProblemError("record_unavailable", detail, {"Retry-After": "5"}) from error


async def _once_written(record_id: str, work: Callable[[], Any]) -> Any:
    """Work with an answer, which may have been given a moment ago and not be written yet."""
    begin = time.monotonic()
    while True:
        try:
            return await work()
        except ProblemError as error:
            young = abs(time.time() - seconds_of(record_id)) < _SECONDS_UNTIL_WRITTEN
            if error.code != "answer_unknown" or not young or time.monotonic() - begin > _SECONDS_UNTIL_WRITTEN:
                raise
        await anyio.sleep(0.1)
