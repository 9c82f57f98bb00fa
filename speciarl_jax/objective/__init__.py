"""The paper's mathematics, pure: rewards, advantages, token weights, losses."""
