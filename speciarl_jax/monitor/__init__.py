"""What a person sees of a run: lines, tables, bars, files."""
