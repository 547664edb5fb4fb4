"""Knows nothing about models: recipes, run folders, randomness, errors."""
