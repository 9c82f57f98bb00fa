"""Endpoints that are asked: requests, limits, keys, prompts."""
