"""Decide which blocks go. Every criterion returns a `PrunePlan`."""
