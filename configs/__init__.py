"""anomalib configurations, one per job a user would start from."""
