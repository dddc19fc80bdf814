"""The coreset: an exact, fast farthest-first sampler for patch embeddings, on torch."""

from patchcore_plugin.coreset.sampler import GreedyCoreset

__all__ = ["GreedyCoreset"]
