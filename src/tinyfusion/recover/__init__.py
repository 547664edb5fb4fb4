"""Recover a pruned model by fine-tuning or distillation, as objectives of the training loop."""
