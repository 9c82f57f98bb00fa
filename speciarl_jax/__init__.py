"""SpeciaRL in JAX: vision-language models, as specific as they can be without being wrong."""
