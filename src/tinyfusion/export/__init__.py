"""Students out: what folders for other programs hold, and the card that goes with a model. Values only; jobs write."""
