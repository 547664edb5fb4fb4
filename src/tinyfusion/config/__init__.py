"""Recipes: sections, constraints, loading."""
