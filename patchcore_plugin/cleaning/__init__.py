"""Check of a folder of normal images before a training (needs torch)."""

from patchcore_plugin.cleaning.check import CheckReport, Finding, check_images
from patchcore_plugin.cleaning.embedding import DEFAULT_ARGUMENTS
from patchcore_plugin.cleaning.report import write_list, write_report

__all__ = ["DEFAULT_ARGUMENTS", "CheckReport", "Finding", "check_images", "write_list", "write_report"]
