"""Old place of Origins: torch exports (.pt) of version 0.1 pickle it by this name."""

from patchcore_plugin.bundle.origins import Origins

__all__ = ["Origins"]
