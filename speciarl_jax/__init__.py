"""SpeciaRL in JAX: train a vision-language model to be as specific as it can without being wrong."""
