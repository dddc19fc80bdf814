"""The memory bank: the coreset's patch embeddings, and nearest-neighbor search in them on FAISS."""

from patchcore_plugin.memory_bank.bank import MemoryBank
from patchcore_plugin.memory_bank.ensemble import EnsembleBank

__all__ = ["EnsembleBank", "MemoryBank"]
