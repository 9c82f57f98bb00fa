"""A judge without a model: a tree of names, and a server for it."""
