"""The console command ``patchcore``."""

from patchcore_plugin.cli.main import main

__all__ = ["main"]
