"""Benchmarks: contestants measured in turn within one run."""
