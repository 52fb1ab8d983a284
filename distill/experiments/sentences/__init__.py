"""A sentence encoder distilled into one with fewer layers."""
