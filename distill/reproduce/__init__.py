"""Reproduction: the runs and the sections of REPRODUCE.md."""
