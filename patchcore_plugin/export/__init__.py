"""From a trained model to a bundle."""

from patchcore_plugin.export.export import export_bundle

__all__ = ["export_bundle"]
