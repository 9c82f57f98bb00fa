"""Rollouts: encode once, prefill once, fork N, decode, hand finished answers out as they come."""
