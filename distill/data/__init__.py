"""Data: builders that prepare examples once, and loaders for which batch k is a pure function of k."""

from distill.batch import Batch, shift
from distill.data.addition import AdditionConfig
from distill.data.loader import Loader

__all__ = ["AdditionConfig", "Batch", "Loader", "shift"]
