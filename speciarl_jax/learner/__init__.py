"""The device learns: log-probs on the shared-prefix tree, micro-batches, the update."""
