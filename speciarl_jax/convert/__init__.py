"""Weights in and out of Hugging Face and PEFT format, and parity with transformers."""
