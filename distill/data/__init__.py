"""Data: builders that prepare examples once, and a loader for which batch k is a pure function of k."""

from distill.data.addition import AdditionConfig
from distill.data.loader import Batch, Loader, shift

__all__ = ["AdditionConfig", "Batch", "Loader", "shift"]
