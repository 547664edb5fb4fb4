"""Samplers: from seeds to images."""
