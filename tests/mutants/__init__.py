"""Mutation testing of the rooms that hold the numerics: `make mutants`."""
