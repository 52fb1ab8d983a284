"""Language models in and out of files: name tables, and the parameters they make."""

from distill.weights.folder import load, read_config, save

__all__ = ["load", "read_config", "save"]
