"""Render run folders as one HTML page. Does not import torch."""
