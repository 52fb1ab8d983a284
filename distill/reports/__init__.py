"""Run folders to pages and tables."""
