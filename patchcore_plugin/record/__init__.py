"""The record: a folder with the answers of the service in a database, what operators said of them, and stored images.

:func:`read_said` reads what teaches a model; :class:`RecordWriter` writes answers as the service gives them.
"""

from patchcore_plugin.record.database import prepare
from patchcore_plugin.record.errors import OtherImageError, RecordError, UnknownAnswerError
from patchcore_plugin.record.reading import Filter, SaidImage, read_history, read_image, read_said, read_totals
from patchcore_plugin.record.writer import RecordWriter
from patchcore_plugin.record.writing import Answer, Word, say

__all__ = [
    "Answer",
    "Filter",
    "OtherImageError",
    "RecordError",
    "RecordWriter",
    "SaidImage",
    "UnknownAnswerError",
    "Word",
    "prepare",
    "read_history",
    "read_image",
    "read_said",
    "read_totals",
    "say",
]
