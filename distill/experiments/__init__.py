"""Experiments: one configuration, one run folder, one summary."""
