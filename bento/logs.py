"""The service's log."""

from __future__ import annotations

import json
import logging
import sys
import time

logger = logging.getLogger("patchcore.service")


def start_logging(form: str) -> None:
    """Write the service's log to standard error.

    Args:
        form: ``"text"`` or ``"json"``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(form))
    for each in (logger, logging.getLogger("patchcore.webhook")):
        each.handlers, each.propagate = [handler], False
        each.setLevel(logging.INFO)


class LogFormatter(logging.Formatter):
    """Formats a log record and its attribute ``fields`` as one line: text and ``name=value`` pairs, or one JSON object.

    Args:
        form: ``"text"`` or ``"json"``.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        fields = getattr(record, "fields", {})
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        if self.form == "json":
            line = {"time": moment, "level": record.levelname, "logger": record.name, "message": text, **fields}
            return json.dumps(line, default=str)
        pairs = " ".join(f"{name}={json.dumps(value, default=str)}" for name, value in fields.items())
        return " ".join(part for part in (moment, record.levelname, text, pairs) if part)
