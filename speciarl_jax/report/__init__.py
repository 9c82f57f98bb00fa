"""The report of a run: figures, tables for the terminal, and one static page."""
