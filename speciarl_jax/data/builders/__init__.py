"""TFDS builders that write ArrayRecord files without TensorFlow."""
