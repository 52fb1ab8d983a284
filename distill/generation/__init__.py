"""Writing text."""
