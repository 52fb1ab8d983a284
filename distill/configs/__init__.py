"""One experiment per file: ``get_config()``, its docstring telling command, hardware, minutes and score."""
