"""Batches and images from somewhere."""
