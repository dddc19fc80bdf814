"""The memory bank: the coreset's patch embeddings, and nearest-neighbor search in them on FAISS."""

from patchcore_plugin.memory_bank.bank import MemoryBank
from patchcore_plugin.memory_bank.defects import Defects, read_defects, write_defects
from patchcore_plugin.memory_bank.ensemble import EnsembleBank, join_banks, save_banks

__all__ = ["Defects", "EnsembleBank", "MemoryBank", "join_banks", "read_defects", "save_banks", "write_defects"]
