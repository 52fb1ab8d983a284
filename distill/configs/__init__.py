"""One experiment per file: ``get_config()``, and a docstring with command, hardware, minutes and score."""
