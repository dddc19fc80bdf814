"""The training world: torch, lightning, anomalib."""
