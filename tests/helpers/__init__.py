"""Code that several tests and benchmarks share."""
