"""Noising processes and training objectives: random draws, predictions, losses, and the steps of sampling."""
