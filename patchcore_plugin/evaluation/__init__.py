"""``patchcore evaluate``: train and test models on data sets with several seeds, and write a report. Needs torch."""
