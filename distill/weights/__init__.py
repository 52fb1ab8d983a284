"""Language models in and out of files: name tables, and the parameters they make."""

from distill.weights.folder import STUDENT, load, read_config, save

__all__ = ["STUDENT", "load", "read_config", "save"]
