"""Language models in and out of files: name tables, and the parameters they make."""
