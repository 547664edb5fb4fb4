"""Seeds to images."""
