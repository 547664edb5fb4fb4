"""Run folders to one HTML page. Does not import torch."""
