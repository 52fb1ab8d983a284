"""Reading and writing weights: name tables of families, safetensors and GGUF files."""

from distill.weights.folder import STUDENT, load, read_config, save

__all__ = ["STUDENT", "load", "read_config", "save"]
