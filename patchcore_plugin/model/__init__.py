"""The model in anomalib: Lightning module, torch model, backbone, pre- and post-processing."""
