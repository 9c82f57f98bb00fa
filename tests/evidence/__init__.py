"""The rows of docs/results.md: run in the background, resumable, and made into tables."""
