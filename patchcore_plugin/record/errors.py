"""What can be wrong with a record, or with what is asked of it."""

from patchcore_plugin.errors import PatchcoreError


class RecordError(PatchcoreError, ValueError):
    """A record that cannot be read or written; the message says why, and the way out."""


class UnknownAnswerError(PatchcoreError, LookupError):
    """The record has no answer of an id."""


class OtherImageError(PatchcoreError, ValueError):
    """An image is not the one that was answered."""
