"""The training loop, its state, optimiser and checkpoints, and the ranks that share it."""
