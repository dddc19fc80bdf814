"""The base class of every error that a user can cause and mend."""

from __future__ import annotations


class PatchcoreError(Exception):
    """Base class of the errors that a user can cause and mend; the message names the bad value and the way out.

    The command line prints such an error as one sentence. Any other exception is a bug of this package and keeps its
    traceback.
    """


class UsageError(PatchcoreError, ValueError):
    """An argument, or the data that an argument names, does not fit; the message names it and what would fit."""


class MissingPackageError(PatchcoreError, ImportError):
    """A package that only a part of this one needs is not installed; the message says how to install it."""
