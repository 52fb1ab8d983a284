"""Measurements, contestants in turn in one run."""
