"""Predictions to metrics with intervals; pure."""
