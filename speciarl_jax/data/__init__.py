"""Data: sources, prompts, images, positions and the loader. Host side; starts no jax backend."""
