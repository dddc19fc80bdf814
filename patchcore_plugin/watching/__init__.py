"""A folder that is watched: each new image is answered once, whatever happens to the program meanwhile."""

from patchcore_plugin.watching.loop import Options, Summary, watch
from patchcore_plugin.watching.scorers import RuntimeScorer, Scorer, ServiceScorer

__all__ = ["Options", "RuntimeScorer", "Scorer", "ServiceScorer", "Summary", "watch"]
