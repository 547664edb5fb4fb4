"""Transformers of diffusers by their class: a table of block lists and couplings, and what opens, prunes and writes by it."""
