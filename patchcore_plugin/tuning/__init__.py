"""Comparison of settings on a user's images (needs torch)."""

from patchcore_plugin.tuning.images import draw_images
from patchcore_plugin.tuning.settings import list_settings
from patchcore_plugin.tuning.tune import TuneReport, make_plan, run_plan

__all__ = ["TuneReport", "draw_images", "list_settings", "make_plan", "run_plan"]
