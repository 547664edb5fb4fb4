"""What images are conditioned on: classes and texts, as one type."""
