"""Reports: run folders as HTML pages, and tables for the terminal."""
