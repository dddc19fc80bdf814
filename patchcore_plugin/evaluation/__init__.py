"""``patchcore evaluate``: data sets x models x seeds, each a job in a process of its own, and a report. Training world."""
