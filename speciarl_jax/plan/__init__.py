"""`speciarl plan`: every program of a step compiled for a machine that is not there."""
