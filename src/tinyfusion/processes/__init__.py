"""Noising processes: draw, predict, losses, steps of sampling."""
