"""A run's state and place: what it opens, saves, restores, and where it is kept."""
