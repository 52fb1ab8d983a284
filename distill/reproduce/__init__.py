"""The sections of REPRODUCE.md."""
