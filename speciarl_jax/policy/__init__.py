"""The policy: Qwen2.5-VL in Flax NNX. Knows nothing of reinforcement learning."""
